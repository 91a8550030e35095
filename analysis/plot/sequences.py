"""Figures of sequences of edits: scores and the model's health by the number of edits made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from causalcone.analysis.plot import draw
from causalcone.analysis.sequences import GROUPS, HEALTH, SEQUENCE, with_health
from causalcone.analysis.tables.names import counted, heading, method_name
from causalcone.analysis.tables.traces import TableError

_KINDS = {"efficacy_score": "rewrite_p", "paraphrase_score": "paraphrase_p", "neighborhood_score": "neighborhood_p"}
"""Scores, with what is drawn where edits have none."""
_SHARES = ("_score", "_p", "_accuracy", "_exact_match")
_DASHES: dict[str, Any] = {"newest": "-", "earlier": "--", "model": "-"}
_TITLES = {"perplexity_ratio": "Perplexity / before", "relative_norm": "|change| / |weights|"}


def sequence(scores: pl.DataFrame, path: draw.PathLike | None = None, names: Sequence[str] | None = None) -> Figure:
    """Scores of edits in sequence, and the model's health, by the number of edits made: a panel for each metric, a row
    of panels for each problem, a colour for each method and window. Solid lines are of the newest batch, dashed ones of
    a sample of all edits before it; bars are 1.96 standard errors.

    Args:
        scores: as ``sequence_scores`` returns them.
        path: where the figure is written.
        names: of the metrics; by default efficacy, paraphrase and neighbourhood, perplexity of held-out text over
            that of the unedited model, and the norm of the change over that of the weights.

    Raises:
        TableError: a metric is not in the table, or there is no checkpoint.
    """
    rows = with_health(scores)
    known = set(rows["metric"])
    wanted = names or [*(name if name in known else other for name, other in _KINDS.items()), *HEALTH]
    shown = [name for name in wanted if name in known]
    if not shown or (names and shown != list(names)):
        raise TableError(f"no checkpoint has the metrics {', '.join({*wanted} - known)}; choose others")
    problems = rows["problem"].unique(maintain_order=True).to_list()
    settings = rows.select(SEQUENCE[1:]).unique(maintain_order=True).rows()
    colors = {setting: draw.LINES[number % len(draw.LINES)] for number, setting in enumerate(settings)}
    figure = draw.new_figure(max(5.2, 2.6 * len(shown) + 0.4), 2.4 * len(problems) + 1.1)
    grid = figure.subplots(len(problems), len(shown), squeeze=False, sharex=True)
    for line, problem in zip(grid, problems, strict=True):
        for axes, name in zip(line, shown, strict=True):
            _panel(axes, rows.filter(problem=problem, metric=name), colors)
            _scale(axes, name)
        if len(problems) > 1:
            line[0].set_ylabel(heading(problem), fontsize=9)
    for axes, name in zip(grid[0], shown, strict=True):
        axes.set_title(_TITLES.get(name, heading(name)), fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("edits made", fontsize=9)
    about = f"{heading(problems[0])}, " if len(problems) == 1 else ""
    draw.title(figure, f"{about}{counted(max(rows['edits']), 'edit')} in sequence".capitalize())
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=4.5, linewidth=1.6, label=_label(setting, settings))
        for setting, (color, marker) in colors.items()
    ]
    groups = [group for group in ("newest", "earlier") if group in set(rows["group"])]
    handles += [Line2D([], [], color="0.4", linestyle=_DASHES[group], label=GROUPS[group]) for group in groups]
    draw.legend(figure, 5, handles=handles, handlelength=3)
    return draw.finish(figure, path)


def _panel(axes: Axes, rows: pl.DataFrame, colors: dict[tuple[Any, ...], tuple[str, str]]) -> None:
    for (method, window, layer, group), line in rows.group_by(*SEQUENCE[1:], "group", maintain_order=True):
        color, marker = colors[method, window, layer]
        ordered = line.sort("edits")
        bars = 1.96 * ordered["se"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        look: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "linestyle": _DASHES[str(group)],
            "markersize": 4.5,
            "linewidth": 1.6,
        }
        axes.errorbar(ordered["edits"], ordered["post"], yerr=bars, capsize=2, elinewidth=0.9, **look)


def _scale(axes: Axes, name: str) -> None:
    draw.value_axis(axes)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.tick_params(axis="x", labelsize=8, length=3, color="0.4")
    if name.endswith(_SHARES):
        axes.set_ylim(-0.03, 1.05)
    elif name == "relative_norm":
        axes.set_ylim(bottom=0)
    elif name == "perplexity_ratio":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.9), max(high, 2.2))  # a small change is not to look like a large one
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _label(setting: tuple[str, int, int], settings: Sequence[tuple[str, int, int]]) -> str:
    method, window, layer = setting
    several = len({each[:2] for each in settings}) < len(settings)
    return method_name(method, window) + f", layer {layer}" * several
