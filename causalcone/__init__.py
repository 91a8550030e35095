"""causalcone: causal tracing, representation zeroing and model editing, computed only where an intervention reaches.

Names are imported on first use, so that ``causalcone.analysis`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causalcone.analysis import plot
    from causalcone.engine.editing.applying import applied, apply, export
    from causalcone.engine.editing.contexts import Contexts
    from causalcone.engine.editing.deltas import Delta
    from causalcone.engine.editing.editor import Editor
    from causalcone.engine.editing.hparams import FinetuneHparams, MemitHparams, RomeHparams
    from causalcone.engine.editing.moments import Moments
    from causalcone.engine.editing.tables import edit_batch
    from causalcone.engine.errors import CausalconeError
    from causalcone.engine.facts import Fact
    from causalcone.engine.noise import Noise
    from causalcone.engine.patching import Intervention, Prompt, PromptResult, Read
    from causalcone.engine.session import SkippedFacts
    from causalcone.engine.states import State
    from causalcone.engine.tracing import TracePlan, Tracer
    from causalcone.runners.fact_files import load_facts, save_facts

    __version__: str

_HOMES = {
    "CausalconeError": "causalcone.engine.errors",
    "Contexts": "causalcone.engine.editing.contexts",
    "Delta": "causalcone.engine.editing.deltas",
    "Editor": "causalcone.engine.editing.editor",
    "Fact": "causalcone.engine.facts",
    "FinetuneHparams": "causalcone.engine.editing.hparams",
    "Intervention": "causalcone.engine.patching",
    "MemitHparams": "causalcone.engine.editing.hparams",
    "Moments": "causalcone.engine.editing.moments",
    "Noise": "causalcone.engine.noise",
    "Prompt": "causalcone.engine.patching",
    "PromptResult": "causalcone.engine.patching",
    "Read": "causalcone.engine.patching",
    "RomeHparams": "causalcone.engine.editing.hparams",
    "SkippedFacts": "causalcone.engine.session",
    "State": "causalcone.engine.states",
    "TracePlan": "causalcone.engine.tracing",
    "Tracer": "causalcone.engine.tracing",
    "applied": "causalcone.engine.editing.applying",
    "apply": "causalcone.engine.editing.applying",
    "edit_batch": "causalcone.engine.editing.tables",
    "export": "causalcone.engine.editing.applying",
    "load_facts": "causalcone.runners.fact_files",
    "save_facts": "causalcone.runners.fact_files",
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
