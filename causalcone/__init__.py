"""causalcone: causal tracing, representation zeroing and model editing, computed only where an intervention reaches.

Names are imported on first use, so that ``causalcone.analysis`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causalcone.analysis import plot
    from causalcone.engine.errors import CausalconeError
    from causalcone.engine.facts import Fact
    from causalcone.engine.noise import Noise
    from causalcone.engine.patching import Intervention, Prompt, PromptResult, Read
    from causalcone.engine.session import SkippedFacts
    from causalcone.engine.states import State
    from causalcone.engine.tracing import TracePlan, Tracer
    from causalcone.runners.fact_files import load_facts, save_facts

__version__ = "0.1.0"

_HOMES = {
    "CausalconeError": "causalcone.engine.errors",
    "Fact": "causalcone.engine.facts",
    "Intervention": "causalcone.engine.patching",
    "Noise": "causalcone.engine.noise",
    "Prompt": "causalcone.engine.patching",
    "PromptResult": "causalcone.engine.patching",
    "Read": "causalcone.engine.patching",
    "SkippedFacts": "causalcone.engine.session",
    "State": "causalcone.engine.states",
    "TracePlan": "causalcone.engine.tracing",
    "Tracer": "causalcone.engine.tracing",
    "load_facts": "causalcone.runners.fact_files",
    "save_facts": "causalcone.runners.fact_files",
}

__all__ = [
    "CausalconeError",
    "Fact",
    "Intervention",
    "Noise",
    "Prompt",
    "PromptResult",
    "Read",
    "SkippedFacts",
    "State",
    "TracePlan",
    "Tracer",
    "load_facts",
    "plot",
    "save_facts",
]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return import_module("causalcone.analysis.plot")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'causalcone' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
