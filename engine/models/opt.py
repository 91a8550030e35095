"""OPT: learned positions that begin at an offset, LayerNorm before attention and MLP."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.opt.modeling_opt import (
    OPTAttention,
    OPTDecoder,
    OPTDecoderLayer,
    OPTForCausalLM,
    OPTLearnedPositionalEmbedding,
    OPTModel,
)

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture, Block, Sizes
from causalcone.engine.models.parts import activation_of
from causalcone.engine.models.plain import PlainLayer, Reader, look_up


class OPT(Architecture):
    modules: ClassVar[dict[str, type]] = {
        "": OPTForCausalLM,
        "model": OPTModel,
        "model.decoder": OPTDecoder,
        "model.decoder.embed_tokens": torch.nn.Embedding,
        "model.decoder.embed_positions": OPTLearnedPositionalEmbedding,
        "model.decoder.(layers.*.)?final_layer_norm": torch.nn.LayerNorm,  # not every model has one after its layers
        "model.decoder.layers.*": OPTDecoderLayer,
        "model.decoder.layers.*.self_attn_layer_norm": torch.nn.LayerNorm,
        "model.decoder.layers.*.self_attn": OPTAttention,
        "model.decoder.layers.*.self_attn.q_proj": torch.nn.Linear,
        "model.decoder.layers.*.self_attn.k_proj": torch.nn.Linear,
        "model.decoder.layers.*.self_attn.v_proj": torch.nn.Linear,
        "model.decoder.layers.*.self_attn.out_proj": torch.nn.Linear,
        "model.decoder.layers.*.fc1": torch.nn.Linear,
        "model.decoder.layers.*.fc2": torch.nn.Linear,
        "lm_head": torch.nn.Linear,
    }
    down_projection: ClassVar[str] = "model.decoder.layers.{}.fc2"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        if not config.do_layer_norm_before:
            raise ModelError("OPT with norms behind attention and MLP (do_layer_norm_before=False) is not supported")
        if config.word_embed_proj_dim != config.hidden_size:
            raise ModelError(
                f"OPT with embeddings of another width than its layers (word_embed_proj_dim "
                f"{config.word_embed_proj_dim}, hidden_size {config.hidden_size}) is not supported"
            )
        hidden, inner = config.hidden_size, config.ffn_dim
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
        return look_up(self.model.model.decoder.embed_tokens, tokens)

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        table = self.model.model.decoder.embed_positions
        return embeddings + look_up(table, positions + table.offset).to(embeddings)

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        module, read = self.model.model.decoder.layers[layer], Reader(device, dtype)
        attn = module.self_attn
        return PlainLayer(
            scale=attn.scaling,
            head_dim=self.sizes.head_dim,
            attn_norm=read.norm(module.self_attn_layer_norm),
            kv=read.linear(attn.k_proj, attn.v_proj),
            query=read.linear(attn.q_proj),
            output=read.linear(attn.out_proj),
            mlp_norm=read.norm(module.final_layer_norm),
            up=read.linear(module.fc1, activation=activation_of(module.activation_fn)),
            down=read.linear(module.fc2),
        )

    def final_norm(self, rows: Tensor) -> Tensor:
        norm = self.model.model.decoder.final_layer_norm
        return rows if norm is None else Reader(rows.device, rows.dtype).norm(norm)(rows)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self.model.lm_head.weight, None
