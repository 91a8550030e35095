"""Figures of mean effects by layer: zeroing, restoring tokens together, and severed against plain restoring."""

from __future__ import annotations

import os

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from causalcone.analysis.layer_effects import joint_effects, severed_effects, zeroing_curve
from causalcone.analysis.plot.parts import (
    METHOD_NAMES,
    State,
    finish,
    kind_name,
    layer_axis,
    layer_count,
    new_figure,
    plain,
    rows_of,
    state_title,
    states_of,
)
from causalcone.analysis.tables.traces import TraceSource

PathLike = str | os.PathLike[str]

MOST_LINES = 10
MOST_BANDS = 5
# Okabe and Ito's colours with a marker each, for print in grey.
_STYLES = (
    ("#D55E00", "o"),
    ("#0072B2", "s"),
    ("#009E73", "^"),
    ("#E69F00", "D"),
    ("#CC79A7", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
# The hues of the published figure: hidden states restored in the plain model, then with its modules severed.
_SEVERED_STYLES = {
    "plain": ("Purples", "o", "-"),
    "sever_mlp": ("Greens", "s", "--"),
    "sever_attn": ("Reds", "^", "-."),
    "sever_both": ("Greys", "D", ":"),
}


def zeroing(table: TraceSource, path: PathLike | None = None) -> Figure:
    """Mean effect of zeroing by centre layer, one line per state with a band of 1.96 standard errors (Hase et al. 2023;
    METHODS 3). Of more than ten states, those with the largest effects are drawn; more than five have no bands.

    Raises ``TableError`` where the table holds no zeroed state.
    """
    return finish(_curves(zeroing_curve(table), "Effect of zeroing", "share of p(target) lost"), path)


def joint_effect(table: TraceSource, path: PathLike | None = None) -> Figure:
    """Mean effect of restoring several tokens together by centre layer, drawn as ``zeroing`` is.

    Raises ``TableError`` where no row is of tokens restored together.
    """
    return finish(_curves(joint_effects(table), "Effect of restoring tokens together", "effect on p(target)"), path)


def severed(
    *tables: TraceSource,
    role: str = "last_subject",
    fact_id: str | None = None,
    token: int | None = None,
    path: PathLike | None = None,
) -> Figure:
    """Mean effect of restoring a state at the tokens of a role, by layer, in the plain model and with MLP outputs,
    attention outputs or both severed from it (Meng et al. 2022; METHODS 3): one column per kind and window. With
    ``fact_id``, and the number of a ``token`` in place of a role, it is of single facts (Meng et al. 2022, Fig. 14).

    ``tables`` hold together plain and severed traces; all lines are of the facts and tokens that every severed method
    has. Raises ``TableError`` where there are none.
    """
    means = severed_effects(*tables, role=role, fact_id=fact_id, token=token, common=True)
    states = means.select("kind", "window").unique().sort("kind", "window").rows()
    layers = layer_count(means)
    figure = new_figure(max(6.0, max(3.6, min(7.0, 0.2 * layers + 2.4)) * len(states)), 3.9)
    grid = figure.subplots(1, len(states), squeeze=False, sharey=True)[0]
    for axes, (kind, window) in zip(grid, states, strict=True):
        _draw_severed(axes, means.filter(kind=kind, window=window))
        axes.set_title(f"Restoring {kind_name(kind, window)}", fontsize=10)
        _frame(axes, window, layers)
    grid[0].set_ylabel("effect on p(target)", fontsize=9)
    place = f"{role.replace('_', ' ').capitalize()} token" if token is None else f"Token {token}"
    facts = _over(means) if fact_id is None else f"fact {fact_id}"
    figure.suptitle(f"{place}, {facts}", **plain(11, fontweight="bold"))
    handles, labels = grid[0].get_legend_handles_labels()
    columns = 2 if len(labels) == 4 and len(states) == 1 else 4
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False, handlelength=3
    )
    return finish(figure, path)


def _draw_severed(axes: Axes, means: pl.DataFrame) -> None:
    methods = [name for name in _SEVERED_STYLES if not means.filter(method=name).is_empty()]
    whole = means.filter(method=methods[0])  # of the same facts as the others
    lines = {"plain": whole.select("layer", effect="plain", standard_error="plain_error")}
    for name in methods:
        lines[name] = means.filter(method=name).select("layer", effect="severed", standard_error="severed_error")
    for name, line in lines.items():
        colors, marker, dash = _SEVERED_STYLES[name]
        label = METHOD_NAMES.get(name, "nothing severed")
        _line(axes, line, colormaps[colors](0.8), marker, dash, label)


def _curves(means: pl.DataFrame, title: str, label: str) -> Figure:
    states, every = _largest(means), states_of(means)
    bands = len(states) <= MOST_BANDS
    layers = layer_count(means)
    figure = new_figure(max(6.6, min(9.0, 0.2 * layers + 3.6)), 3.8)
    axes = figure.subplots()
    for number, state in enumerate(states):
        color, marker = _STYLES[number % len(_STYLES)]
        dash = "-" if number < len(_STYLES) else "--"
        name = state_title(state).removeprefix("Zeroing ").removeprefix("Restoring ").replace("\n", " ")
        _line(axes, rows_of(means, state), color, marker, dash, name, bands)
    _frame(axes, max(window for _, _, window in states), layers)
    axes.set_ylabel(label, fontsize=9)
    some = f" ({len(states)} of {len(every)} states)" if len(states) < len(every) else ""
    figure.suptitle(f"{title}, {_over(means, bands)}{some}", fontsize=11, fontweight="bold")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False, handlelength=3)
    return figure


def _largest(means: pl.DataFrame) -> list[State]:
    """The states with the largest effects, in their usual order."""
    every = states_of(means)
    peaks = {state: rows_of(means, state)["effect"].to_numpy().max() for state in every}
    chosen = sorted(every, key=lambda state: -peaks[state])[:MOST_LINES]
    return [state for state in every if state in chosen]


def _line(
    axes: Axes, means: pl.DataFrame, color: object, marker: str, dash: str, label: str, bands: bool = True
) -> None:
    """One line by layer, and a band of 1.96 standard errors."""
    ordered = means.sort("layer")
    layer, effect = ordered["layer"].to_numpy(), ordered["effect"].to_numpy()
    band = 1.96 * ordered["standard_error"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    if bands:
        axes.fill_between(layer, effect - band, effect + band, color=color, alpha=0.15, linewidth=0)
    axes.plot(
        layer,
        effect,
        color=color,
        marker=marker,
        linestyle=dash,
        markersize=4.5,
        linewidth=1.6,
        markevery=max(1, len(layer) // 12),
        label=label,
    )


def _frame(axes: Axes, window: int, layers: int) -> None:
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    layer_axis(axes, window, layers)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)


def _over(means: pl.DataFrame, bands: bool = True) -> str:
    facts = int(means["facts"].to_numpy().max())
    return "one fact" if facts == 1 else f"mean of {facts} facts" + " with 95 % intervals" * bands
