"""Moments as safetensors files, and those published with ROME.

The tensor of layer 5 is ``layers.5.moment`` (inner, inner); its description has ``tokens`` by layer, ``source`` and
``identity`` (the fields of ``Identity``, or null).

An unfinished collection is a file too: the tensors are ``layers.5.sum``, the sums of k k^T so far, of which the blocks
from the diagonal on count; the description has ``tokens`` counted, ``ids`` (the CRC-32 of their ids as int64) and
``of`` (what is collected, of which model).

A published file is numpy's ``.npz`` without pickled objects, one for each layer. It holds ``mom2.mom2``, the sum of
k k^T (inner, inner), and ``mom2.count``, the number of tokens.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.compute import as_dtype
from causalcone.engine.edit.moments.identity import Identity
from causalcone.engine.errors import ExperimentError
from causalcone.engine.models import families
from causalcone.engine.tensor_file import Layout

MomentValues = tuple[Mapping[int, Tensor], Mapping[int, int], str | None, Identity | None]
"""The fields of ``Moments``: matrices and token counts by layer, the texts' source, and the model's identity."""

_MOMENTS = Layout(key="causalcone.moments", noun="moments", remedy="collect the moments again")
_SUMS = Layout(key="causalcone.sums", noun="partial sums", remedy="delete it to begin anew")


def write_moments(path: str | Path, values: MomentValues, dtype: torch.dtype | str | None) -> None:
    """Write moments to a file as ``Moments.save`` says, replacing the one of that name."""
    matrices, tokens, source, identity = values
    wanted = None if dtype is None else as_dtype(dtype)
    if wanted not in (None, torch.float32) and {matrix.dtype for matrix in matrices.values()} != {wanted}:
        raise ExperimentError(f"these moments cannot be saved in {dtype}; leave dtype out, or choose float32")
    tensors = {f"layers.{layer}.moment": matrix.to("cpu", wanted) for layer, matrix in matrices.items()}
    known = None if identity is None else asdict(identity)
    _MOMENTS.write(Path(path), tensors, {"tokens": tokens, "source": source, "identity": known})


def write_sums(sums: Mapping[int, Tensor], tokens: int, ids: int, of: Mapping[str, Any], path: Path) -> None:
    tensors = {f"layers.{layer}.sum": total.cpu() for layer, total in sums.items()}
    _SUMS.write(path, tensors, {"tokens": tokens, "ids": ids, "of": of})


def read_sums(path: Path, of: Mapping[str, Any]) -> tuple[dict[int, Tensor], int, int]:
    """Sums by layer, tokens counted and their ids' checksum, of ``write_sums``; refuses another collection's file."""
    sums, description = _read(path, _SUMS, None)
    for name, wanted in json.loads(json.dumps(of)).items():
        value = description["of"].get(name)
        if value != wanted:
            difference = "" if name == "model" else f" ({value}, not {wanted})"
            raise ExperimentError(
                f"{path} keeps a collection with another {name}{difference}; go on as it was begun, or delete it"
            )
    return sums, int(description["tokens"]), int(description["ids"])


def read_moments(path: str | Path | Mapping[int, str | Path], layers: int | Sequence[int] | None) -> MomentValues:
    """The moments of a file or files, as ``Moments.load`` says."""
    wanted = (layers,) if isinstance(layers, int) else None if layers is None else tuple(layers)
    if isinstance(path, Mapping):
        return _read_published_files({layer: Path(file) for layer, file in path.items()}, wanted)
    path = Path(path)
    if path.is_dir():
        return _read_published_files(_published_in(path), wanted)
    if path.suffix == ".npz":
        return _read_published_files({_only_layer(path, wanted): path}, wanted)
    matrices, description = _read(path, _MOMENTS, wanted)
    with _MOMENTS.reading(path):
        tokens = {layer: int(description["tokens"][str(layer)]) for layer in matrices}
        identity = description["identity"]
        if identity is not None:
            fingerprints = {int(layer): by_dtype for layer, by_dtype in identity.pop("fingerprints").items()}
            identity = Identity(**identity, fingerprints=fingerprints)
        return matrices, tokens, description["source"], identity


def _read(path: Path, layout: Layout, wanted: tuple[int, ...] | None) -> tuple[dict[int, Tensor], dict[str, Any]]:
    layers: dict[str, int] = {}

    def choose(names: list[str]) -> list[str]:
        with layout.reading(path):
            layers.update((name, int(name.split(".")[1])) for name in names)
        by_layer = {layer: name for name, layer in layers.items()}
        return [by_layer[layer] for layer in _chosen(path, by_layer, wanted)]

    tensors, description, _ = layout.read(path, choose)
    return {layers[name]: tensor for name, tensor in tensors.items()}, description


def _chosen(path: Path, available: Mapping[int, Any], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    missing = [layer for layer in wanted or () if layer not in available]
    if missing:
        raise ExperimentError(
            f"{path} has no moment of layer {', '.join(map(str, missing))}, only of "
            f"{', '.join(map(str, sorted(available))) or 'none'}; collect it"
        )
    return tuple(sorted(available)) if wanted is None else wanted


def _read_published_files(files: Mapping[int, Path], wanted: tuple[int, ...] | None) -> MomentValues:
    folder = next(iter(files.values())).parent
    read = {layer: _read_published(files[layer]) for layer in _chosen(folder, files, wanted)}
    matrices = {layer: matrix for layer, (matrix, _) in read.items()}
    tokens = {layer: count for layer, (_, count) in read.items()}
    return matrices, tokens, "/".join(folder.resolve().parts[-2:]), None  # published as MODEL/DATASET_stats


def _read_published(path: Path) -> tuple[Tensor, int]:
    """A moment, in float64 if its file is, else in float32, and of how many tokens it is."""
    if not path.is_file():
        raise ExperimentError(f"there is no moments file {path}; check the path")
    try:
        with np.load(path, allow_pickle=False) as file:
            total, count = file["mom2.mom2"], int(file["mom2.count"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ExperimentError(
            f"{path} is not a published second moment, or is damaged ({error}); get it anew"
        ) from error
    square = total.ndim == 2 and total.shape[0] == total.shape[1]
    if not square or count < 1 or total.dtype.kind != "f" or not np.isfinite(total).all():
        raise ExperimentError(
            f"{path} holds {total.shape} values in {total.dtype}, summed over {count} tokens, or values that are not "
            "finite; get it anew"
        )
    return torch.from_numpy(total.astype(np.promote_types(total.dtype, np.float32), copy=False) / count), count


def _published_in(folder: Path) -> dict[int, Path]:
    """By layer, the published files of a folder; files whose names do not tell their layer are left out."""
    files: dict[int, Path] = {}
    for file in sorted(folder.glob("*.npz")):
        layer = _layer_of(file)
        if layer is None:
            continue
        if layer in files:
            raise ExperimentError(
                f"{folder} has two moments of layer {layer}, {files[layer].name} and {file.name}; "
                "give those to be read, by layer"
            )
        files[layer] = file
    if not files:
        raise ExperimentError(
            f"the folder {folder} has no published moments (such as "
            "transformer.h.17.mlp.c_proj_float32_mom2_100000.npz); check the path"
        )
    return files


def _only_layer(path: Path, wanted: tuple[int, ...] | None) -> int:
    layer = _layer_of(path)
    if layer is not None:
        return layer
    if wanted is None or len(wanted) != 1:
        raise ExperimentError(f"the name of {path} does not tell its layer; give it as layers=17")
    return wanted[0]


def _layer_of(path: Path) -> int | None:
    """The layer that a published file's name tells, by the name of the down-projection at its beginning."""
    for name in sorted({family.down_projection for family in families().values()}):
        if match := re.match(re.escape(name).replace(r"\{\}", r"(\d+)") + "_", path.name):
            return int(match[1])
    return None
