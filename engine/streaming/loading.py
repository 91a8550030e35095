"""Opening a saved model for streaming: its modules without weights, and its files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from causalcone.engine.errors import ModelError
from causalcone.engine.models import family_of
from causalcone.engine.models.reference import refuse_changed
from causalcone.engine.streaming.architecture import Streamed, put
from causalcone.engine.streaming.tensor_files import DTYPES, Entry, entries_of

_REMEDY = "load it with weights='resident'"


def open_streamed(path: str, config: Any, dtype: torch.dtype | None, device: torch.device) -> Streamed:
    """The model of a folder or hub id with this config, computed in ``dtype``, as saved by default.

    Raises ``ModelError`` for what cannot be streamed: no safetensors files, damaged ones, or ones of another layout.
    """
    family = family_of(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("the model is quantized; stream one with full-precision weights (no quantization_config)")
    saved = saved_tensors(path)
    if dtype is None:  # as transformers reads it off: the config's, or that of the first floating-point tensor
        named = getattr(config, "dtype", None)
        kinds = (entry.dtype for entry in saved.values() if entry.dtype in DTYPES.values())
        dtype = (getattr(torch, named) if isinstance(named, str) else named) or next(kinds, torch.float32)
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
            raise ModelError(f"the model saves the buffer {name}, which is not streamed; {_REMEDY}")
        put(model, name, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()
    return model.eval()


def saved_tensors(path: str) -> dict[str, Entry]:
    """All tensors of a model folder or hub id by their names in its safetensors files, in one file or in shards."""
    whole = _file(path, SAFE_WEIGHTS_NAME)
    if whole is not None:
        return entries_of(whole)
    index = _file(path, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise ModelError(
            f"{path!r} has no weights as safetensors ({SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}), which are "
            f"what can be streamed; save the model with save_pretrained, or {_REMEDY}"
        )
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is not an index of weight files: {error}") from error
    shards = {name: entries_of(_file(path, name) or index.with_name(name)) for name in sorted(set(places.values()))}
    for tensor, shard in places.items():
        if tensor not in shards[shard]:
            raise ModelError(f"{index} places the tensor {tensor!r} in {shard}, which does not hold it")
    return {tensor: shards[shard][tensor] for tensor, shard in places.items()}


def _file(path: str, name: str) -> Path | None:
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    cached = cached_file(path, name, **{f"_raise_exceptions_for_{kind}": False for kind in kinds})
    return None if cached is None else Path(cached)


def parameters_in(model: Any, saved: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensor of every parameter of a model, by the parameter's name.

    Files may lack the prefix of the base model (``transformer.``), use names that transformers changes as it loads
    them, and hold tied weights under one of their names. Raises ``ModelError`` naming what is missing, has another
    shape or a dtype that is not known, or is changed itself as transformers loads it.
    """
    saved = _renamed(model, saved)
    named = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[int, list[str]] = {}
    for name, parameter in named.items():
        tied.setdefault(id(parameter), []).append(name)
    entries, missing = {}, []
    for name, parameter in named.items():
        names = [name, *tied[id(parameter)]]
        short = [name.removeprefix(f"{model.base_model_prefix}.") for name in names]
        candidates = [candidate for pair in zip(names, short, strict=True) for candidate in pair]
        entry = next((saved[candidate] for candidate in candidates if candidate in saved), None)
        if entry is None:
            missing.append(name)
        else:
            _check(name, tuple(parameter.shape), entry)
            entries[name] = entry
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"the files of the model hold no tensor for {', '.join(missing[:3])}{more}; its layout is not one that can "
            f"be streamed: {_REMEDY}"
        )
    return entries


def _renamed(model: Any, saved: Mapping[str, Entry]) -> dict[str, Entry]:
    """Tensors by the names that transformers gives them as it loads the model."""
    transforms = get_model_conversion_mapping(model)
    renamed = {}
    for saved_name, entry in sorted(saved.items()):
        name = saved_name
        for transform in transforms:
            name, matched = transform.rename_source_key(name)
            if matched is not None and not isinstance(transform, WeightRenaming):
                raise ModelError(
                    f"transformers converts the tensor {saved_name!r} of {entry.path} as it loads it, but tensors are "
                    f"streamed as they are; {_REMEDY}"
                )
        renamed[name] = entry
    return renamed


def _check(name: str, shape: tuple[int, ...], entry: Entry) -> None:
    if entry.dtype not in DTYPES.values():
        raise ModelError(
            f"the tensor {entry.name!r} of {entry.path} has no dtype that can be streamed ({', '.join(DTYPES)}); "
            "quantized weights are not supported"
        )
    if entry.shape != shape:
        raise ModelError(
            f"the tensor {entry.name!r} of {entry.path} has the shape {list(entry.shape)}, where the config makes "
            f"{name} {list(shape)}; files and config.json are not of one model"
        )
