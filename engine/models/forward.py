"""What a model's own forward gives, to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def model_logits(model: Any, ids: Tensor) -> Tensor:
    """The model's logits (1, T, V) of token ids (1, T) without dropout, its training mode left as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        return model(ids, use_cache=False, output_hidden_states=False, output_attentions=False, return_dict=True).logits
    finally:
        for module in training:
            module.training = True
