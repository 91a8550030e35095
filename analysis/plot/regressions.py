"""Figures of regressions: bars of R^2, and scores against effects layer by layer."""

from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from causalcone.analysis.plot import draw
from causalcone.analysis.stats.correlations import layer_correlations
from causalcone.analysis.tables.names import COLORS, counted, heading, method_name
from causalcone.analysis.tables.traces import TableError

_COLUMNS = 4
_MOST_POINTS = 2000
_BARS: dict[str, Any] = {"layer": {"facecolor": COLORS["sky"]}, "both": {"facecolor": COLORS["orange"], "hatch": "///"}}


def r2_bars(regressions: pl.DataFrame, score: str = "rewrite", path: draw.PathLike | None = None) -> Figure:
    """R^2 of a score by problem and method: of the edit layer alone, and of layer and effect (Hase et al. 2023, Figs.
    6, 12, 13); what the effect adds is written above. ``regressions``: as the function of that name returns them;
    ``TableError`` where they have no R^2 of this score."""
    known = regressions.filter(pl.col("score") == score).drop_nulls("r2_layer")
    if known.is_empty():
        raise TableError(f"there is no R^2 of the {score} score to draw")
    problems = known["problem"].unique(maintain_order=True).to_list()
    figure = draw.new_figure(max(4.0, 2.3 * len(problems) + 0.6), 3.4)
    grid = figure.subplots(1, len(problems), squeeze=False, sharey=True)[0]
    for axes, problem in zip(grid, problems, strict=True):
        rows = known.filter(problem=problem)
        x_positions = np.arange(len(rows))
        for predictor, offset in (("layer", -0.2), ("both", 0.2)):
            height = rows[f"r2_{predictor}"].to_numpy()
            axes.bar(x_positions + offset, height, 0.4, edgecolor="black", linewidth=0.6, **_BARS[predictor])
        for x, row in zip(x_positions, rows.iter_rows(named=True), strict=True):
            look = {"textcoords": "offset points", "ha": "center", "fontsize": 6.5}
            axes.annotate(f"{row['diff']:+z.3f}", (x, row["r2_both"]), (0, 2), **look)
        names = [method_name(*row) for row in rows.select("method", "window").rows()]
        axes.set_xticks(x_positions, names, fontsize=8, rotation=30)
        axes.set_title(heading(problem), fontsize=9.5)
        axes.set_ylim(0, 1.08)
        draw.value_axis(axes)
    grid[0].set_ylabel("$R^2$", fontsize=9)
    facts = counted(int(known["facts"].to_numpy().max()), "fact")
    draw.title(figure, f"What explains the {score} score (edits of {facts})")
    labels = {"layer": "edit layer", "both": "edit layer and tracing effect"}
    draw.legend(figure, 2, handles=[Patch(edgecolor="black", label=labels[key], **bar) for key, bar in _BARS.items()])
    return draw.finish(figure, path)


def scatter_by_layer(
    table: pl.DataFrame,
    problem: str,
    method: str,
    window: int,
    score: str = "rewrite",
    *,
    effect: str = "tracing effect",
    path: draw.PathLike | None = None,
) -> Figure:
    """A score against the effect, a panel for each edit layer with the line on which both are equal and the correlation
    (Hase et al. 2023, Figs. 14-22). ``table``: as ``edits_with_effects`` returns it; of more than 2,000 edits at a
    layer evenly spaced ones are drawn. ``TableError`` where there is no such edit that has the score."""
    edits = table.filter(problem=problem, method=method, window=window).drop_nulls(score)
    if edits.is_empty():
        raise TableError(f"no edit by {method}-{window} of {problem} has the score {score} and an effect")
    correlations = layer_correlations(edits, [score])
    layers = correlations["layer"].to_list()
    columns = min(_COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure = draw.new_figure(2.1 * columns + 0.6, 2.1 * rows + 0.9)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, row in zip(grid.flat, correlations.iter_rows(named=True), strict=False):
        _panel(axes, edits.filter(layer=row["layer"]), score)
        rho = "no correlation" if row["correlation"] is None else f"$\\rho$ = {row['correlation']:z.2f}"
        axes.set_title(f"layer {row['layer']}, n = {row['edits']}: {rho}", fontsize=8.5)
    for axes in list(grid.flat)[len(layers) :]:
        axes.set_visible(False)
    for column in range(columns):
        lowest = max(number for number in range(len(layers)) if number % columns == column)
        grid.flat[lowest].set_xlabel(effect, fontsize=8.5)
        grid.flat[lowest].tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("rewrite magnitude" if score == "rewrite_magnitude" else f"{score} score", fontsize=8.5)
    draw.title(figure, f"{heading(problem)}, {method_name(method, window)}")
    return draw.finish(figure, path)


def _panel(axes: Axes, rows: pl.DataFrame, score: str) -> None:
    drawn = rows.gather_every(max(1, -(-len(rows) // _MOST_POINTS)))
    alpha = 0.7 if len(drawn) < 100 else 0.35
    effects = drawn["effect"].to_numpy()
    axes.scatter(effects, drawn[score].to_numpy(), s=9, color=COLORS["blue"], alpha=alpha, linewidths=0)
    axes.plot([0, 1], [0, 1], color=COLORS["vermilion"], linestyle="--", linewidth=1)
    axes.set_xlim(min(-0.04, float(effects.min())), max(1.04, float(effects.max())))
    axes.set_ylim(-1.04 if score == "rewrite_magnitude" else -0.04, 1.04)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7.5, length=2.5)
