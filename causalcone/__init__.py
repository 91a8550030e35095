"""causalcone: causal tracing, representation zeroing and model editing, computed only where an intervention reaches.

Names are imported on first use, so that ``causalcone.analysis`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from causalcone import _moved

if TYPE_CHECKING:  # the same names as below, for editors and type checkers
    from causalcone.analysis import plot as plot
    from causalcone.engine.edit.deltas.apply import applied as applied, apply as apply, export as export
    from causalcone.engine.edit.deltas.delta import Delta as Delta
    from causalcone.engine.edit.editor import Editor as Editor
    from causalcone.engine.edit.methods.hparams import (
        FinetuneHparams as FinetuneHparams,
        MemitHparams as MemitHparams,
        RomeHparams as RomeHparams,
    )
    from causalcone.engine.edit.moments.moments import Moments as Moments
    from causalcone.engine.edit.scoring.tables import edit_batch as edit_batch
    from causalcone.engine.edit.texts.contexts import Contexts as Contexts
    from causalcone.engine.errors import CausalconeError as CausalconeError
    from causalcone.engine.facts import (
        Fact as Fact,
        FactProbe as FactProbe,
        ProbeCondition as ProbeCondition,
        SkippedFacts as SkippedFacts,
    )
    from causalcone.engine.localize.prompt_runs import (
        Intervention as Intervention,
        Prompt as Prompt,
        PromptResult as PromptResult,
        Read as Read,
    )
    from causalcone.engine.localize.states import State as State
    from causalcone.engine.localize.tracer import TracePlan as TracePlan, Tracer as Tracer
    from causalcone.engine.noise import Noise as Noise
    from causalcone.runners.facts.files import load_facts as load_facts, save_facts as save_facts

    __version__: str

_moved.install()

_NAMES = {
    "analysis": ["plot"],
    "engine.edit.deltas.apply": ["applied", "apply", "export"],
    "engine.edit.deltas.delta": ["Delta"],
    "engine.edit.editor": ["Editor"],
    "engine.edit.methods.hparams": ["FinetuneHparams", "MemitHparams", "RomeHparams"],
    "engine.edit.moments.moments": ["Moments"],
    "engine.edit.scoring.tables": ["edit_batch"],
    "engine.edit.texts.contexts": ["Contexts"],
    "engine.errors": ["CausalconeError"],
    "engine.facts": ["Fact", "FactProbe", "ProbeCondition", "SkippedFacts"],
    "engine.localize.prompt_runs": ["Intervention", "Prompt", "PromptResult", "Read"],
    "engine.localize.states": ["State"],
    "engine.localize.tracer": ["TracePlan", "Tracer"],
    "engine.noise": ["Noise"],
    "runners.facts.files": ["load_facts", "save_facts"],
}
_HOMES = {name: f"causalcone.{module}" for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("causalcone")
    if name not in _HOMES:
        raise AttributeError(f"module 'causalcone' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
