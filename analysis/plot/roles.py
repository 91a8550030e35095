"""The figure of average indirect effects by token role."""

from __future__ import annotations

import os

import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from causalcone.analysis.effects import average_indirect_effect
from causalcone.analysis.plot import draw
from causalcone.analysis.tables.names import COLORS, words
from causalcone.analysis.tables.traces import ROLES, AnswerScore, TableError, TraceSource, rows_of

ROLE_NAMES = {r: f"{words(r)} token" + "s" * (r in ("middle_subject", "further")) for r in ROLES}
ROLE_STYLES = {  # a marker and a dash for print in grey
    "first_subject": ("sky", "s", "--"),
    "middle_subject": ("blue", "^", ":"),
    "last_subject": ("vermilion", "o", "-"),
    "first_subsequent": ("orange", "D", "-."),
    "further": ("green", "v", ":"),
    "last": ("black", "P", "-"),
}


def indirect_effect(
    table: TraceSource, path: str | os.PathLike[str] | None = None, answer_score: AnswerScore = "product"
) -> Figure:
    """Average indirect effect by token role and layer (Meng et al. 2022, Figs. 7 and 15): a column per method, kind and
    window, with a line per role and bands of 1.96 standard errors above, and a heat map of the same means below.

    Args:
        table: traces, as ``read_traces`` takes them.
        path: where the figure is written.
        answer_score: that of ``read_traces``.

    Raises:
        TableError: the table holds no restored state.
    """
    averages = average_indirect_effect(table, answer_score=answer_score)
    if averages.is_empty():
        raise TableError("the table holds no restored state of a token with a role")
    states = draw.states_of(averages)
    layers = draw.layer_count(averages)

    columns = min(len(states), 3)
    blocks = -(-len(states) // columns)
    figure = draw.new_figure(max(3.3 * columns + 1.8, 5.4), 5.6 * blocks + 0.6)
    grid = figure.subplots(2 * blocks, columns, squeeze=False, height_ratios=[1.7, 1] * blocks)
    scale = Normalize(0, max(averages["effect"].to_numpy().max(), 1e-6))
    for number, state in enumerate(states):
        block, column = divmod(number, columns)
        lines, cells = grid[2 * block : 2 * block + 2, column]
        rows = rows_of(averages, state)
        _draw_lines(lines, rows)
        _draw_roles(figure, cells, rows, layers, scale, draw.KIND_COLORS.get(state[1], "Blues"))
        lines.set_title(draw.state_title(state), fontsize=10)
        for axes in (lines, cells):
            draw.layer_axis(axes, state[2], layers)
        if number:
            lines.sharey(grid[0, 0])
        if column:
            lines.tick_params(labelleft=False)
            cells.tick_params(labelleft=False)
        else:
            lines.set_ylabel("effect on p(target)", fontsize=9)
    for axes in grid[-2:, (len(states) - 1) % columns + 1 :].flat:
        axes.set_visible(False)

    facts = int(averages["facts"].to_numpy().max())
    of = "of one fact" if facts == 1 else f"over {facts} facts, with 95 % intervals"
    draw.title(figure, f"Average indirect effect {of}")
    draw.legend(figure, 6 if columns == 3 else 3, grid[0, 0], handlelength=3)
    return draw.finish(figure, path)


def _draw_lines(axes: Axes, averages: pl.DataFrame) -> None:
    axes.axhline(0, color="0.6", linewidth=0.8)
    for role, (color, marker, dash) in ROLE_STYLES.items():
        draw.line(axes, averages.filter(role=role), (COLORS[color], marker, dash), ROLE_NAMES[role])
    draw.value_axis(axes)


def _draw_roles(figure: Figure, axes: Axes, averages: pl.DataFrame, layers: int, scale: Normalize, colors: str) -> None:
    mesh = draw.cells(axes, draw.grid(averages, "role", ROLES, "effect", layers), scale, colors)
    axes.patch.set(**draw.UNKNOWN)  # shows where no fact has such a token
    axes.set_yticks(range(len(ROLES)), [ROLE_NAMES[role] for role in ROLES])
    axes.tick_params(axis="y", labelsize=8.5, length=0)
    draw.color_bar(figure, axes, mesh, "effect", aspect=14)
