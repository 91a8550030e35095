"""What to compute in, where, with how much memory, and by which kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from causalcone.engine.errors import ExperimentError
from causalcone.engine.memory import parse_bytes
from causalcone.kernels.backends import BackendError, Backends, choose

Kernels = Literal["torch", "triton", "flash"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How passes compute: in the model's own dtype and on its device where these are None, with half of the free memory
    where ``memory``, in bytes, is None, and by the usual kernels (``kernels/backends.py``) where ``kernels`` is None.
    tf32: float32 products in TF32 on CUDA devices."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None
    memory: int | None = None
    kernels: str | None = None
    tf32: bool = False

    @classmethod
    def of(
        cls,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: int | str | None = None,
        kernels: str | None = None,
        tf32: bool = False,
    ) -> Compute:
        """The same from names and texts, checked."""
        return cls(
            dtype=None if dtype is None else as_dtype(dtype),
            device=None if device is None else as_device(device),
            memory=None if memory is None else parse_bytes(memory),
            kernels=kernels,
            tf32=tf32,
        )


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype of torch from itself or its name."""
    named = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if named is None or named not in DTYPES.values():
        raise ExperimentError(f"dtype {dtype!r} is not supported; choose from {', '.join(DTYPES)}")
    return named


def as_device(device: torch.device | str) -> torch.device:
    """A device of torch that is there."""
    try:
        named = torch.device(device)
    except RuntimeError:
        raise ExperimentError(f"unknown device {device!r}; choose cpu, cuda, or cuda:N") from None
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise ExperimentError(f"there is no device {device}; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device()) if named == torch.device("cuda") else named


def as_backends(kernels: str | None, device: torch.device, dtype: torch.dtype) -> Backends:
    """Which kernels passes use (``kernels/backends.py``)."""
    try:
        return choose(device, dtype, kernels)
    except BackendError as error:
        raise ExperimentError(str(error)) from error
