"""GPT-J: attention and MLP read one norm of the layer's input; the first dimensions of every head are turned in pairs
of neighbours, by tables that the model holds."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.gptj.modeling_gptj import GPTJMLP, GPTJAttention, GPTJBlock, GPTJForCausalLM, GPTJModel

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture, Block, Sizes
from causalcone.engine.models.parts import Rotary, activation_of
from causalcone.engine.models.plain import PlainLayer, Reader, look_up


class GPTJ(Architecture):
    modules: ClassVar[dict[str, type]] = {
        "": GPTJForCausalLM,
        "transformer": GPTJModel,
        "transformer.wte": torch.nn.Embedding,
        "transformer.ln_f": torch.nn.LayerNorm,
        "transformer.h.*": GPTJBlock,
        "transformer.h.*.ln_1": torch.nn.LayerNorm,
        "transformer.h.*.attn": GPTJAttention,
        "transformer.h.*.attn.q_proj": torch.nn.Linear,
        "transformer.h.*.attn.k_proj": torch.nn.Linear,
        "transformer.h.*.attn.v_proj": torch.nn.Linear,
        "transformer.h.*.attn.out_proj": torch.nn.Linear,
        "transformer.h.*.mlp": GPTJMLP,
        "transformer.h.*.mlp.fc_in": torch.nn.Linear,
        "transformer.h.*.mlp.fc_out": torch.nn.Linear,
        "lm_head": torch.nn.Linear,
    }
    parallel = True
    down_projection: ClassVar[str] = "transformer.h.{}.mlp.fc_out"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        if not config.rotary_dim:
            raise ModelError(f"GPT-J without a number of rotary dimensions (rotary_dim {config.rotary_dim}) is refused")
        hidden, inner = config.hidden_size, model.transformer.h[0].mlp.fc_in.out_features
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
        return embeddings

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        module, read = self.model.transformer.h[layer], Reader(device, dtype)
        attn, mlp, norm = module.attn, module.mlp, read.norm(module.ln_1)
        sin, cos = read.tensor(attn.embed_positions).chunk(2, dim=1)
        return PlainLayer(
            scale=self.sizes.head_dim**-0.5,
            head_dim=self.sizes.head_dim,
            attn_norm=norm,
            kv=read.linear(attn.k_proj, attn.v_proj),
            query=read.linear(attn.q_proj),
            output=read.linear(attn.out_proj),
            mlp_norm=norm,
            up=read.linear(mlp.fc_in, activation=activation_of(mlp.act)),
            down=read.linear(mlp.fc_out),
            rotary=Rotary(cos, sin, interleaved=True),
        )

    def final_norm(self, rows: Tensor) -> Tensor:
        return Reader(rows.device, rows.dtype).norm(self.model.transformer.ln_f)(rows)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self.model.lm_head.weight, self.model.lm_head.bias
