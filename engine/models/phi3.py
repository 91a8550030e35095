"""Phi-3: Llama with one projection to queries, keys and values, one to gate and up, and a sliding window."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.models.phi3 import modeling_phi3

from causalcone.engine.models.llama import Gated, Mistral, Projections, Rows, modules_of
from causalcone.engine.models.parts import activation_of
from causalcone.engine.models.plain import Reader

LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


class Phi3(Mistral):
    modules: ClassVar[dict[str, type]] = modules_of(modeling_phi3, "Phi3", linears=LINEARS)

    def projections(self, attn: Any, read: Reader) -> Projections:
        queries, weight = self.sizes.heads * self.sizes.head_dim, attn.qkv_proj.weight
        return Projections(query=read.product(weight[:queries], None), kv=read.product(weight[queries:], None))

    def inner(self, mlp: Any, read: Reader) -> Rows:
        gate, up = mlp.gate_up_proj.weight.chunk(2)
        return Gated(read.product(gate, None, activation_of(mlp.activation_fn)), read.product(up, None))
