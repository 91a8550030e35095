"""Deltas as safetensors files, which any safetensors reader opens.

The tensors of layer 3 are ``layers.3.left`` and ``layers.3.right``, or ``layers.3.weight`` and, where there is one,
``layers.3.bias``. The metadata's ``causalcone.delta`` is JSON: ``version`` of this layout, ``layers`` (kind of change
by layer) and ``crc32`` (checksum of the raw bytes by tensor); all other metadata are the user's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, Dense, LowRank
from causalcone.engine.errors import ExperimentError

VERSION = 1
LAYOUT = "causalcone.delta"
_KINDS = {"low_rank": LowRank, "dense": Dense}


def save_delta(delta: Delta, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a delta and the user's ``metadata`` to a file, replacing the one of that name; folders are made as needed.

    It is written beside its place and moved there, so that what is stopped on the way leaves the old file or none.
    """
    from safetensors.torch import save

    path, own = Path(path), _checked(metadata or {})
    tensors = _tensors(delta)
    kinds = {cls: kind for kind, cls in _KINDS.items()}
    layout = {
        "version": VERSION,
        "layers": {str(layer): kinds[type(change)] for layer, change in delta.changes.items()},
        "crc32": {name: _crc32(tensor) for name, tensor in tensors.items()},
    }
    content = save(tensors, {**own, LAYOUT: json.dumps(layout)})
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ExperimentError(f"no delta can be written to {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def load_delta(path: str | Path) -> tuple[Delta, dict[str, str]]:
    """The delta of a file that ``save_delta`` wrote, on the CPU and in its dtypes, and the user's metadata."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ExperimentError(f"there is no delta file {path}; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except OSError as error:
        raise ExperimentError(f"the delta file {path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise ExperimentError(
            f"{path} is no delta file, or a damaged one ({error}); give a file that Delta.save wrote, or save it again"
        ) from error
    if LAYOUT not in metadata:
        raise ExperimentError(f"{path} is a safetensors file, but holds no delta; give one that Delta.save wrote")
    try:
        layout = json.loads(metadata.pop(LAYOUT))
        if layout["version"] <= VERSION:
            return _delta(layout, tensors), metadata
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExperimentError(f"the delta file {path} is damaged ({error}); save it again") from error
    raise ExperimentError(
        f"the delta file {path} has version {layout['version']} of its layout, and this causalcone knows up to "
        f"{VERSION}; update causalcone"
    )


def _checked(metadata: Mapping[str, str]) -> dict[str, str]:
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ExperimentError(
                f"the metadata {name!r} is {value!r}; give strings by name, such as JSON of the value"
            )
        if name == LAYOUT:
            raise ExperimentError(f"the metadata {name!r} is the layout's own; give it another name")
    return dict(metadata)


def _tensors(delta: Delta) -> dict[str, Tensor]:
    """What a file holds, by name: copies on the CPU, because safetensors refuses tensors that share their memory."""
    return {
        f"layers.{layer}.{field}": tensor.detach().to("cpu", copy=True).contiguous()
        for layer, change in delta.changes.items()
        for field, tensor in vars(change).items()
        if tensor is not None
    }


def _delta(layout: Any, tensors: dict[str, Tensor]) -> Delta:
    """Fails in many ways where the layout is not the one that ``save_delta`` writes."""
    if {name: _crc32(tensor) for name, tensor in tensors.items()} != layout["crc32"]:
        raise ValueError("its tensors are not those that were saved")
    changes: dict[int, LowRank | Dense] = {}
    for layer, kind in layout["layers"].items():
        beginning = f"layers.{layer}."
        own = {name.removeprefix(beginning): tensor for name, tensor in tensors.items() if name.startswith(beginning)}
        changes[int(layer)] = _KINDS[kind](**own)
    return Delta(changes)


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)
