"""Phi-1 and Phi-2: attention and MLP read one norm of the layer's input; the first dimensions of every head are turned
by rotary positions, and queries and keys may be normed head by head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.phi.modeling_phi import (
    PhiAttention,
    PhiDecoderLayer,
    PhiForCausalLM,
    PhiMLP,
    PhiModel,
    PhiRotaryEmbedding,
)

from causalcone.engine.models.base import Architecture, Block, Sizes
from causalcone.engine.models.parts import activation_of, refuse_length_dependent, rotary_of
from causalcone.engine.models.plain import PlainLayer, Reader, look_up


class Phi(Architecture):
    modules: ClassVar[dict[str, type]] = {
        "": PhiForCausalLM,
        "model": PhiModel,
        "model.embed_tokens": torch.nn.Embedding,
        "model.rotary_emb": PhiRotaryEmbedding,
        "model.final_layernorm": torch.nn.LayerNorm,
        "model.layers.*": PhiDecoderLayer,
        "model.layers.*.(input|self_attn.[qk])_layernorm": torch.nn.LayerNorm,  # not every model has those in attention
        "model.layers.*.self_attn": PhiAttention,
        "model.layers.*.self_attn.q_proj": torch.nn.Linear,
        "model.layers.*.self_attn.k_proj": torch.nn.Linear,
        "model.layers.*.self_attn.v_proj": torch.nn.Linear,
        "model.layers.*.self_attn.dense": torch.nn.Linear,
        "model.layers.*.mlp": PhiMLP,
        "model.layers.*.mlp.fc1": torch.nn.Linear,
        "model.layers.*.mlp.fc2": torch.nn.Linear,
        "lm_head": torch.nn.Linear,
    }
    parallel = True
    down_projection: ClassVar[str] = "model.layers.{}.mlp.fc2"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        refuse_length_dependent(model.model.rotary_emb)
        hidden, inner = config.hidden_size, config.intermediate_size
        self.sizes = Sizes(
            depth=config.num_hidden_layers,
            hidden=hidden,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=model.model.layers[0].self_attn.head_dim,
            inner=inner,
            mlp_weights=2 * hidden * inner,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        return look_up(self.model.model.embed_tokens, tokens)

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return embeddings

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        module, read = self.model.model.layers[layer], Reader(device, dtype)
        attn, mlp, norm = module.self_attn, module.mlp, read.norm(module.input_layernorm)
        return PlainLayer(
            scale=attn.scaling,
            head_dim=self.sizes.head_dim,
            attn_norm=norm,
            kv=read.linear(attn.k_proj, attn.v_proj),
            query=read.linear(attn.q_proj),
            output=read.linear(attn.dense),
            mlp_norm=norm,
            up=read.linear(mlp.fc1, activation=activation_of(mlp.activation_fn)),
            down=read.linear(mlp.fc2),
            rotary=rotary_of(self.model.model.rotary_emb, self.sizes.positions, dtype, device),
            query_norm=read.norm(attn.q_layernorm) if attn.qk_layernorm else None,
            key_norm=read.norm(attn.k_layernorm) if attn.qk_layernorm else None,
        )

    def final_norm(self, rows: Tensor) -> Tensor:
        return Reader(rows.device, rows.dtype).norm(self.model.model.final_layernorm)(rows)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self.model.lm_head.weight, self.model.lm_head.bias
