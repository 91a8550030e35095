"""Large models with random weights: their configurations, and the same at toy size to try the scripts with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from workload import SHAPES, gpt2

from causalcone.engine.memory import free_bytes

GPTJ = {"n_layer": 28, "n_embd": 4096, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400, "n_positions": 2048}
LLAMA = {
    **{"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192},
}
TOY_GPT2 = {"n_layer": 3, "n_embd": 20, "n_head": 5, "vocab_size": 211}
TOY_GPTJ = {"n_layer": 2, "n_embd": 32, "n_head": 2, "rotary_dim": 8, "vocab_size": 223}
TOY_LLAMA = {
    **{"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 48, "vocab_size": 227},
}

MODELS = {
    "GPT-J-6B": ("gptj", GPTJ, TOY_GPTJ),
    "GPT2-XL": ("gpt2", SHAPES["GPT2-XL"], TOY_GPT2),
    "Llama-3-8B": ("llama", LLAMA, TOY_LLAMA),
}
"""By name: transformers' name of the architecture, what its configuration says, and what a toy's says."""


def shape_of(name: str, toy: bool) -> dict[str, int]:
    return MODELS[name][1 + toy]


def config_of(name: str, toy: bool) -> Any:
    kind, shape = MODELS[name][0], shape_of(name, toy)
    return gpt2(shape) if kind == "gpt2" else AutoConfig.for_model(kind, **shape)


def lacking(config: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the weights do not fit the device, if they do not."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    needed = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    free = free_bytes(device)
    if 1.3 * needed <= free:
        return None
    return f"its weights take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights rounded to ``dtype``, one after the other; the frequencies of its positions stay as
    they are, as in models that are loaded in ``dtype``."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
