"""Small random models of every supported family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.models import gpt2, randomised, tokenizer

Builder = Callable[..., PreTrainedModel]


def like_llama(kind: str, **options: Any) -> Builder:
    """Builds models of a family whose config has Llama's names; ``options`` are the family's own."""

    def build(
        layers: int = 4,
        width: int = 32,
        heads: int = 4,
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        positions: int = 64,
        **config: Any,
    ) -> PreTrainedModel:
        shape = {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": 2 * width + 8,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2 if heads % 2 == 0 else 1,
            "max_position_embeddings": positions,
            "vocab_size": len(tokenizer()),
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return randomised(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **options, **config})), dtype, seed
        )

    return build


def gpt_neo(layers: int = 4, *args: Any, **config: Any) -> PreTrainedModel:
    """GPT-Neo, whose odd layers see a window of tokens."""
    config = {"attention_types": [[["global", "local"][n % 2 : n % 2 + 1], 1] for n in range(layers)], **config}
    return like_llama("gpt_neo", window_size=4)(layers, *args, **config)


FAMILIES: dict[str, Builder] = {
    "gpt2": gpt2,
    "llama": like_llama("llama"),
    "mistral": like_llama("mistral", sliding_window=4),
    "ministral": like_llama("ministral", sliding_window=4, head_dim=6),
    "qwen2": like_llama("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": like_llama("qwen3", head_dim=10),
    "seed_oss": like_llama("seed_oss", head_dim=6),
    "cwm": like_llama("cwm", sliding_window=4, head_dim=8),
    "smollm3": like_llama("smollm3", no_rope_layer_interval=2),
    "granite": like_llama(
        "granite", embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.6, logits_scaling=0.7
    ),
    "olmo2": like_llama("olmo2"),
    "olmo3": like_llama("olmo3", sliding_window=4),
    "phi3": like_llama("phi3", sliding_window=5),
    "starcoder2": like_llama("starcoder2", sliding_window=5),
    "gemma": like_llama("gemma", head_dim=10),
    "gemma2": like_llama(
        "gemma2",
        head_dim=10,
        sliding_window=4,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
    ),
    "gemma3_text": like_llama(
        "gemma3_text", head_dim=10, sliding_window=4, query_pre_attn_scalar=5, sliding_window_pattern=2
    ),
    "gpt_neo": gpt_neo,
    "gpt_neox": like_llama("gpt_neox", rotary_pct=0.5),
    "gptj": like_llama("gptj", rotary_dim=4),
    "opt": like_llama("opt", ffn_dim=72),
    "phi": like_llama("phi"),
}
"""By name: builds a random model of so many layers, of this width and number of heads, in a ``dtype`` and from a
``seed``; other keywords are options of its config."""


def quick_first(families: Iterable[str], quick: Sequence[str]) -> list[Any]:
    """Parameters of a test of families: all but the ``quick`` ones are marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in families]


EVERY_FAMILY = quick_first(FAMILIES, ("gpt2", "llama", "gptj", "gemma2"))
"""Quick are sequential and parallel layers, rotary positions, soft caps and windows, and norms on either side."""
