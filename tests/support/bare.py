"""Runs a script, or with -m a module, where nothing is installed but what the engine needs, and pytest."""

import runpy
import sys
from pathlib import Path

HIDDEN = {
    *("boto3", "duckdb", "flask", "hypothesis", "jedi", "matplotlib", "moto", "pandas", "platformdirs", "plotly"),
    *("polars", "pydantic", "scipy", "sklearn", "statsmodels", "tomli_w"),
}


class Without:
    """A finder of modules that does not find these."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)


if __name__ == "__main__":
    sys.meta_path[:] = map(Without, sys.meta_path)
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = ""
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
