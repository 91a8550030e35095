"""GPT-2: learned positions, LayerNorm before attention and MLP, one fused query-key-value projection (Conv1D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture, Block, Sizes
from causalcone.engine.models.parts import LayerNorm, activation_of
from causalcone.kernels.linear import Linear


@dataclass(frozen=True)
class GPT2Layer(Block):
    scale: float
    head_dim: int
    attn_norm: LayerNorm
    kv: Linear
    query: Linear
    output: Linear
    mlp_norm: LayerNorm
    up: Linear
    down: Linear

    def keys_values(self, rows: Tensor, positions: Tensor) -> Tensor:
        return self.kv(self.attn_norm(rows))

    def queries(self, rows: Tensor, positions: Tensor) -> Tensor:
        return self.query(self.attn_norm(rows))

    def attention_output(self, rows: Tensor) -> Tensor:
        return self.output(rows)

    def mlp(self, rows: Tensor) -> Tensor:
        return self.down(self.up(self.mlp_norm(rows)))


class GPT2(Architecture):
    modules: ClassVar[dict[str, type]] = {
        "": GPT2LMHeadModel,
        "transformer": GPT2Model,
        "transformer.wte": torch.nn.Embedding,
        "transformer.wpe": torch.nn.Embedding,
        "transformer.ln_f": torch.nn.LayerNorm,
        "transformer.h.*": GPT2Block,
        "transformer.h.*.ln_1": torch.nn.LayerNorm,
        "transformer.h.*.attn": GPT2Attention,
        "transformer.h.*.attn.c_attn": Conv1D,
        "transformer.h.*.attn.c_proj": Conv1D,
        "transformer.h.*.ln_2": torch.nn.LayerNorm,
        "transformer.h.*.mlp": GPT2MLP,
        "transformer.h.*.mlp.c_fc": Conv1D,
        "transformer.h.*.mlp.c_proj": Conv1D,
        "lm_head": torch.nn.Linear,
    }

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        if config.add_cross_attention:
            raise ModelError("GPT-2 with cross-attention layers (add_cross_attention) is not supported")
        hidden, inner = config.hidden_size, config.n_inner or 4 * config.hidden_size
        self.sizes = Sizes(
            depth=config.num_hidden_layers,
            hidden=hidden,
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=hidden // config.num_attention_heads,
            inner=inner,
            mlp_weights=2 * hidden * inner,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.transformer.wte.weight[tokens.to(self.model.transformer.wte.weight.device)]

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        weight = self.model.transformer.wpe.weight
        return embeddings + weight[positions.to(weight.device)].to(embeddings)

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        module = self.model.transformer.h[layer]
        D = self.sizes.hidden

        def of(parameter: Tensor) -> Tensor:
            return parameter.to(device, dtype)

        def linear(conv: Conv1D, columns: slice = slice(None), activation: Any = None) -> Linear:
            return Linear(of(conv.weight[:, columns]).t(), of(conv.bias[columns]), activation)

        def norm(layer_norm: torch.nn.LayerNorm) -> LayerNorm:
            return LayerNorm(of(layer_norm.weight), of(layer_norm.bias), layer_norm.eps)

        return GPT2Layer(
            scale=module.attn.scaling,
            head_dim=self.sizes.head_dim,
            attn_norm=norm(module.ln_1),
            kv=linear(module.attn.c_attn, slice(D, 3 * D)),
            query=linear(module.attn.c_attn, slice(0, D)),
            output=linear(module.attn.c_proj),
            mlp_norm=norm(module.ln_2),
            up=linear(module.mlp.c_fc, activation=activation_of(module.mlp.act)),
            down=linear(module.mlp.c_proj),
        )

    def final_norm(self, rows: Tensor) -> Tensor:
        norm = self.model.transformer.ln_f
        return LayerNorm(norm.weight.to(rows), norm.bias.to(rows), norm.eps)(rows)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self.model.lm_head.weight, None
