"""Problems and methods of editing: their order, and what they are called in tables and figures."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

PROBLEMS = ("error_injection", "tracing_reversal", "fact_erasure", "fact_amplification", "fact_forcing")
METHODS = {"rome": "ROME", "memit": "MEMIT", "memit_joint": "joint MEMIT", "finetune": "FT"}


def method_name(method: str, window: int) -> str:
    """As papers do: FT-1 is fine-tuning of one layer."""
    return METHODS.get(method, method) + ("" if method == "rome" else f"-{window}")


def in_order(frame: pl.DataFrame) -> pl.DataFrame:
    """Problems and methods in the papers' order, small windows first; what is equal stays in its order."""
    return frame.sort(_place("problem", PROBLEMS), _place("method", tuple(METHODS)), "window", maintain_order=True)


def _place(column: str, names: Sequence[str]) -> pl.Expr:
    order = {name: number for number, name in enumerate(names)}
    return pl.col(column).replace_strict(order, default=len(names), return_dtype=pl.Int64)
