"""StarCoder 2: Llama with LayerNorm, biases, a sliding window and an MLP of two products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers.models.starcoder2 import modeling_starcoder2

from causalcone.engine.models.llama import ATTENTION, Mistral, Rows, modules_of
from causalcone.engine.models.parts import activation_of
from causalcone.engine.models.plain import Reader
from causalcone.kernels.linear import Linear


class Starcoder2(Mistral):
    modules: ClassVar[dict[str, type]] = modules_of(
        modeling_starcoder2, "Starcoder2", linears=(*ATTENTION, "mlp.c_fc", "mlp.c_proj"), norm=torch.nn.LayerNorm
    )
    down_projection: ClassVar[str] = "model.layers.{}.mlp.c_proj"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.sizes = replace(self.sizes, mlp_weights=2 * self.sizes.hidden * self.sizes.inner)

    def norm(self, module: Any, read: Reader) -> Rows:
        return read.norm(module)

    def inner(self, mlp: Any, read: Reader) -> Rows:
        return read.linear(mlp.c_fc, activation=activation_of(mlp.act))

    def down(self, mlp: Any, read: Reader) -> Linear:
        return read.linear(mlp.c_proj)
