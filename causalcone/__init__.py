"""causalcone: causal tracing, representation zeroing and model editing, computed only where an intervention reaches.

Names are imported on first use, so that ``causalcone.analysis`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from causalcone import _moved

if TYPE_CHECKING:
    from causalcone.analysis import plot
    from causalcone.engine.edit.deltas.apply import applied, apply, export
    from causalcone.engine.edit.deltas.delta import Delta
    from causalcone.engine.edit.editor import Editor
    from causalcone.engine.edit.methods.hparams import FinetuneHparams, MemitHparams, RomeHparams
    from causalcone.engine.edit.moments.moments import Moments
    from causalcone.engine.edit.scoring.tables import edit_batch
    from causalcone.engine.edit.texts.contexts import Contexts
    from causalcone.engine.errors import CausalconeError
    from causalcone.engine.facts import Fact, SkippedFacts
    from causalcone.engine.localize.patching import Intervention, Prompt, PromptResult, Read
    from causalcone.engine.localize.states import State
    from causalcone.engine.localize.tracer import TracePlan, Tracer
    from causalcone.engine.noise import Noise
    from causalcone.runners.facts.files import load_facts, save_facts

    __version__: str

_moved.install()

_HOMES = {
    "CausalconeError": "causalcone.engine.errors",
    "Contexts": "causalcone.engine.edit.texts.contexts",
    "Delta": "causalcone.engine.edit.deltas.delta",
    "Editor": "causalcone.engine.edit.editor",
    "Fact": "causalcone.engine.facts",
    "FinetuneHparams": "causalcone.engine.edit.methods.hparams",
    "Intervention": "causalcone.engine.localize.patching",
    "MemitHparams": "causalcone.engine.edit.methods.hparams",
    "Moments": "causalcone.engine.edit.moments.moments",
    "Noise": "causalcone.engine.noise",
    "Prompt": "causalcone.engine.localize.patching",
    "PromptResult": "causalcone.engine.localize.patching",
    "Read": "causalcone.engine.localize.patching",
    "RomeHparams": "causalcone.engine.edit.methods.hparams",
    "SkippedFacts": "causalcone.engine.facts",
    "State": "causalcone.engine.localize.states",
    "TracePlan": "causalcone.engine.localize.tracer",
    "Tracer": "causalcone.engine.localize.tracer",
    "applied": "causalcone.engine.edit.deltas.apply",
    "apply": "causalcone.engine.edit.deltas.apply",
    "edit_batch": "causalcone.engine.edit.scoring.tables",
    "export": "causalcone.engine.edit.deltas.apply",
    "load_facts": "causalcone.runners.facts.files",
    "save_facts": "causalcone.runners.facts.files",
}

__all__ = [
    "CausalconeError",
    "Contexts",
    "Delta",
    "Editor",
    "Fact",
    "FinetuneHparams",
    "Intervention",
    "MemitHparams",
    "Moments",
    "Noise",
    "Prompt",
    "PromptResult",
    "Read",
    "RomeHparams",
    "SkippedFacts",
    "State",
    "TracePlan",
    "Tracer",
    "applied",
    "apply",
    "edit_batch",
    "export",
    "load_facts",
    "plot",
    "save_facts",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("causalcone")
    if name == "plot":
        return import_module("causalcone.analysis.plot")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'causalcone' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
