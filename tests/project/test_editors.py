"""Editors and type checkers find the package's modules by their installed names, with no setting of their own.

``causalcone/`` has a link to each folder that is installed below it; these tools read folders and run no import hook.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jedi
import pytest

ROOT = Path(__file__).resolve().parents[2]

FOLDERS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
"""Folder of the repository by the name it is installed under."""

IMPORT = re.compile(r"^ *from (causalcone[\w.]*) import (\w+)", re.MULTILINE)


def importing(folder, count):
    """The smallest files of a folder that import from the package: what is found does not depend on a file's size."""
    files = [file for file in (ROOT / folder).rglob("*.py") if IMPORT.search(file.read_text(encoding="utf-8"))]
    return sorted(files, key=lambda file: (file.stat().st_size, file))[:count]


def unresolved(files):
    """The imports that pyright cannot resolve, as ``(file, message)``."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *map(str, files)]
    quiet = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    told = json.loads(done.stdout)
    assert told["summary"]["filesAnalyzed"] == len(files)
    told = [(Path(found["file"]).name, found["message"]) for found in told["generalDiagnostics"]]
    return [(name, message) for name, message in told if re.search("^Import .* could not|unknown import", message)]


def test_every_folder_is_linked():
    linked = {f"causalcone.{path.name}": path for path in (ROOT / "causalcone").iterdir() if path.is_symlink()}
    assert {name: str(path.readlink()) for name, path in linked.items()} == {
        name: f"../{folder}" for name, folder in FOLDERS.items() if name != "causalcone"
    }


@pytest.mark.slow
def test_pyright_resolves_imports(tmp_path):
    files = [file for folder in FOLDERS.values() for file in importing(folder, 2)]
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from causalcone.engine.no_such_one import Fact\nfrom causalcone.engine.facts import NoSuch\n")
    found = unresolved([*files, wrong])
    assert [name for name, _ in found] == ["wrong.py"] * 2, found
    assert "no_such_one" in found[0][1]
    assert "NoSuch" in found[1][1]


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_jedi_goes_to_definitions(folder):
    project = jedi.Project(ROOT)
    for file in importing(folder, 5):
        script = jedi.Script(path=file, project=project)
        for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if found := IMPORT.match(text):
                definitions = script.goto(line, found.start(2), follow_imports=True)
                assert definitions, f"{file}:{line}: {text}"
                assert definitions[0].module_path.resolve() != file, f"{file}:{line}: {text}"


def test_jedi_goes_from_a_public_name_to_its_class():
    script = jedi.Script("import causalcone as cc\ncc.Tracer\n", path=ROOT / "example.py", project=jedi.Project(ROOT))
    [found] = script.goto(2, 4, follow_imports=True)
    assert found.type == "class"
    line = found.module_path.read_text(encoding="utf-8").splitlines()[found.line - 1]
    assert line.startswith("class Tracer")
    assert not script.goto(1, 8, follow_imports=True)[0].in_builtin_module()


def test_jedi_finds_nothing_where_there_is_nothing():
    code = "from causalcone.engine.no_such_module import Fact\n"
    assert not jedi.Script(code, path=ROOT / "example.py", project=jedi.Project(ROOT)).goto(1, 46, follow_imports=True)
