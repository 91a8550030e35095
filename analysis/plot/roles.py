"""The figure of average indirect effects by token role."""

from __future__ import annotations

import os

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from causalcone.analysis.effects import average_indirect_effect
from causalcone.analysis.plot.parts import (
    KIND_COLORS,
    finish,
    layer_axis,
    layer_count,
    new_figure,
    rows_of,
    state_title,
    states_of,
)
from causalcone.analysis.tables.traces import ROLES, TableError, TraceSource

ROLE_NAMES = {role: role.replace("_", " ") + " token" for role in ROLES} | {
    "middle_subject": "middle subject tokens",
    "further": "further tokens",
}
# Okabe and Ito's colours, told apart by all kinds of colour vision, and a marker and a dash for print in grey.
ROLE_STYLES = {
    "first_subject": ("#56B4E9", "s", "--"),
    "middle_subject": ("#0072B2", "^", ":"),
    "last_subject": ("#D55E00", "o", "-"),
    "first_subsequent": ("#E69F00", "D", "-."),
    "further": ("#009E73", "v", ":"),
    "last": ("#000000", "P", "-"),
}


def indirect_effect(table: TraceSource, path: str | os.PathLike[str] | None = None) -> Figure:
    """Average indirect effect by token role and layer (Meng et al. 2022, Figs. 7 and 15; METHODS 3).

    One column per method, kind and window. Above: one line per role, with a band of 1.96 standard errors. Below: the
    same means as a role-by-layer heat map. The scales are common to all columns. Raises ``TableError`` where the
    table holds no restored state.
    """
    averages = average_indirect_effect(table)
    if averages.is_empty():
        raise TableError("the table holds no restored state of a token with a role")
    states = states_of(averages)
    layers = layer_count(averages)

    columns = min(len(states), 3)
    blocks = -(-len(states) // columns)
    figure = new_figure(max(3.3 * columns + 1.8, 5.4), 5.6 * blocks + 0.6)
    grid = figure.subplots(2 * blocks, columns, squeeze=False, height_ratios=[1.7, 1] * blocks)
    scale = Normalize(0, max(averages["effect"].to_numpy().max(), 1e-6))
    for place, state in enumerate(states):
        block, column = divmod(place, columns)
        lines, cells = grid[2 * block : 2 * block + 2, column]
        chosen = rows_of(averages, state)
        _draw_lines(lines, chosen)
        _draw_roles(figure, cells, chosen, layers, scale, KIND_COLORS.get(state[1], "Blues"))
        lines.set_title(state_title(state), fontsize=10)
        for axes in (lines, cells):
            layer_axis(axes, state[2], layers)
        if place:
            lines.sharey(grid[0, 0])
        if column:
            lines.tick_params(labelleft=False)
            cells.tick_params(labelleft=False)
        else:
            lines.set_ylabel("effect on p(target)", fontsize=9)
    for place in range(len(states), blocks * columns):
        for axes in grid[2 * (place // columns) : 2 * (place // columns) + 2, place % columns]:
            axes.set_visible(False)

    facts = int(averages["facts"].to_numpy().max())
    of = "of one fact" if facts == 1 else f"over {facts} facts, with 95 % intervals"
    figure.suptitle(f"Average indirect effect {of}", fontsize=11, fontweight="bold")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    wrap = 6 if columns == 3 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=wrap, fontsize=8.5, frameon=False, handlelength=3)
    return finish(figure, path)


def _draw_lines(axes: Axes, averages: pl.DataFrame) -> None:
    axes.axhline(0, color="0.6", linewidth=0.8)
    for role, (color, marker, dash) in ROLE_STYLES.items():
        line = averages.filter(role=role).sort("layer")
        layer, effect = line["layer"].to_numpy(), line["effect"].to_numpy()
        band = 1.96 * line["standard_error"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
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
            label=ROLE_NAMES[role],
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)


def _draw_roles(figure: Figure, axes: Axes, averages: pl.DataFrame, layers: int, scale: Normalize, colors: str) -> None:
    values = np.full((len(ROLES), layers), np.nan)
    for role, layer, effect in averages.select("role", "layer", "effect").iter_rows():
        values[ROLES.index(role), layer] = effect
    edges = np.arange(layers + 1) - 0.5, np.arange(len(ROLES) + 1) - 0.5
    mesh = axes.pcolormesh(
        *edges, np.ma.masked_invalid(values), cmap=colors, norm=scale, edgecolors="white", linewidth=0.4
    )
    axes.patch.set(facecolor="0.95", hatch="////", edgecolor="0.8")  # shows where no fact has such a token
    axes.set_ylim(len(ROLES) - 0.5, -0.5)
    axes.set_yticks(range(len(ROLES)), [ROLE_NAMES[role] for role in ROLES])
    axes.tick_params(axis="y", labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=14)
    bar.ax.set_title("effect", fontsize=8.5, loc="left", pad=9)
    bar.ax.tick_params(labelsize=8, length=2, color="0.4")
    bar.outline.set(edgecolor="0.7", linewidth=0.5)
