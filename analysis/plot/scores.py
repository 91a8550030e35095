"""Figures of mean scores of edits by layer and method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from causalcone.analysis.plot import draw
from causalcone.analysis.scores import SCORES, mean_scores, refuse_unknown_scores
from causalcone.analysis.tables.names import METHODS, heading, position, window_name
from causalcone.analysis.tables.traces import TableError

_STYLES = draw.LINES[:6]
_DASHES = ("-", "--", ":")

_Setting = tuple[str, int]  # method and window


def scores(
    table: pl.DataFrame,
    names: Sequence[str] = ("rewrite", "paraphrase", "neighborhood"),
    path: draw.PathLike | None = None,
) -> Figure:
    """Mean scores by edited layer, one line per method and window with bars of 1.96 standard errors (Hase et al. 2023,
    Figs. 7-9): one panel per score of ``names``, and a row of panels per problem.

    Args:
        table: as ``analysis.scores`` returns it.
        names: of the scores.
        path: where the figure is written.

    Raises:
        TableError: a score is unknown, or no edit has it.
    """
    refuse_unknown_scores(names, "draw")
    means = mean_scores(table).filter(pl.col("score").is_in(list(names)) & (pl.col("n") > 0))
    absent = [name for name in names if means.filter(score=name).is_empty()]
    if absent:
        raise TableError(f"no edit of the table has the scores {', '.join(absent)}; choose others")
    problems = means["problem"].unique(maintain_order=True).to_list()
    styles = _styles(means)
    figure = draw.new_figure(max(5.2, 2.9 * len(names) + 0.4), 2.4 * len(problems) + 1.1)
    grid = figure.subplots(len(problems), len(names), squeeze=False, sharex=True)
    for row, problem in zip(grid, problems, strict=True):
        for axes, name in zip(row, names, strict=True):
            _panel(axes, means.filter(problem=problem, score=name), styles)
            axes.set_ylim(-1.05 if name == "rewrite_magnitude" else -0.03, 1.05)
            draw.layer_axis(axes, 1, draw.layer_count(means))
            axes.set_xlabel("")
        row[0].set_ylabel(heading(problem) if len(problems) > 1 else "mean score", fontsize=9)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title("Overall with essence" if name == "overall_essence" else heading(name), fontsize=10)
    for axes in grid[-1]:
        one = all(window == 1 for _, window in styles)
        axes.set_xlabel("edited layer" if one else "edited layer (centre of the window)", fontsize=9)
    about = heading(problems[0]) if len(problems) == 1 else "Scores of edits"
    scored = table.filter(pl.any_horizontal(pl.col(SCORES).is_not_null()))["fact_id"].n_unique()
    draw.title(figure, f"{about}, {draw.mean_of(scored)}")
    handles = [Line2D([], [], label=_label(setting), **style) for setting, style in styles.items()]
    draw.legend(figure, 4, handles=handles, handlelength=3)
    return draw.finish(figure, path)


def _styles(means: pl.DataFrame) -> dict[_Setting, dict[str, Any]]:
    """How the line of each method and window looks, in the methods' usual order, small windows first."""
    styles = {}
    settings = means.select("method", "window").unique().sort(position("method", METHODS), "method", "window")
    for number, setting in enumerate(settings.rows()):
        color, marker = _STYLES[number % len(_STYLES)]
        dash = _DASHES[number // len(_STYLES) % len(_DASHES)]
        styles[setting] = {"color": color, "marker": marker, "linestyle": dash, "markersize": 4.5, "linewidth": 1.6}
    return styles


def _panel(axes: Axes, means: pl.DataFrame, styles: dict[_Setting, dict[str, Any]]) -> None:
    for (method, window), style in styles.items():
        layers, values, bars = draw.by_layer(means.filter(method=method, window=window), "mean")
        axes.errorbar(layers, values, yerr=bars, capsize=2, elinewidth=0.9, label=_label((method, window)), **style)
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    draw.value_axis(axes)


def _label(setting: _Setting) -> str:
    method, window = setting
    return f"{METHODS.get(method, method)} ({window_name(window)})"
