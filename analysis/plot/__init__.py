"""Figures: token-by-layer heat maps of one fact here; averages by token role or by layer, gradients and scores beside.

Every function returns its matplotlib ``Figure`` and writes it to ``path`` where one is given (the suffix chooses the
format; missing folders are made). No display and no pyplot state is used.
"""

from __future__ import annotations

import os

import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from causalcone.analysis.plot.gradients import gradients
from causalcone.analysis.plot.layers import joint_effect, severed, zeroing
from causalcone.analysis.plot.maps import MAP_COLUMNS, draw_map, label_tokens, map_grid, token_grid
from causalcone.analysis.plot.parts import (
    KIND_COLORS,
    State,
    finish,
    layer_axis,
    layer_count,
    rows_of,
    state_title,
    states_of,
)
from causalcone.analysis.plot.roles import indirect_effect
from causalcone.analysis.plot.scores import scores
from causalcone.analysis.tables.traces import TableError, TraceSource, read_traces, single_tokens

__all__ = ["gradients", "heatmap", "heatmaps", "indirect_effect", "joint_effect", "scores", "severed", "zeroing"]

PathLike = str | os.PathLike[str]


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
    traces = read_traces(table).filter(pl.col("method") != "zero")
    fact = traces.filter(pl.col("fact_id") == str(fact_id))
    if fact.is_empty():
        known = traces["fact_id"].unique(maintain_order=True)
        more = ", ..." if len(known) > 10 else ""
        raise TableError(f"no traces of fact {fact_id!r}; there are {', '.join(map(repr, known[:10]))}{more}")
    return single_tokens(fact)


def _name(state: State) -> str:
    method, kind, window = state
    return f"{kind}:{window}" if method == "restore" else f"{kind}:{window} ({method})"


def _draw(fact: pl.DataFrame) -> Figure:
    """One map for every state in the rows of one fact."""
    states = states_of(fact)
    tokens = fact.select("token", "token_text", "subject_start", "subject_end").unique("token").sort("token")
    texts = tokens["token_text"].fill_null("").to_list()
    inside = ((tokens["token"] >= tokens["subject_start"]) & (tokens["token"] < tokens["subject_end"])).to_list()
    layers = layer_count(fact)
    figure, grid = map_grid(len(states), texts, layers)
    scale = Normalize(*_limits(fact))
    for place, (axes, state) in enumerate(zip(grid, states, strict=True)):
        _, kind, window = state
        values = token_grid(rows_of(fact, state), "p_patched", tokens["token"].to_list(), layers)
        mesh = draw_map(axes, values, scale, KIND_COLORS.get(kind, "Blues"))
        axes.set_title(state_title(state), fontsize=10)
        layer_axis(axes, window, layers)
        label_tokens(figure, axes, texts, inside, labels=place % MAP_COLUMNS == 0)
        _color_bar(figure, axes, mesh, fact)
    return figure


def _limits(fact: pl.DataFrame) -> tuple[float, float]:
    low, clean = float(fact["p_corrupted"][0]), float(fact["p_clean"][0])
    return low, max(clean, float(fact["p_patched"].to_numpy().max()), low + 1e-9)


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
