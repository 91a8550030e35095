"""Architectures without weights: what there is to know of a model before it is at hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from causalcone.engine.models import ARCHITECTURES, check_supported
from causalcone.engine.models.base import Architecture


def outline(config: Any) -> Architecture:
    """The architecture of a config, with parameters on the meta device: its sizes are true, and nothing can be computed
    with it. Raises ``ModelError`` for one that is not supported."""
    check_supported(config.model_type)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    return ARCHITECTURES[config.model_type](model)
