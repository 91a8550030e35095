"""OLMo 2 and 3: norms only behind attention and MLP, and over all queries and all keys of a token at once. OLMo 3 adds
sliding windows, and rotary positions of its own to each type of layer."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.models.olmo2 import modeling_olmo2
from transformers.models.olmo3 import modeling_olmo3

from causalcone.engine.models.llama import HEAD_NORMS, Llama, Norms, modules_of, rotary_of_type, window_of
from causalcone.engine.models.parts import RotaryFrequencies
from causalcone.engine.models.plain import Reader

NORMS = ("post_attention_layernorm", "post_feedforward_layernorm", *HEAD_NORMS)


class Olmo2(Llama):
    modules: ClassVar[dict[str, type]] = modules_of(modeling_olmo2, "Olmo2", norms=NORMS)

    def norms(self, layer: Any, read: Reader) -> Norms:
        return Norms(
            attn_out=self.norm(layer.post_attention_layernorm, read),
            mlp_out=self.norm(layer.post_feedforward_layernorm, read),
        )


class Olmo3(Olmo2):
    modules: ClassVar[dict[str, type]] = modules_of(modeling_olmo3, "Olmo3", norms=NORMS)

    def window(self, layer: int) -> int | None:
        return window_of(self.model.config, layer)

    def rotary(self, layer: int, read: Reader) -> RotaryFrequencies | None:
        return rotary_of_type(self.model.model.rotary_emb, self.model.config.layer_types[layer], read)
