"""Opening a saved model for streaming: its modules without weights, and its files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from causalcone.engine.errors import ModelError
from causalcone.engine.models import family_of
from causalcone.engine.models.reference import refuse_changed
from causalcone.engine.streaming.architecture import Streamed
from causalcone.engine.streaming.checkpoint import MEND, parameters_in, saved_dtype, saved_tensors


def open_streamed(path: str, config: Any, dtype: torch.dtype | None, device: torch.device) -> Streamed:
    """The model of a folder or hub id with this config, computed in ``dtype``, as saved by default.

    Raises ``ModelError`` for what cannot be streamed: no safetensors files, damaged ones, or ones of another layout.
    """
    family = family_of(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("the model is quantized; stream one with full-precision weights (no quantization_config)")
    saved = saved_tensors(path)
    dtype = dtype or _as_dtype(getattr(config, "dtype", None)) or saved_dtype(saved)
    model = _without_weights(config, dtype)
    refuse_changed(model, family.modules)
    return Streamed(family(model), parameters_in(model, saved), dtype, device)


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    """The model with parameters on the meta device and buffers as transformers computes them, on the CPU."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # what transformers itself marks loaded weights with
    saved = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        if name in saved:
            raise ModelError(f"the model saves the buffer {name}, which is not streamed; {MEND}")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()
    return model.eval()


def _as_dtype(dtype: Any) -> torch.dtype | None:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
