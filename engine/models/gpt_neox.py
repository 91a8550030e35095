"""GPT-NeoX and Pythia: attention and MLP, each with its own norm, in parallel or in turn. One projection holds query,
key and value of one head after another; the first dimensions of every head are turned by rotary positions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXForCausalLM,
    GPTNeoXLayer,
    GPTNeoXMLP,
    GPTNeoXModel,
    GPTNeoXRotaryEmbedding,
)

from causalcone.engine.models.base import Architecture, Block, Sizes
from causalcone.engine.models.parts import activation_of, refuse_length_dependent, rotary_of
from causalcone.engine.models.plain import PlainLayer, Reader, look_up
from causalcone.kernels.linear import Linear


class GPTNeoX(Architecture):
    modules: ClassVar[dict[str, type]] = {
        "": GPTNeoXForCausalLM,
        "gpt_neox": GPTNeoXModel,
        "gpt_neox.embed_in": torch.nn.Embedding,
        "gpt_neox.rotary_emb": GPTNeoXRotaryEmbedding,
        "gpt_neox.final_layer_norm": torch.nn.LayerNorm,
        "gpt_neox.layers.*": GPTNeoXLayer,
        "gpt_neox.layers.*.input_layernorm": torch.nn.LayerNorm,
        "gpt_neox.layers.*.attention": GPTNeoXAttention,
        "gpt_neox.layers.*.attention.query_key_value": torch.nn.Linear,
        "gpt_neox.layers.*.attention.dense": torch.nn.Linear,
        "gpt_neox.layers.*.post_attention_layernorm": torch.nn.LayerNorm,
        "gpt_neox.layers.*.mlp": GPTNeoXMLP,
        "gpt_neox.layers.*.mlp.dense_h_to_4h": torch.nn.Linear,
        "gpt_neox.layers.*.mlp.dense_4h_to_h": torch.nn.Linear,
        "lm_head": torch.nn.Linear,
    }
    down_projection: ClassVar[str] = "gpt_neox.layers.{}.mlp.dense_4h_to_h"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        refuse_length_dependent(model.gpt_neox.rotary_emb)
        self.parallel = config.use_parallel_residual
        hidden, inner = config.hidden_size, config.intermediate_size
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
        return look_up(self.model.gpt_neox.embed_in, tokens)

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return embeddings

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        module, read = self.model.gpt_neox.layers[layer], Reader(device, dtype)
        fused, mlp = module.attention.query_key_value, module.mlp

        def part(places: slice) -> Linear:
            """The product with the query (place 0), the key (1) or the value (2) of every head, or several of them."""

            def pick(parameter: Tensor) -> Tensor:
                by_head = parameter.unflatten(0, (self.sizes.heads, 3, self.sizes.head_dim))
                return by_head[:, places].transpose(0, 1).flatten(0, 2)

            return read.product(pick(fused.weight), None if fused.bias is None else pick(fused.bias))

        return PlainLayer(
            scale=module.attention.scaling,
            head_dim=self.sizes.head_dim,
            attn_norm=read.norm(module.input_layernorm),
            kv=part(slice(1, 3)),
            query=part(slice(1)),
            output=read.linear(module.attention.dense),
            mlp_norm=read.norm(module.post_attention_layernorm),
            up=read.linear(mlp.dense_h_to_4h, activation=activation_of(mlp.act)),
            down=read.linear(mlp.dense_4h_to_h),
            rotary=rotary_of(self.model.gpt_neox.rotary_emb, self.sizes.positions, dtype, device),
        )

    def final_norm(self, rows: Tensor) -> Tensor:
        return Reader(rows.device, rows.dtype).norm(self.model.gpt_neox.final_layer_norm)(rows)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self.model.lm_head.weight, None
