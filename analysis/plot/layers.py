"""Figures of mean effects by layer: zeroing, restoring tokens together, and severed against plain restoring."""

from __future__ import annotations

import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from causalcone.analysis.layer_effects import joint_effects, severed_effects, zeroing_curve
from causalcone.analysis.plot import draw
from causalcone.analysis.tables.names import heading
from causalcone.analysis.tables.traces import AnswerScore, State, TraceSource, rows_of

MOST_LINES, MOST_BANDS = 10, 5
# The hues of the published figure: hidden states restored in the plain model, then with its modules severed.
_SEVERED_STYLES = {
    "plain": ("Purples", "o", "-"),
    "sever_mlp": ("Greens", "s", "--"),
    "sever_attn": ("Reds", "^", "-."),
    "sever_both": ("Greys", "D", ":"),
}


def zeroing(table: TraceSource, path: draw.PathLike | None = None, answer_score: AnswerScore = "product") -> Figure:
    """Mean effect of zeroing by centre layer, one line per state with a band of 1.96 standard errors (docs/methods.md,
    "Zeroing"). Of more than ten states, those with the largest effects are drawn; more than five have no bands.

    Args:
        table: traces, as ``read_traces`` takes them.
        path: where the figure is written.
        answer_score: that of ``read_traces``.

    Raises:
        TableError: the table holds no zeroed state.
    """
    return draw.finish(
        _curves(zeroing_curve(table, answer_score), "Effect of zeroing", "share of p(target) lost"), path
    )


def joint_effect(
    table: TraceSource, path: draw.PathLike | None = None, answer_score: AnswerScore = "product"
) -> Figure:
    """Mean effect of restoring several tokens together by centre layer, drawn as ``zeroing`` is.

    Args:
        table: traces, as ``read_traces`` takes them.
        path: where the figure is written.
        answer_score: that of ``read_traces``.

    Raises:
        TableError: no row is of tokens restored together.
    """
    figure = _curves(joint_effects(table, answer_score), "Effect of restoring tokens together", "effect on p(target)")
    return draw.finish(figure, path)


def severed(
    *tables: TraceSource,
    role: str = "last_subject",
    fact_id: str | None = None,
    token: int | None = None,
    path: draw.PathLike | None = None,
    answer_score: AnswerScore = "product",
) -> Figure:
    """Mean effect of restoring a state at the tokens of a role, by layer, in the plain model and with MLP outputs,
    attention outputs or both severed from it (docs/methods.md, "Severed tracing"): one column per kind and window. With
    ``fact_id`` and ``token`` it is of single facts (Meng et al. 2022, Fig. 14). All lines are of the facts and tokens
    that every severed method has.

    Args:
        tables: traces, as ``read_traces`` takes them, which together hold plain and severed ones.
        role: whose tokens count.
        fact_id: only this fact counts.
        token: the number of a token that counts in place of a role's.
        path: where the figure is written.
        answer_score: that of ``read_traces``.

    Raises:
        TableError: there are no such states.
    """
    means = severed_effects(*tables, role=role, fact_id=fact_id, token=token, common=True, answer_score=answer_score)
    states = means.select("kind", "window").unique().sort("kind", "window").rows()
    layers = draw.layer_count(means)
    figure = draw.new_figure(max(6.0, max(3.6, min(7.0, 0.2 * layers + 2.4)) * len(states)), 3.9)
    grid = figure.subplots(1, len(states), squeeze=False, sharey=True)[0]
    for axes, (kind, window) in zip(grid, states, strict=True):
        _draw_severed(axes, means.filter(kind=kind, window=window))
        axes.set_title(f"Restoring {draw.kind_name(kind, window)}", fontsize=10)
        _frame(axes, window, layers)
    draw.value_axis(grid[0], "effect on p(target)")
    where = f"{heading(role)} token" if token is None else f"Token {token}"
    facts = _over(means) if fact_id is None else f"fact {fact_id}"
    figure.suptitle(f"{where}, {facts}", **draw.plain(11, fontweight="bold"))
    columns = 2 if len(grid[0].get_legend_handles_labels()[1]) == 4 and len(states) == 1 else 4
    draw.legend(figure, columns, grid[0], handlelength=3)
    return draw.finish(figure, path)


def _draw_severed(axes: Axes, means: pl.DataFrame) -> None:
    methods = [name for name in _SEVERED_STYLES if not means.filter(method=name).is_empty()]
    for name in ("plain", *methods):  # plain: beside any method, of the same facts
        column, method = ("plain", methods[0]) if name == "plain" else ("severed", name)
        line = means.filter(method=method).select("layer", effect=column, standard_error=f"{column}_error")
        colors, marker, dash = _SEVERED_STYLES[name]
        draw.line(axes, line, (colormaps[colors](0.8), marker, dash), draw.METHOD_NAMES.get(name, "nothing severed"))


def _curves(means: pl.DataFrame, title: str, label: str) -> Figure:
    states, every = _largest(means), draw.states_of(means)
    bands = len(states) <= MOST_BANDS
    layers = draw.layer_count(means)
    figure = draw.new_figure(max(6.6, min(9.0, 0.2 * layers + 3.6)), 3.8)
    axes = figure.subplots()
    for number, state in enumerate(states):
        style = (*draw.LINES[number % len(draw.LINES)], "-" if number < len(draw.LINES) else "--")
        name = draw.state_title(state).removeprefix("Zeroing ").removeprefix("Restoring ").replace("\n", " ")
        draw.line(axes, rows_of(means, state), style, name, band=bands)
    _frame(axes, max(window for _, _, window in states), layers)
    axes.set_ylabel(label, fontsize=9)
    count = f" ({len(states)} of {len(every)} states)" if len(states) < len(every) else ""
    draw.title(figure, f"{title}, {_over(means, bands)}{count}")
    draw.legend(figure, 3, handlelength=3)
    return figure


def _largest(means: pl.DataFrame) -> list[State]:
    """The states with the largest effects, in their usual order."""
    every = draw.states_of(means)
    peaks = {state: rows_of(means, state)["effect"].to_numpy().max() for state in every}
    largest = sorted(every, key=lambda state: -peaks[state])[:MOST_LINES]
    return [state for state in every if state in largest]


def _frame(axes: Axes, window: int, layers: int) -> None:
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    draw.layer_axis(axes, window, layers)
    draw.value_axis(axes)


def _over(means: pl.DataFrame, bands: bool = True) -> str:
    return draw.mean_of(int(means["facts"].to_numpy().max()), bands)
