"""Figures of traces: token-by-layer heat maps of one fact, and average indirect effects by token role.

Every function returns its matplotlib ``Figure`` and writes it to ``path`` where one is given (the suffix chooses the
format; missing folders are made). No display and no pyplot state is used.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from causalcone.analysis.figure_parts import (
    KIND_COLORS,
    State,
    drawable,
    finish,
    layer_axis,
    layer_count,
    new_figure,
    plain,
    rows_of,
    state_title,
    states_of,
    visible_token,
)
from causalcone.analysis.role_plot import indirect_effect
from causalcone.analysis.tables import TableError, TraceSource, as_traces

__all__ = ["heatmap", "heatmaps", "indirect_effect"]

PathLike = str | os.PathLike[str]

_COLUMNS = 3
_POINT = 1 / 72


def heatmap(
    table: TraceSource,
    fact_id: str,
    kind: str = "hidden",
    window: int = 1,
    *,
    method: str = "restore",
    path: PathLike | None = None,
) -> Figure:
    """Token-by-layer heat map of p_patched for one fact and one restored state (Meng et al. 2022, Figs. 1 and 10).

    Rows are the prompt's tokens in order, the subject's in bold with an asterisk and a bracket; columns are layers,
    for windows the centre layer. Colours run from p_corrupted to the larger of p_clean and the largest p_patched.
    Raises ``TableError`` naming what there is where the table holds no such fact or state.
    """
    fact = _traces_of(table, fact_id)
    wanted, present = (method, kind, window), states_of(fact)
    if wanted not in present:
        raise TableError(f"fact {fact_id!r} has no {_name(wanted)}; it has {', '.join(map(_name, present))}")
    return finish(_draw(rows_of(fact, wanted)), path)


def heatmaps(table: TraceSource, fact_id: str, path: PathLike | None = None) -> Figure:
    """``heatmap`` of every state of a fact, side by side, on one scale."""
    return finish(_draw(_traces_of(table, fact_id)), path)


def _traces_of(table: TraceSource, fact_id: str) -> pl.DataFrame:
    traces = as_traces(table).filter(pl.col("method") != "zero")
    fact = traces.filter(pl.col("fact_id") == str(fact_id))
    if fact.is_empty():
        known = traces["fact_id"].unique(maintain_order=True)
        more = ", ..." if len(known) > 10 else ""
        raise TableError(f"no traces of fact {fact_id!r}; there are {', '.join(map(repr, known[:10]))}{more}")
    return fact


def _name(state: State) -> str:
    method, kind, window = state
    return f"{kind}:{window}" if method == "restore" else f"{kind}:{window} ({method})"


def _draw(fact: pl.DataFrame) -> Figure:
    """One map for every state in the rows of one fact."""
    states = states_of(fact)
    tokens = fact.select("token", "token_text", "subject_start", "subject_end").unique("token").sort("token")
    layers = layer_count(fact)
    columns = min(len(states), _COLUMNS)
    rows = -(-len(states) // columns)
    map_width, map_height = min(5.2, max(2.4, 0.15 * layers)), max(1.3, 0.21 * len(tokens))
    longest = max(len(visible_token(text or "")) for text in tokens["token_text"])
    width = columns * (map_width + 1.3) + 0.4 + 0.09 * longest
    figure = new_figure(width, rows * (map_height + 0.8) + 0.6)

    shown = textwrap.fill(_prompt(tokens), int(width * 9), max_lines=3, placeholder=" …")
    figure.suptitle(shown, **plain(11, fontweight="bold"))
    scale = Normalize(*_limits(fact))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, (axes, state) in enumerate(zip(grid, states, strict=False)):
        _, kind, window = state
        values = _grid(rows_of(fact, state), tokens["token"].to_list(), layers)
        mesh = _draw_map(axes, values, scale, KIND_COLORS.get(kind, "Blues"))
        axes.set_title(state_title(state), fontsize=10)
        layer_axis(axes, window, layers)
        _label_tokens(figure, axes, tokens, labels=place % columns == 0)
        _color_bar(figure, axes, mesh, fact)
    for axes in grid[len(states) :]:
        axes.set_visible(False)
    return figure


def _prompt(tokens: pl.DataFrame) -> str:
    texts = tokens["token_text"].fill_null("").to_list()
    glue = "" if any(text[:1] in (" ", "▁") for text in texts) else " "  # some tokenizers drop each token's space
    return drawable(glue.join(texts).replace("▁", " ").replace("\n", "↵").strip())


def _grid(cells: pl.DataFrame, tokens: Sequence[int], layers: int) -> NDArray[np.float64]:
    """p_patched as (tokens, layers), NaN where the table has no row."""
    values = np.full((len(tokens), layers), np.nan)
    row = {token: place for place, token in enumerate(tokens)}
    for token, layer, value in cells.select("token", "layer", "p_patched").iter_rows():
        values[row[token], layer] = value
    return values


def _limits(fact: pl.DataFrame) -> tuple[float, float]:
    low, clean = float(fact["p_corrupted"][0]), float(fact["p_clean"][0])
    return low, max(clean, float(fact["p_patched"].to_numpy().max()), low + 1e-9)


def _draw_map(axes: Axes, values: NDArray[np.float64], scale: Normalize, colors: str) -> QuadMesh:
    tokens, layers = values.shape
    mesh = axes.pcolormesh(
        np.arange(layers + 1) - 0.5,
        np.arange(tokens + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=colors,
        norm=scale,
        edgecolors="white",
        linewidth=0.4,
    )
    if np.isnan(values).any():  # what was not computed must not look like a low probability
        axes.patch.set(facecolor="0.95", hatch="////", edgecolor="0.8")
    axes.set_ylim(tokens - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    return mesh


def _label_tokens(figure: Figure, axes: Axes, tokens: pl.DataFrame, labels: bool) -> None:
    """Token texts as row labels, the subject's set off by weight, asterisk and bracket."""
    inside = ((tokens["token"] >= tokens["subject_start"]) & (tokens["token"] < tokens["subject_end"])).to_list()
    texts = [visible_token(text or "") for text in tokens["token_text"]]
    marked = [f"{text}*" if subject else text for text, subject in zip(texts, inside, strict=True)]
    axes.set_yticks(range(len(marked)), marked if labels else [""] * len(marked))
    axes.tick_params(axis="y", length=0, pad=11)
    for label, subject in zip(axes.get_yticklabels(), inside, strict=True):
        label.set(**plain(8.5, fontweight="bold" if subject else "normal", color="black" if subject else "0.25"))
    if any(inside):
        first, last = inside.index(True), len(inside) - 1 - inside[::-1].index(True)
        aside = ScaledTranslation(-7 * _POINT, 0, figure.dpi_scale_trans)
        corners = [0.012, 0, 0, 0.012], [first - 0.4, first - 0.4, last + 0.4, last + 0.4]
        axes.plot(*corners, transform=axes.get_yaxis_transform() + aside, clip_on=False, color="0.15", linewidth=1.4)


def _color_bar(figure: Figure, axes: Axes, mesh: QuadMesh, fact: pl.DataFrame) -> None:
    """A bar that names p_corrupted, its lower end, and p_clean where that lies on the scale."""
    low, high, clean = *_limits(fact), float(fact["p_clean"][0])
    labels = {low: f"{low:.3g} corrupted"}
    if (clean - low) / (high - low) > 0.12:
        labels[clean] = f"{clean:.3g} clean"
    else:
        labels[low] += f"\n{clean:.3g} clean"
    named = list(labels)
    for tick in MaxNLocator(nbins=4).tick_values(low, high):
        apart = all(abs(tick - other) > 0.12 * (high - low) for other in named)
        if low < tick < high and apart and high - low > 1e-6:
            labels[tick] = f"{tick:.3g}"
    below = bool((fact["p_patched"] < low - 0.01 * (high - low)).any())
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=18, extend="min" if below else "neither")
    bar.set_ticks(list(labels), labels=list(labels.values()))
    bar.ax.tick_params(labelsize=8, length=2, color="0.4")
    bar.ax.set_title("p(target)", fontsize=8.5, loc="left", pad=9)
    bar.outline.set(edgecolor="0.7", linewidth=0.5)
