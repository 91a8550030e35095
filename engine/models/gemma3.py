"""Gemma 3, text only: Gemma 2 with normed queries and keys, rotary positions of their own for the layers with sliding
windows, and attention scores that are never bounded, whatever the config says of it."""

from __future__ import annotations

from typing import ClassVar

from transformers.models.gemma3 import modeling_gemma3

from causalcone.engine.models.gemma2 import NORMS, Gemma2
from causalcone.engine.models.llama import HEAD_NORMS, modules_of, rotary_of_type
from causalcone.engine.models.parts import RotaryFrequencies
from causalcone.engine.models.plain import Reader


class Gemma3(Gemma2):
    modules: ClassVar[dict[str, type]] = {
        **modules_of(modeling_gemma3, "Gemma3", norms=NORMS + HEAD_NORMS),
        "model": modeling_gemma3.Gemma3TextModel,
        "model.embed_tokens": modeling_gemma3.Gemma3TextScaledWordEmbedding,
    }

    def softcap(self) -> float | None:
        return None

    def rotary(self, layer: int, read: Reader) -> RotaryFrequencies | None:
        return rotary_of_type(self.model.model.rotary_emb, self.model.config.layer_types[layer], read)
