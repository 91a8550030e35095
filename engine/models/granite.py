"""Granite: Llama with multipliers of embeddings, attention scores, contributions to the residual stream, and logits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.granite import modeling_granite

from causalcone.engine.models.llama import Llama, Norms, modules_of
from causalcone.engine.models.plain import Reader


class Granite(Llama):
    modules: ClassVar[dict[str, type]] = modules_of(modeling_granite, "Granite")

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return embeddings * self.model.config.embedding_multiplier

    def final_norm(self, rows: Tensor) -> Tensor:
        """Scaled as well, so that the model's own unembedding gives its logits."""
        return super().final_norm(rows) / self.model.config.logits_scaling

    def norms(self, layer: Any, read: Reader) -> Norms:
        scaled = partial(torch.mul, other=layer.residual_multiplier)
        return replace(super().norms(layer, read), attn_out=scaled, mlp_out=scaled)
