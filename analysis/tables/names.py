"""Problems and methods of editing: their order and names in tables and figures; and the colours of lines."""

from collections.abc import Iterable

import polars as pl

from causalcone.engine.schemas import PROBLEMS

METHODS = {
    "rome": "ROME",
    "r-rome": "R-ROME",
    "p-rome": "p-ROME",
    "memit": "MEMIT",
    "memit_joint": "joint MEMIT",
    "memit-seq": "MEMIT-seq",
    "memit-merge": "MEMIT-Merge",
    "emmet": "EMMET",
    "alphaedit": "AlphaEdit",
    "encore": "ENCORE",
    "ultraedit": "UltraEdit",
    "finetune": "FT",
    "ft-m": "FT-M",
    "locft": "LocFT",
}
"""Names of methods in the papers' order; other methods go by the name that tables have, after these."""

_LONG = {**METHODS, "finetune": "fine-tuning"}
_OF_ONE_LAYER = ("rome", "r-rome", "p-rome", "emmet")

SEVERED = {"mlp": "MLP outputs", "attn": "attention outputs", "both": "both outputs"}
"""Modules that tracing severs: methods are called ``sever_`` and one of these."""

# Okabe and Ito's colours, told apart by all kinds of colour vision.
COLORS = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
}


def method_name(method: str, window: int) -> str:
    """As papers do: FT-1 is fine-tuning of one layer."""
    return METHODS.get(method, method) + ("" if method in _OF_ONE_LAYER else f"-{window}")


def long_name(method: str, window: int) -> str:
    """In words, such as "fine-tuning of 5 layers"."""
    return _LONG.get(method, method) + ("" if method in _OF_ONE_LAYER else f" of {window_name(window)}")


def words(name: str) -> str:
    """ "error_injection" in words."""
    return name.replace("_", " ")


def counted(count: int, noun: str) -> str:
    """ "1 fact", "2 facts"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def heading(name: str) -> str:
    """ "error_injection" as a heading."""
    return words(name).capitalize()


def window_name(size: int) -> str:
    """The layers of a window in words."""
    return "one layer" if size == 1 else f"{size} layers"


def in_order(frame: pl.DataFrame) -> pl.DataFrame:
    """Problems and methods in the papers' order, small windows first; equal rows stay in their order."""
    by = position("problem", PROBLEMS), position("method", METHODS), "method", "window"
    return frame.sort(*by, maintain_order=True)


def position(column: str, names: Iterable[str]) -> pl.Expr:
    """Positions of a column's names in a list of them, to sort by; unknown ones come last."""
    order = {name: number for number, name in enumerate(names)}
    return pl.col(column).replace_strict(order, default=len(order), return_dtype=pl.Int64)
