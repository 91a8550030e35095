"""Architectures: one file each, found from the model's class and config."""

from __future__ import annotations

from typing import Any

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture
from causalcone.engine.models.gpt2 import GPT2
from causalcone.engine.models.refusal import refuse_unreadable

ARCHITECTURES: dict[str, type[Architecture]] = {"gpt2": GPT2}
"""Supported architectures by the ``model_type`` of their config."""


def read_architecture(model: Any) -> Architecture:
    """How to compute this transformers model, reading its parameters directly; refuses what that would get wrong."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        raise ModelError(f"{type(model).__name__} is not a transformers model; load one with AutoModelForCausalLM")
    check_supported(kind)
    architecture = ARCHITECTURES[kind]
    refuse_unreadable(model, architecture.modules)
    return architecture(model)


def check_supported(kind: str) -> None:
    """Raise ``ModelError`` naming an architecture that is not supported, and those that are."""
    if kind not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"the architecture {kind!r} is not supported; supported are: {supported}")
