"""Which form of each operation is computed: the one place that chooses, by device, dtype and what is installed.

Every operation has a plain torch form, which defines it. Triton kernels (``kernels/fused``) are what CUDA devices get,
in float32 and narrower dtypes. flash-attn's kernels, for attention alone, are used where they are asked for.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from causalcone.kernels import adam, flash_attention, gathering, gating, log_sums, rotary, row_attention
from causalcone.kernels.norms import Norm

KERNELS, ATTENTION = "CAUSALCONE_KERNELS", "CAUSALCONE_ATTENTION"
"""Variables of the environment that force a backend, for all operations and for attention alone."""

NAMES = ("torch", "triton", "flash")
_NARROW = (torch.bfloat16, torch.float16)
_FUSED = (torch.float32, *_NARROW)


class BackendError(ValueError):
    """A backend that was asked for and cannot be used; the message names what is missing and what to do."""


@dataclass(frozen=True)
class FusedOperation:
    """An operation of ``kernels/fused``, whose module is imported when it is first called. No other form steps in where
    it fails: the error says how to choose one."""

    module: str
    name: str

    def __call__(self, *arguments: Any) -> Any:
        try:
            return getattr(import_module(f"causalcone.kernels.fused.{self.module}"), self.name)(*arguments)
        except Exception as error:
            error.add_note(f"This came from a Triton kernel of causalcone. {KERNELS}=torch computes without them.")
            raise


def _never(norm: Norm, width: int) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Backends:
    """The operations of a pass, each in the form chosen; those of torch define their arguments. ``fuses`` is whether a
    norm of rows of some width costs no trip through memory of its own, in ``gather_normed`` and in ``add_normed``."""

    attention: str = "torch"
    rows: str = "torch"
    """The names of the forms: of attention, and of the other operations."""
    attend_rows: Callable[..., None] = row_attention.attend_rows
    gather_normed: Callable[..., Tensor] = gathering.gather_normed
    add_rows: Callable[..., None] = gathering.add_rows
    add_normed: Callable[..., None] = gathering.add_normed
    turn: Callable[..., None] = rotary.turn
    gate: Callable[..., None] = gating.gate
    add_tile: Callable[..., None] = log_sums.add_tile
    step_weight: Callable[..., None] = adam.step_weight
    fuses: Callable[[Norm, int], bool] = _never


TORCH = Backends()

_ATTENTION: dict[str, Callable[..., None]] = {
    "torch": row_attention.attend_rows,
    "triton": FusedOperation("row_attention", "attend_rows"),
    "flash": flash_attention.attend_rows,
}
_ROWS = {
    "torch": TORCH,
    "triton": Backends(
        rows="triton",
        gather_normed=FusedOperation("gathering", "gather_normed"),
        add_rows=FusedOperation("gathering", "add_rows"),
        add_normed=FusedOperation("gathering", "add_normed"),
        turn=FusedOperation("rotary", "turn"),
        gate=FusedOperation("gating", "gate"),
        add_tile=FusedOperation("log_sums", "add_tile"),
        step_weight=FusedOperation("adam", "step_weight"),
        fuses=gathering.fuses,
    ),
}


def backends_of(attention: str, rows: str) -> Backends:
    """Attention in torch, triton or flash, and the other operations in torch or triton."""
    return replace(_ROWS[rows], attention=attention, attend_rows=_ATTENTION[attention])


def choose(device: torch.device, dtype: torch.dtype, kernels: str | None = None) -> Backends:
    """The backends for passes in ``dtype`` on a device.

    ``kernels`` forces one: ``"torch"``, ``"triton"``, or ``"flash"``, which is attention with flash-attn and the rest
    as by default. So do the variables CAUSALCONE_KERNELS, where no argument is given, and CAUSALCONE_ATTENTION, for
    attention whatever the others are. Float64 is computed in torch whatever is forced. Raises ``BackendError`` for one
    that is unknown, or that this machine, device or dtype lacks.
    """
    asked, by = (kernels, f"kernels={kernels!r}") if kernels is not None else _variable(KERNELS)
    of_attention, attention_by = _variable(ATTENTION)
    for name, source in ((asked, by), (of_attention, attention_by)):
        if name is not None:
            _check(name, source, device, dtype)
    if dtype not in _FUSED:
        return TORCH
    usual = "triton" if device.type == "cuda" and find_spec("triton") else "torch"
    rows = usual if asked in (None, "flash") else str(asked)
    return backends_of(of_attention or asked or usual, rows)


def _variable(name: str) -> tuple[str | None, str]:
    value = os.environ.get(name) or None
    return value, f"{name}={value}"


def _check(name: str, source: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``BackendError`` where a backend asked for cannot be used."""
    if name not in NAMES:
        raise BackendError(f"{source} is not a backend; choose from {', '.join(NAMES)}")
    if name == "torch" or dtype not in _FUSED:
        return
    if name == "triton":
        if not find_spec("triton"):
            raise BackendError(f"{source}, but Triton is not installed: pip install 'causalcone[kernels]', or torch")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendError(
                f"{source}, but Triton compiles for CUDA devices only and the device is {device.type}; choose torch, "
                "or set TRITON_INTERPRET=1 before Python starts to run the kernels slowly in Triton's interpreter"
            )
        return
    if not find_spec("flash_attn"):
        raise BackendError(f"{source}, but flash-attn is not installed: pip install 'causalcone[flash]', or triton")
    if device.type != "cuda":
        raise BackendError(f"{source}, but flash-attn runs on CUDA devices and this one is {device.type}; choose torch")
    if dtype not in _NARROW:
        raise BackendError(
            f"{source}, but flash-attn computes in bfloat16 and float16 and the dtype is {dtype}; choose triton, or "
            "another dtype"
        )
