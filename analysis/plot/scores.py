"""Figures of mean scores of edits by layer and method."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from causalcone.analysis.plot.parts import finish, layer_axis, layer_count, new_figure
from causalcone.analysis.scores import SCORES, mean_scores
from causalcone.analysis.tables.names import METHODS
from causalcone.analysis.tables.traces import TableError

PathLike = str | os.PathLike[str]

# Okabe and Ito's colours with a marker each, for print in grey.
_STYLES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#E69F00", "D"), ("#CC79A7", "v"), ("#56B4E9", "P"))
_DASHES = ("-", "--", ":")

_Setting = tuple[str, int]  # method and window


def scores(
    table: pl.DataFrame, names: Sequence[str] = ("rewrite", "paraphrase", "neighborhood"), path: PathLike | None = None
) -> Figure:
    """Mean scores by edited layer, one line per method and window with bars of 1.96 standard errors (Hase et al. 2023,
    Figs. 7-9): one panel per score of ``names``, and a row of panels per problem.

    ``table`` is what ``analysis.scores`` gives. Raises ``TableError`` for unknown scores, and for those no edit has.
    """
    unknown = [name for name in names if name not in SCORES]
    if unknown or not names:
        raise TableError(f"there are no scores {', '.join(unknown) or 'to draw'}; choose from {', '.join(SCORES)}")
    means = mean_scores(table).filter(pl.col("score").is_in(list(names)) & (pl.col("n") > 0))
    absent = [name for name in names if means.filter(score=name).is_empty()]
    if absent:
        raise TableError(f"no edit of the table has the scores {', '.join(absent)}; choose others")
    problems = means["problem"].unique(maintain_order=True).to_list()
    styles = _styles(means)
    figure = new_figure(max(5.2, 2.9 * len(names) + 0.4), 2.4 * len(problems) + 1.1)
    grid = figure.subplots(len(problems), len(names), squeeze=False, sharex=True)
    for row, problem in zip(grid, problems, strict=True):
        for axes, name in zip(row, names, strict=True):
            _panel(axes, means.filter(problem=problem, score=name), styles)
            axes.set_ylim(-1.05 if name == "rewrite_magnitude" else -0.03, 1.05)
            layer_axis(axes, 1, layer_count(means))
            axes.set_xlabel("")
        row[0].set_ylabel(_words(problem) if len(problems) > 1 else "mean score", fontsize=9)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title("Overall with essence" if name == "overall_essence" else _words(name), fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel(_layer_label(styles), fontsize=9)
    about = _words(problems[0]) if len(problems) == 1 else "Scores of edits"
    figure.suptitle(f"{about}, {_over(table)}", fontsize=11, fontweight="bold")
    handles = [Line2D([], [], label=_label(setting), **style) for setting, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False, handlelength=3)
    return finish(figure, path)


def _styles(means: pl.DataFrame) -> dict[_Setting, dict[str, Any]]:
    """How the line of each method and window looks, in the methods' usual order, small windows first."""
    usual = list(METHODS)

    def order(setting: _Setting) -> tuple[int, str, int]:
        method, window = setting
        return usual.index(method) if method in usual else len(usual), method, window

    styles = {}
    for number, setting in enumerate(sorted(means.select("method", "window").unique().rows(), key=order)):
        color, marker = _STYLES[number % len(_STYLES)]
        dash = _DASHES[number // len(_STYLES) % len(_DASHES)]
        styles[setting] = {"color": color, "marker": marker, "linestyle": dash, "markersize": 4.5, "linewidth": 1.6}
    return styles


def _panel(axes: Axes, means: pl.DataFrame, styles: dict[_Setting, dict[str, Any]]) -> None:
    for (method, window), style in styles.items():
        line = means.filter(method=method, window=window).sort("layer")
        bars = 1.96 * line["standard_error"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        layers, values = line["layer"].to_numpy(), line["mean"].to_numpy()
        axes.errorbar(layers, values, yerr=bars, capsize=2, elinewidth=0.9, label=_label((method, window)), **style)
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)


def _label(setting: _Setting) -> str:
    method, window = setting
    return f"{METHODS.get(method, method)} ({'one layer' if window == 1 else f'{window} layers'})"


def _layer_label(styles: dict[_Setting, dict[str, Any]]) -> str:
    return "edited layer" if all(window == 1 for _, window in styles) else "edited layer (centre of the window)"


def _words(name: str) -> str:
    """ "error_injection" as a heading."""
    return name.replace("_", " ").capitalize()


def _over(table: pl.DataFrame) -> str:
    scored = table.filter(pl.any_horizontal(pl.col(SCORES).is_not_null()))
    facts = scored["fact_id"].n_unique()
    return "one fact" if facts == 1 else f"mean of {facts} facts with 95 % intervals"
