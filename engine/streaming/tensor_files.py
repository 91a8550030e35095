"""Tensors in safetensors files: where they lie, and reading parts of them into memory that is at hand.

Files are read, not mapped: mapped pages would count as memory of this process.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from causalcone.engine.errors import ModelError
from causalcone.kernels.tiles import pieces

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CONVERTED = 2**15 - 64
"""Values converted at once: torch takes no more threads for so few, which the pass needs itself."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its name there, dtype and shape, and the byte at which it begins."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


def entries_of(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Raises ``ModelError`` naming the file, and the tensor, where it is damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length)) if length <= size - 8 else None
    except FileNotFoundError:
        raise ModelError(f"the weight file {path} is missing; load the model's files again") from None
    except OSError as error:
        raise ModelError(f"the weight file {path} cannot be read: {error}") from error
    except (struct.error, ValueError):
        header = None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is not a safetensors file, or a truncated one; load the model's files again")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, fields, 8 + length, size) for name, fields in header.items()}


def _entry(path: Path, name: str, fields: dict[str, object], base: int, size: int) -> Entry:
    try:
        dtype, shape = str(fields["dtype"]), tuple(map(int, fields["shape"]))  # type: ignore[call-overload]
        begin, end = map(int, fields["data_offsets"])  # type: ignore[call-overload]
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path} does not say where its tensor {name!r} lies; load the model's files again") from None
    if base + end > size:
        raise ModelError(f"{path} ends before its tensor {name!r} does (truncated); load the model's files again")
    entry = Entry(path, name, DTYPES.get(dtype, torch.uint8), shape, base + begin)
    if dtype in DTYPES and entry.bytes != end - begin:
        raise ModelError(f"{path} holds {end - begin} bytes of its tensor {name!r} where its shape needs {entry.bytes}")
    return entry


def read_values(entry: Entry, parts: Sequence[tuple[int, Tensor]]) -> None:
    """Fill contiguous CPU tensors (n,) with n values of the tensor each, from its value ``first`` on, converted to
    their dtype: ``parts`` are pairs of ``first`` and such a tensor."""
    try:
        with entry.path.open("rb", buffering=0) as file:
            for first, out in parts:
                file.seek(entry.start + first * entry.dtype.itemsize)
                if out.dtype == entry.dtype:
                    _fill(file, out, entry)
                    continue
                as_saved = torch.empty(min(len(out), _CONVERTED), dtype=entry.dtype)
                for piece in pieces(len(out), _CONVERTED, out.device):
                    values = out[piece]
                    _fill(file, as_saved[: len(values)], entry)
                    values.copy_(as_saved[: len(values)])
    except FileNotFoundError:
        raise ModelError(f"the weight file {entry.path} is gone, with its tensor {entry.name!r}") from None
    except OSError as error:
        raise ModelError(f"the tensor {entry.name!r} of {entry.path} cannot be read: {error}") from error


def read_tensor(entry: Entry, dtype: torch.dtype) -> Tensor:
    """The whole tensor, on the CPU."""
    flat = torch.empty(entry.elements, dtype=dtype)
    read_values(entry, [(0, flat)])
    return flat.view(entry.shape)


def read_rows(entry: Entry, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Rows (R, width) of a matrix, by ascending numbers of which each is there once; neighbours are read at once."""
    width = entry.shape[1]
    out = torch.empty(len(rows), width, dtype=dtype)
    starts = [index for index, row in enumerate(rows) if index == 0 or row != rows[index - 1] + 1]
    ends = [*starts[1:], len(rows)]
    read_values(entry, [(rows[a] * width, out[a:b].view(-1)) for a, b in zip(starts, ends, strict=False)])
    return out


def _fill(file: object, out: Tensor, entry: Entry) -> None:
    buffer = memoryview(out.view(torch.uint8).numpy().data)
    while len(buffer):
        count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise ModelError(f"{entry.path} ends before its tensor {entry.name!r} does (truncated)")
        buffer = buffer[count:]
