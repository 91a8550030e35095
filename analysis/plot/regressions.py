"""Figures of what explains edit success: bars of R^2, and scores against effects layer by layer."""

from __future__ import annotations

import os

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from causalcone.analysis.plot.parts import finish, new_figure
from causalcone.analysis.stats.correlations import layer_correlations
from causalcone.analysis.tables.names import method_name
from causalcone.analysis.tables.traces import TableError

PathLike = str | os.PathLike[str]

_COLUMNS = 4
_MOST_POINTS = 2000


def r2_bars(regressions: pl.DataFrame, score: str = "rewrite", path: PathLike | None = None) -> Figure:
    """R^2 of a score by problem and method: of the edit layer alone, and of layer and effect (Hase et al. 2023, Figs.
    6, 12, 13); what the effect adds is written above. ``regressions`` is what the function of that name gives.

    Raises ``TableError`` where it has no R^2 of this score.
    """
    own = regressions.filter(pl.col("score") == score).drop_nulls("r2_layer")
    if own.is_empty():
        raise TableError(f"there is no R^2 of the {score} score to draw")
    problems = own["problem"].unique(maintain_order=True).to_list()
    figure = new_figure(max(4.0, 2.3 * len(problems) + 0.6), 3.4)
    grid = figure.subplots(1, len(problems), squeeze=False, sharey=True)[0]
    for axes, problem in zip(grid, problems, strict=True):
        rows = own.filter(problem=problem)
        place = np.arange(len(rows))
        axes.bar(place - 0.2, rows["r2_layer"].to_numpy(), 0.4, color="#56B4E9", edgecolor="black", linewidth=0.6)
        axes.bar(
            place + 0.2, rows["r2_both"].to_numpy(), 0.4, color="#E69F00", edgecolor="black", linewidth=0.6, hatch="///"
        )
        for x, row in zip(place, rows.iter_rows(named=True), strict=True):
            axes.annotate(
                f"{row['diff']:+z.3f}", (x, row["r2_both"]), (0, 2), textcoords="offset points", ha="center",
                fontsize=6.5,
            )  # fmt: skip
        axes.set_xticks(
            place, [method_name(*row) for row in rows.select("method", "window").rows()], fontsize=8, rotation=30
        )
        axes.set_title(problem.replace("_", " ").capitalize(), fontsize=9.5)
        axes.set_ylim(0, 1.08)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", labelsize=8)
    grid[0].set_ylabel("$R^2$", fontsize=9)
    figure.suptitle(f"What explains the {score} score", fontsize=11, fontweight="bold")
    handles = [
        Patch(facecolor="#56B4E9", edgecolor="black", label="edit layer"),
        Patch(facecolor="#E69F00", edgecolor="black", hatch="///", label="edit layer and tracing effect"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return finish(figure, path)


def scatter_by_layer(
    table: pl.DataFrame,
    problem: str,
    method: str,
    window: int,
    score: str = "rewrite",
    *,
    effect: str = "tracing effect",
    path: PathLike | None = None,
) -> Figure:
    """A score against the effect, a panel for each edit layer with the line on which both are equal and the correlation
    (Hase et al. 2023, Figs. 14-22). ``table`` is what ``edits_with_effects`` gives; of more than 2,000 edits at a
    layer evenly spaced ones are drawn.

    Raises ``TableError`` where there is no such edit that has the score.
    """
    own = table.filter(problem=problem, method=method, window=window).drop_nulls(score)
    if own.is_empty():
        raise TableError(f"no edit by {method}-{window} of {problem} has the score {score} and an effect")
    found = layer_correlations(own, [score])
    layers = found["layer"].to_list()
    columns = min(_COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(2.1 * columns + 0.6, 2.1 * rows + 0.9)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, told in zip(grid.flat, found.iter_rows(named=True), strict=False):
        _panel(axes, own.filter(layer=told["layer"]), score)
        rho = "no correlation" if told["correlation"] is None else f"$\\rho$ = {told['correlation']:z.2f}"
        axes.set_title(f"layer {told['layer']}: {rho}", fontsize=8.5)
    for axes in list(grid.flat)[len(layers) :]:
        axes.set_visible(False)
    for column in range(columns):
        lowest = max(number for number in range(len(layers)) if number % columns == column)
        grid.flat[lowest].set_xlabel(effect, fontsize=8.5)
        grid.flat[lowest].tick_params(labelbottom=True)
    for row in grid:
        row[0].set_ylabel("rewrite magnitude" if score == "rewrite_magnitude" else f"{score} score", fontsize=8.5)
    title = f"{problem.replace('_', ' ').capitalize()}, {method_name(method, window)}"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return finish(figure, path)


def _panel(axes: Axes, rows: pl.DataFrame, score: str) -> None:
    step = max(1, -(-len(rows) // _MOST_POINTS))
    drawn = rows.gather_every(step)
    alpha = 0.7 if len(drawn) < 100 else 0.35
    axes.scatter(drawn["effect"].to_numpy(), drawn[score].to_numpy(), s=9, color="#0072B2", alpha=alpha, linewidths=0)
    axes.plot([0, 1], [0, 1], color="#D55E00", linestyle="--", linewidth=1)
    effects = drawn["effect"].to_numpy()
    axes.set_xlim(min(-0.04, float(effects.min())), max(1.04, float(effects.max())))
    axes.set_ylim(-1.04 if score == "rewrite_magnitude" else -0.04, 1.04)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7.5, length=2.5)
