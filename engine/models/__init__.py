"""Architectures: how the engine computes a transformers model, found from the ``model_type`` of its config."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from causalcone.engine.errors import ModelError
from causalcone.engine.models import gpt, llama
from causalcone.engine.models.base import Architecture
from causalcone.engine.models.reference import refuse_unreadable
from causalcone.engine.models.registry import families, family_of, register

__all__ = ["BUILT_IN", "families", "family_of", "outline", "read_architecture", "register"]

BUILT_IN = (gpt, llama)
"""Files of families, which they register."""


def read_architecture(model: Any) -> Architecture:
    """How to compute this transformers model, reading its parameters directly; refuses what that would get wrong."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        raise ModelError(f"{type(model).__name__} is not a transformers model; load one with AutoModelForCausalLM")
    family = family_of(kind)
    refuse_unreadable(model, family.modules)
    return family(model)


def outline(config: Any) -> Architecture:
    """The architecture of a config, with parameters on the meta device: its sizes are true, and nothing can be computed
    with it. Raises ``ModelError`` for one that is not supported."""
    family = family_of(config.model_type)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    return family(model)
