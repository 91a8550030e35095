"""GPT-Neo: learned positions, LayerNorm before attention and MLP, unscaled attention. Its local layers see a window of
tokens, the others all before."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.gpt_neo.modeling_gpt_neo import (
    GPTNeoAttention,
    GPTNeoBlock,
    GPTNeoForCausalLM,
    GPTNeoMLP,
    GPTNeoModel,
    GPTNeoSelfAttention,
)

from causalcone.engine.models.base import Architecture, Block, Sizes
from causalcone.engine.models.parts import activation_of
from causalcone.engine.models.plain import PlainLayer, Reader, look_up


class GPTNeo(Architecture):
    modules: ClassVar[dict[str, type]] = {
        "": GPTNeoForCausalLM,
        "transformer": GPTNeoModel,
        "transformer.wte": torch.nn.Embedding,
        "transformer.wpe": torch.nn.Embedding,
        "transformer.ln_f": torch.nn.LayerNorm,
        "transformer.h.*": GPTNeoBlock,
        "transformer.h.*.ln_1": torch.nn.LayerNorm,
        "transformer.h.*.attn": GPTNeoAttention,
        "transformer.h.*.attn.attention": GPTNeoSelfAttention,
        "transformer.h.*.attn.attention.q_proj": torch.nn.Linear,
        "transformer.h.*.attn.attention.k_proj": torch.nn.Linear,
        "transformer.h.*.attn.attention.v_proj": torch.nn.Linear,
        "transformer.h.*.attn.attention.out_proj": torch.nn.Linear,
        "transformer.h.*.ln_2": torch.nn.LayerNorm,
        "transformer.h.*.mlp": GPTNeoMLP,
        "transformer.h.*.mlp.c_fc": torch.nn.Linear,
        "transformer.h.*.mlp.c_proj": torch.nn.Linear,
        "lm_head": torch.nn.Linear,
    }
    down_projection: ClassVar[str] = "transformer.h.{}.mlp.c_proj"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        hidden, inner = config.hidden_size, model.transformer.h[0].mlp.c_fc.out_features
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
        return look_up(self.model.transformer.wte, tokens)

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return embeddings + look_up(self.model.transformer.wpe, positions).to(embeddings)

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        module, read = self.model.transformer.h[layer], Reader(device, dtype)
        attn, mlp = module.attn.attention, module.mlp
        return PlainLayer(
            scale=1.0,
            head_dim=self.sizes.head_dim,
            attn_norm=read.norm(module.ln_1),
            kv=read.linear(attn.k_proj, attn.v_proj),
            query=read.linear(attn.q_proj),
            output=read.linear(attn.out_proj),
            mlp_norm=read.norm(module.ln_2),
            up=read.linear(mlp.c_fc, activation=activation_of(mlp.act)),
            down=read.linear(mlp.c_proj),
            window=self.model.config.window_size if attn.attention_type == "local" else None,
        )

    def final_norm(self, rows: Tensor) -> Tensor:
        return Reader(rows.device, rows.dtype).norm(self.model.transformer.ln_f)(rows)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self.model.lm_head.weight, None
