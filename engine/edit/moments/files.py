"""Moments as safetensors files, and those published with ROME.

The tensor of layer 5 is ``layers.5.moment`` (inner, inner). The metadata's ``causalcone.moments`` is JSON: ``version``
of this layout, ``tokens`` by layer, ``source``, ``identity`` (the fields of ``Identity``, or null) and ``crc32``
(checksum of the raw bytes by tensor).

A collection that is under way is kept in such a file too: the tensors are ``layers.5.sum``, the sums of k k^T so far,
of which the blocks from the diagonal on count, and the metadata are under ``causalcone.sums``: ``version``, ``tokens``
counted, ``ids`` (the CRC-32 of their ids as int64), ``of`` (what is collected, of which model) and ``crc32``.

A published file is numpy's ``.npz`` without pickled objects, one for each layer. It holds ``mom2.mom2``, the sum of
k k^T (inner, inner), and ``mom2.count``, the number of tokens.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.compute import as_dtype
from causalcone.engine.edit.moments.moments import Identity, Moments
from causalcone.engine.errors import ExperimentError
from causalcone.engine.models import ARCHITECTURES

VERSION = 1
LAYOUT = "causalcone.moments"
SUMS_LAYOUT = "causalcone.sums"
_DOWN_PROJECTIONS = [
    re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)") + "_")
    for pattern in sorted({architecture.down_projection for architecture in ARCHITECTURES.values()})
]


def save_moments(moments: Moments, path: str | Path, dtype: torch.dtype | str | None = None) -> None:
    """Write moments to a file, replacing the one of that name; folders are made as needed. ``Moments.save`` says more.

    It is written beside its place and moved there, so that what is stopped on the way leaves the old file or none.
    """
    wanted = None if dtype is None else as_dtype(dtype)
    own = {matrix.dtype for matrix in moments.matrices.values()}
    if wanted not in (None, torch.float32) and own != {wanted}:
        raise ExperimentError(f"these moments cannot be saved in {dtype}; leave dtype out, or choose float32")
    tensors = {f"layers.{layer}.moment": matrix.to("cpu", wanted) for layer, matrix in moments.matrices.items()}
    described = {
        "tokens": moments.tokens,
        "source": moments.source,
        "identity": None if moments.identity is None else asdict(moments.identity),
    }
    _write(Path(path), tensors, LAYOUT, described)


def save_sums(sums: Mapping[int, Tensor], tokens: int, ids: int, of: Mapping[str, Any], path: Path) -> None:
    """Write a collection that is under way, as ``save_moments`` does."""
    tensors = {f"layers.{layer}.sum": total.cpu() for layer, total in sums.items()}
    _write(path, tensors, SUMS_LAYOUT, {"tokens": tokens, "ids": ids, "of": of})


def load_sums(path: Path, of: Mapping[str, Any]) -> tuple[dict[int, Tensor], int, int]:
    """What ``save_sums`` wrote: sums by layer, tokens counted and the checksum of their ids. Raises ``ExperimentError``
    where another collection is kept there."""
    tensors, described = _read(path, SUMS_LAYOUT, None)
    for name, value in json.loads(json.dumps(of)).items():
        kept = described["of"].get(name)
        if kept != value:
            told = "" if name == "model" else f" ({kept}, not {value})"
            raise ExperimentError(
                f"{path} keeps a collection with another {name}{told}; go on as it was begun, or delete it"
            )
    return tensors, int(described["tokens"]), int(described["ids"])


def load_moments(path: str | Path | Mapping[int, str | Path], layers: int | Sequence[int] | None = None) -> Moments:
    """The moments of a file or files, as ``Moments.load`` says."""
    wanted = (layers,) if isinstance(layers, int) else None if layers is None else tuple(layers)
    if isinstance(path, Mapping):
        return _load_published({layer: Path(file) for layer, file in path.items()}, wanted)
    path = Path(path)
    if path.is_dir():
        return _load_published(_published_in(path), wanted)
    if path.suffix == ".npz":
        return _load_published({_only_layer(path, wanted): path}, wanted)
    return _load_own(path, wanted)


def _load_own(path: Path, wanted: tuple[int, ...] | None) -> Moments:
    tensors, described = _read(path, LAYOUT, wanted)
    try:
        identity = described["identity"]
        if identity is not None:
            by_layer = {int(layer): own for layer, own in identity.pop("fingerprints").items()}
            identity = Identity(**identity, fingerprints=by_layer)
        tokens = {layer: int(described["tokens"][str(layer)]) for layer in tensors}
        return Moments(tensors, tokens, described["source"], identity)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ExperimentError(f"the file {path} is damaged ({error}); collect the moments again") from error


def _write(path: Path, tensors: Mapping[str, Tensor], layout: str, described: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checksums = {name: _crc32(tensor) for name, tensor in tensors.items()}
    metadata = {layout: json.dumps({"version": VERSION, **described, "crc32": checksums})}
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata)
        partial.chmod(mode)  # that of any new file: safetensors lets nobody else read its own
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise ExperimentError(f"no moments can be written to {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, layout: str, wanted: tuple[int, ...] | None) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """The tensors by layer and the description of a file that ``_write`` wrote."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ExperimentError(f"there is no file of moments {path}; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get(layout)
            if described is None:
                what = "moments" if layout == LAYOUT else "collection under way"
                raise ExperimentError(f"{path} is a safetensors file, but holds no {what}; give another path")
            described = json.loads(described)
            if described["version"] > VERSION:
                raise ExperimentError(
                    f"the file {path} has version {described['version']} of its layout, and this causalcone knows "
                    f"versions up to {VERSION}; update causalcone"
                )
            names = {int(name.split(".")[1]): name for name in file.keys()}  # noqa: SIM118 (it is no dict)
            chosen = _chosen(path, names, wanted)
            tensors = {layer: file.get_tensor(names[layer]) for layer in chosen}
        for layer, tensor in tensors.items():
            if _crc32(tensor) != described["crc32"][names[layer]]:
                raise ValueError(f"the values of layer {layer} are not those that were saved")
    except OSError as error:
        raise ExperimentError(f"the file of moments {path} cannot be read: {error}") from error
    except ExperimentError:
        raise
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExperimentError(
            f"{path} is no file of moments, or a damaged one ({error}); collect the moments again"
        ) from error
    return tensors, described


def _chosen(path: Path, there: Mapping[int, Any], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers to read."""
    missing = [layer for layer in wanted or () if layer not in there]
    if missing:
        raise ExperimentError(
            f"{path} has no moment of layer {', '.join(map(str, missing))}, only of "
            f"{', '.join(map(str, sorted(there))) or 'none'}; collect it"
        )
    return tuple(sorted(there)) if wanted is None else wanted


def _load_published(files: Mapping[int, Path], wanted: tuple[int, ...] | None) -> Moments:
    folder = next(iter(files.values())).parent
    read = {layer: _read_published(files[layer]) for layer in _chosen(folder, files, wanted)}
    return Moments(
        matrices={layer: matrix for layer, (matrix, _) in read.items()},
        tokens={layer: count for layer, (_, count) in read.items()},
        source="/".join(folder.resolve().parts[-2:]),  # published as MODEL/DATASET_stats
    )


def _read_published(path: Path) -> tuple[Tensor, int]:
    """A moment, in float64 if its file is, else in float32, and of how many tokens it is."""
    if not path.is_file():
        raise ExperimentError(f"there is no file of moments {path}; check the path")
    try:
        with np.load(path, allow_pickle=False) as file:
            total, count = file["mom2.mom2"], int(file["mom2.count"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ExperimentError(
            f"{path} is no published second moment, or a damaged one ({error}); get it anew"
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
    """The layer of a single published file."""
    layer = _layer_of(path)
    if layer is not None:
        return layer
    if wanted is None or len(wanted) != 1:
        raise ExperimentError(f"the name of {path} does not tell its layer; give it as layers=17")
    return wanted[0]


def _layer_of(path: Path) -> int | None:
    """The layer that a published file's name tells, by the name of the down-projection at its beginning."""
    found = [match for pattern in _DOWN_PROJECTIONS if (match := pattern.match(path.name))]
    return int(found[0][1]) if found else None


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)
