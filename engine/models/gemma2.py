"""Gemma 2: Gemma with norms before and behind attention and MLP, bounded attention scores and logits, and sliding
windows in every other layer."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.models.gemma2 import modeling_gemma2

from causalcone.engine.models.gemma import Gemma
from causalcone.engine.models.llama import Norms, modules_of, window_of
from causalcone.engine.models.plain import Reader

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


class Gemma2(Gemma):
    modules: ClassVar[dict[str, type]] = {
        **modules_of(modeling_gemma2, "Gemma2", norms=NORMS),
        "model.embed_tokens": modeling_gemma2.Gemma2TextScaledWordEmbedding,
    }

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.attention_softcap = model.config.attn_logit_softcapping
        self.logit_softcap = model.config.final_logit_softcapping

    def window(self, layer: int) -> int | None:
        return window_of(self.model.config, layer)

    def norms(self, layer: Any, read: Reader) -> Norms:
        return Norms(
            attn_in=self.norm(layer.input_layernorm, read),
            attn_out=self.norm(layer.post_attention_layernorm, read),
            mlp_in=self.norm(layer.pre_feedforward_layernorm, read),
            mlp_out=self.norm(layer.post_feedforward_layernorm, read),
        )
