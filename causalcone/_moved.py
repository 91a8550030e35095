"""Old module names, which still work and warn: each is an alias of the module under its new name."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "causalcone.analysis.correlations": "causalcone.analysis.stats.correlations",
    "causalcone.analysis.dependence": "causalcone.analysis.stats.dependence",
    "causalcone.analysis.gradients": "causalcone.analysis.layer_effects",
    "causalcone.analysis.joined": "causalcone.analysis.scores",
    "causalcone.analysis.paper_tables": "causalcone.analysis.papers.tables",
    "causalcone.analysis.regressions": "causalcone.analysis.stats.regressions",
    "causalcone.analysis.roles": "causalcone.analysis.tables.traces",
    "causalcone.analysis.study": "causalcone.analysis.sweep_results",
    "causalcone.analysis.uncertainty": "causalcone.analysis.stats.uncertainty",
    "causalcone.engine.editing.applying": "causalcone.engine.edit.deltas.apply",
    "causalcone.engine.editing.contexts": "causalcone.engine.edit.texts.contexts",
    "causalcone.engine.editing.deltas": "causalcone.engine.edit.deltas.delta",
    "causalcone.engine.editing.editor": "causalcone.engine.edit.editor",
    "causalcone.engine.editing.hparams": "causalcone.engine.edit.methods.hparams",
    "causalcone.engine.editing.moments": "causalcone.engine.edit.moments.moments",
    "causalcone.engine.patching": "causalcone.engine.localize.prompt_runs",
    "causalcone.engine.states": "causalcone.engine.localize.states",
    "causalcone.engine.tracing": "causalcone.engine.localize.tracer",
    "causalcone.runners.demo_model": "causalcone.runners.demo.model",
    "causalcone.runners.fact_files": "causalcone.runners.facts.files",
    "causalcone.runners.presets": "causalcone.runners.edits.presets",
}


class _Alias(Loader):
    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.spec_of_new = import_module(self.new).__spec__
        return sys.modules[self.new]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec_of_new  # the import system has set the old name's on it


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "causalcone.engine.editing":
            return ModuleSpec(name, None, is_package=True)
        new = MOVED.get(name)
        if new is None:
            return None
        warnings.warn(f"{name} is now {new}", DeprecationWarning, stacklevel=2)
        return ModuleSpec(name, _Alias(new))


def install() -> None:
    """Let old names be found before the files of packages, which may hold a file of the same name."""
    sys.meta_path.insert(0, _Finder())
