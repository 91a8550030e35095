"""Gemma 2: Gemma with norms before and behind attention and MLP, bounded attention scores and logits, and sliding
windows in every other layer."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.models.gemma2 import modeling_gemma2

from causalcone.engine.errors import ModelError
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
        self.logit_softcap = model.config.final_logit_softcapping

    def softcap(self) -> float | None:
        config = self.model.config
        if config.attn_logit_softcapping is not None and config._attn_implementation == "sdpa":
            raise ModelError(
                "transformers leaves out the bound of Gemma 2's attention scores (attn_logit_softcapping) with sdpa "
                "attention; load the model with attn_implementation='eager'"
            )
        return config.attn_logit_softcapping

    def window(self, layer: int) -> int | None:
        return window_of(self.model.config, layer)

    def norms(self, layer: Any, read: Reader) -> Norms:
        return Norms(
            attn_in=self.norm(layer.input_layernorm, read),
            attn_out=self.norm(layer.post_attention_layernorm, read),
            mlp_in=self.norm(layer.pre_feedforward_layernorm, read),
            mlp_out=self.norm(layer.post_feedforward_layernorm, read),
        )
