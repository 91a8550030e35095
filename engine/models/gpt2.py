"""GPT-2: learned positions, LayerNorm before attention and MLP, one fused query-key-value projection (Conv1D)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture, Block, Sizes
from causalcone.engine.models.parts import activation_of
from causalcone.engine.models.plain import PlainLayer, Reader, look_up
from causalcone.kernels.linear import Linear


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
    down_projection: ClassVar[str] = "transformer.h.{}.mlp.c_proj"

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
        return look_up(self.model.transformer.wte, tokens)

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return embeddings + look_up(self.model.transformer.wpe, positions).to(embeddings)

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        module, read = self.model.transformer.h[layer], Reader(device, dtype)
        D = self.sizes.hidden

        def product(conv: Conv1D, columns: slice = slice(None), activation: Any = None) -> Linear:
            return read.product(conv.weight[:, columns].t(), conv.bias[columns], activation)

        return PlainLayer(
            scale=module.attn.scaling,
            head_dim=self.sizes.head_dim,
            attn_norm=read.norm(module.ln_1),
            kv=product(module.attn.c_attn, slice(D, 3 * D)),
            query=product(module.attn.c_attn, slice(0, D)),
            output=product(module.attn.c_proj),
            mlp_norm=read.norm(module.ln_2),
            up=product(module.mlp.c_fc, activation=activation_of(module.mlp.act)),
            down=product(module.mlp.c_proj),
        )

    def final_norm(self, rows: Tensor) -> Tensor:
        return Reader(rows.device, rows.dtype).norm(self.model.transformer.ln_f)(rows)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self.model.lm_head.weight, None
