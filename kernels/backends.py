"""Which form of each operation is computed: the one place that chooses, by device, dtype and what is installed.

Every operation has a plain torch form, which defines it. Triton kernels (``kernels/fused``) are what CUDA devices get,
in float32 and narrower dtypes. flash-attn's kernels, for attention alone, are used where they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from causalcone.kernels import adding, finetune_step, gathering, log_sums, row_attention
from causalcone.kernels.finetune_step import Moving
from causalcone.kernels.norms import Norm
from causalcone.kernels.row_attention import ScoreRule

KERNELS, ATTENTION = "CAUSALCONE_KERNELS", "CAUSALCONE_ATTENTION"
"""Variables of the environment that force a backend, for all operations and for attention alone."""

NAMES = ("torch", "triton", "flash")
_NARROW = (torch.bfloat16, torch.float16)
_FUSED = (torch.float32, *_NARROW)


class BackendError(ValueError):
    """A backend that was asked for and cannot be used; the message names what is missing and the mend."""


@dataclass(frozen=True)
class Backends:
    """The operations of a pass, each in the form chosen: ``attention`` torch, triton or flash, the others (``rows``)
    torch or triton. Arguments are those of the torch forms; ``tile`` is how many rows or keys those take at a time."""

    attention: str = "torch"
    rows: str = "torch"

    def attend_rows(
        self,
        queries: Tensor,
        keys_values: Tensor,
        query_rows: Tensor,
        key_rows: Tensor,
        tokens: tuple[int, ...],
        scoring: ScoreRule,
        out: Tensor,
        tile: int,
    ) -> None:
        """``row_attention.attend_rows``."""
        own = (queries, keys_values, query_rows, key_rows, tokens, scoring, out)
        if self.attention == "triton":
            with _kernel() as fused:
                fused("row_attention").attend_rows(*own)
        elif self.attention == "flash":
            from causalcone.kernels import flash_attention

            flash_attention.attend_rows(*own)
        else:
            row_attention.attend_rows(*own, tile)

    def gather_normed(self, rows: Tensor, index: Tensor, norm: Norm) -> Tensor:
        """``gathering.gather_normed``."""
        if not self.fuses(norm, rows.shape[1]):
            return gathering.gather_normed(rows, index, norm)
        with _kernel() as fused:
            return fused("gathering").gather_normed(rows, index, norm)

    def add_rows(
        self, left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor, out: Tensor, tile: int
    ) -> None:
        """``adding.add_rows``."""
        if self.rows == "torch":
            adding.add_rows(left, left_index, right, right_index, out, tile)
            return
        with _kernel() as fused:
            fused("adding").add_rows(left, left_index, right, right_index, out)

    def fuses(self, norm: Norm, width: int) -> bool:
        """Whether the norm of rows so wide costs no trip through memory of its own, in ``gather_normed`` and in
        ``add_normed``."""
        return self.rows == "triton" and gathering.fuses(norm, width)

    def add_normed(
        self,
        left: Tensor,
        left_index: Tensor,
        right: Tensor,
        right_index: Tensor,
        out: Tensor,
        index: Tensor,
        norm: Norm,
        normed: Tensor,
        tile: int,
    ) -> None:
        """``adding.add_normed``."""
        own = (left, left_index, right, right_index, out, index, norm, normed)
        if not self.fuses(norm, out.shape[1]):
            adding.add_normed(*own, tile)
            return
        with _kernel() as fused:
            fused("adding").add_normed(*own)

    def add_tile(
        self, logits: Tensor, start: int, softcap: float | None, targets: Tensor, total: Tensor, target_logits: Tensor
    ) -> None:
        """``log_sums.add_tile``."""
        own = (logits, start, softcap, targets, total, target_logits)
        if self.rows == "torch":
            log_sums.add_tile(*own)
            return
        with _kernel() as fused:
            fused("log_sums").add_tile(*own)

    def step_weight(self, weight: Moving, slopes: Tensor, keys: Tensor, lr: float, bound: float) -> None:
        """``finetune_step.step_weight``."""
        if self.rows == "torch":
            finetune_step.step_weight(weight, slopes, keys, lr, bound)
            return
        with _kernel() as fused:
            fused("finetune_step").step_weight(weight, slopes, keys, lr, bound)


TORCH = Backends()


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
    return Backends(of_attention or asked or usual, rows)


def _variable(name: str) -> tuple[str | None, str]:
    value = os.environ.get(name) or None
    return value, f"{name}={value}"


def _check(name: str, source: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``BackendError`` where a backend asked for cannot be used."""
    if name not in NAMES:
        raise BackendError(f"{source} is no backend; choose from {', '.join(NAMES)}")
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


@contextmanager
def _kernel() -> Iterator[Any]:
    """Finds a module of ``kernels/fused``. No other form steps in where a kernel fails: the error says how to choose
    one."""
    from importlib import import_module

    try:
        yield lambda name: import_module(f"causalcone.kernels.fused.{name}")
    except Exception as error:
        error.add_note(f"This came from a Triton kernel of causalcone. {KERNELS}=torch computes without them.")
        raise
