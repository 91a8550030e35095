"""Llama and its relatives: RMSNorm, key heads that serve several query heads, rotary positions, a gated MLP."""

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.cwm import modeling_cwm
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.granite import modeling_granite
from transformers.models.llama import modeling_llama
from transformers.models.ministral import modeling_ministral
from transformers.models.mistral import modeling_mistral
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.olmo3 import modeling_olmo3
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.seed_oss import modeling_seed_oss
from transformers.models.smollm3 import modeling_smollm3
from transformers.models.starcoder2 import modeling_starcoder2

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Block, Rows
from causalcone.engine.models.decoder import Decoder, Reader, activation_of, wide
from causalcone.engine.models.registry import register
from causalcone.kernels.linear import Linear
from causalcone.kernels.norms import Norm, RMSNorm
from causalcone.kernels.rotary import RotaryFrequencies


@register("llama")
class Llama(Decoder, code=modeling_llama, family="Llama"):
    """Relatives say what they do otherwise."""

    norm_class: ClassVar[str | type] = "RMSNorm"
    rotary_module = "model.rotary_emb"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for option, usual in (("is_causal", True), ("use_bidirectional_attention", False)):
            if getattr(model.config, option, None) not in (None, usual):
                raise ModelError(f"attention to later tokens ({option}={not usual}) is not supported")


class LayerTypes(Llama):
    """The config gives every layer its type: full attention, or a sliding window."""

    def window(self, layer: int) -> int | None:
        config = self.model.config
        kind = config.layer_types[layer]
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(f"layer {layer} has {kind!r} (layer_types): only full and sliding attention are supported")
        return config.sliding_window if kind == "sliding_attention" else None


class RotaryTypes(LayerTypes):
    """Every type of layer has its own rotary positions."""

    def rotary(self, layer: int, read: Reader) -> RotaryFrequencies:
        module, kind = self.model.model.rotary_emb, self.model.config.layer_types[layer]
        inverse = wide(getattr(module, f"{kind}_inv_freq"), read)
        return RotaryFrequencies(inverse, getattr(module, f"{kind}_attention_scaling"))


@register("seed_oss")
class SeedOss(Llama, code=modeling_seed_oss, family="SeedOss"):
    """Biases in attention."""


@register("mistral")
class Mistral(Llama, code=modeling_mistral, family="Mistral"):
    """One sliding window for all layers."""

    def window(self, layer: int) -> int | None:
        return self.model.config.sliding_window


@register("qwen2")
class Qwen2(LayerTypes, code=modeling_qwen2, family="Qwen2"):
    """Biases of queries, keys and values."""


@register("qwen3")
class Qwen3(LayerTypes, code=modeling_qwen3, family="Qwen3"):
    """Queries and keys are normed head by head."""

    query_norm, key_norm = "self_attn.q_norm", "self_attn.k_norm"


@register("ministral")
class Ministral(LayerTypes, code=modeling_ministral, family="Ministral"):
    """Heads may be wider than the rows that they come from."""


@register("cwm")
class Cwm(LayerTypes, code=modeling_cwm, family="Cwm"):
    """Sliding windows in most layers."""


@register("smollm3")
class SmolLM3(LayerTypes, code=modeling_smollm3, family="SmolLM3"):
    """Some layers know no positions."""

    def rotary(self, layer: int, read: Reader) -> Any:
        return super().rotary(layer, read) if self.layer(layer).self_attn.use_rope else None


@register("phi3")
class Phi3(Mistral, code=modeling_phi3, family="Phi3"):
    """One projection to queries, keys and values, one to gate and up."""

    projections = ("qkv_proj", "o_proj")
    mlp = ("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj")

    def inner(self, layer: Any, read: Reader) -> Rows:
        return read.product(layer.mlp.gate_up_proj.weight.chunk(2)[1], None)

    def gate(self, layer: Any, read: Reader) -> Linear:
        weight = layer.mlp.gate_up_proj.weight.chunk(2)[0]
        return read.product(weight, None, activation_of(layer.mlp.activation_fn))


@register("starcoder2")
class Starcoder2(Mistral, code=modeling_starcoder2, family="Starcoder2"):
    """LayerNorm, biases, and an MLP of two products."""

    norm_class = nn.LayerNorm
    mlp, activation = ("mlp.c_fc", "mlp.c_proj"), "mlp.act"


@register("granite")
class Granite(Llama, code=modeling_granite, family="Granite"):
    """Multipliers of embeddings, attention scores, contributions to the residual stream, and logits."""

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return embeddings * self.model.config.embedding_multiplier

    def final_norm(self, rows: Tensor) -> Tensor:
        """Scaled as well, so that the model's own unembedding gives its logits."""
        return super().final_norm(rows) / self.model.config.logits_scaling

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        scaled = partial(torch.mul, other=self.layer(layer).residual_multiplier)
        return replace(super().block(layer, dtype, device), attn_out=scaled, mlp_out=scaled)


@register("olmo2")
class Olmo2(Llama, code=modeling_olmo2, family="Olmo2"):
    """Norms only after attention and MLP, and over all queries and all keys of a token at once."""

    attn_in, attn_out, mlp_in, mlp_out = None, "post_attention_layernorm", None, "post_feedforward_layernorm"
    query_norm, key_norm = "self_attn.q_norm", "self_attn.k_norm"


@register("olmo3")
class Olmo3(RotaryTypes, Olmo2, code=modeling_olmo3, family="Olmo3"):
    """Sliding windows, and rotary positions for each type of layer."""


@register("gemma")
class Gemma(Llama, code=modeling_gemma, family="Gemma"):
    """Embeddings scaled inside their module, and norms whose weights are read as differences from one."""

    classes: ClassVar[dict[str, str | type]] = {"model.embed_tokens": "TextScaledWordEmbedding"}

    def norm(self, module: Any, read: Reader) -> Norm:
        return RMSNorm(1 + wide(module.weight, read), module.eps)


@register("gemma2")
class Gemma2(LayerTypes, Gemma, code=modeling_gemma2, family="Gemma2"):
    """Norms before and after attention and MLP, bounded attention scores and logits."""

    attn_in, attn_out = "input_layernorm", "post_attention_layernorm"
    mlp_in, mlp_out = "pre_feedforward_layernorm", "post_feedforward_layernorm"

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


@register("gemma3_text")
class Gemma3(RotaryTypes, Gemma2, code=modeling_gemma3, family="Gemma3"):
    """Gemma 3, text only: normed queries and keys, and attention scores that are never bounded, whatever the config
    says."""

    classes: ClassVar[dict[str, str | type]] = {**Gemma2.classes, "model": "TextModel"}
    query_norm, key_norm = "self_attn.q_norm", "self_attn.k_norm"

    def softcap(self) -> float | None:
        return None
