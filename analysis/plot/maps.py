"""Token-by-layer heat maps of one fact: of p(target) after restoring states, and of integrated gradients."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from causalcone.analysis.plot import draw
from causalcone.analysis.tables.traces import (
    SMALL,
    AnswerScore,
    TableError,
    TraceSource,
    read_gradients,
    read_traces,
    rows_of,
    scaled,
    single_tokens,
)

MAP_COLUMNS = 3
_POINT = 1 / 72


def heatmap(
    table: TraceSource,
    fact_id: str,
    kind: str = "hidden",
    window: int = 1,
    *,
    method: str = "restore",
    path: draw.PathLike | None = None,
    answer_score: AnswerScore = "product",
) -> Figure:
    """Token-by-layer heat map of p_patched for one fact and one restored state (Meng et al. 2022, Figs. 1 and 10).

    The subject's tokens are in bold with an asterisk and a bracket; layers of windows are the centre ones. Colours run
    from p_corrupted to the larger of p_clean and the largest p_patched.

    Args:
        table: traces, as ``read_traces`` takes them.
        fact_id: the fact.
        kind: of the restored state.
        window: how many layers are restored together.
        method: of tracing, "restore" or one with modules severed.
        path: where the figure is written.
        answer_score: that of ``read_traces``.

    Raises:
        TableError: the table holds no such fact or state; the message names those that there are.
    """
    fact = _traces_of(table, fact_id, answer_score)
    state, present = (method, kind, window), draw.states_of(fact)
    if state not in present:
        raise TableError(f"fact {fact_id!r} has no {_name(state)}; it has {', '.join(map(_name, present))}")
    return draw.finish(_draw_traces(rows_of(fact, state)), path)


def heatmaps(
    table: TraceSource, fact_id: str, path: draw.PathLike | None = None, answer_score: AnswerScore = "product"
) -> Figure:
    """``heatmap`` of every state of a fact, side by side, on one scale.

    Args:
        table: traces, as ``read_traces`` takes them.
        fact_id: the fact.
        path: where the figure is written.
        answer_score: that of ``read_traces``.

    Raises:
        TableError: the table holds no such fact.
    """
    return draw.finish(_draw_traces(_traces_of(table, fact_id, answer_score)), path)


def gradients(
    table: TraceSource,
    fact_id: str,
    texts: Sequence[str],
    subject: tuple[int, int] = (0, 0),
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Token-by-layer heat maps of the norm of one fact's integrated gradients, one per kind, each on its own scale
    (Meng et al. 2022, Fig. 16).

    Args:
        table: gradients, as ``read_gradients`` takes them.
        fact_id: the fact.
        texts: of all tokens of the fact's prompt, which the table does not hold.
        subject: the half-open range of them that is marked as the subject.
        path: where the figure is written.

    Raises:
        TableError: the table holds no such fact, or tokens that have no text.
    """
    every = read_gradients(table)
    fact = every.filter(pl.col("fact_id") == str(fact_id))
    if fact.is_empty():
        raise TableError(f"no gradients of fact {fact_id!r}; there are {_first(every)}")
    tokens = fact["token"].unique().sort().to_list()
    if tokens[-1] >= len(texts):
        raise TableError(f"the table has token {tokens[-1]}, but there are texts of {len(texts)} tokens only")
    shown = [texts[token] for token in tokens]
    inside = [subject[0] <= token < subject[1] for token in tokens]
    kinds = sorted(fact["kind"].unique(), key=draw.kind_order)
    layers = draw.layer_count(fact)
    figure, grid = _map_grid(len(kinds), shown, layers)
    for number, (axes, kind) in enumerate(zip(grid, kinds, strict=True)):
        values = draw.grid(fact.filter(kind=kind), "token", tokens, "norm", layers)
        mesh = draw.cells(axes, values, Normalize(0, max(values.max(), 1e-12)), draw.KIND_COLORS.get(kind, "Blues"))
        axes.set_title(f"Norm of integrated gradients,\n{draw.KIND_NAMES.get(kind, kind)}", fontsize=10)
        draw.layer_axis(axes, 1, layers)
        _label_tokens(figure, axes, shown, inside, labels=number % MAP_COLUMNS == 0)
        draw.color_bar(figure, axes, mesh)
    return draw.finish(figure, path)


def _traces_of(table: TraceSource, fact_id: str, answer_score: AnswerScore) -> pl.DataFrame:
    traces = read_traces(table, answer_score).filter(pl.col("method") != "zero")
    fact = traces.filter(pl.col("fact_id") == str(fact_id))
    if fact.is_empty():
        raise TableError(f"no traces of fact {fact_id!r}; there are {_first(traces)}")
    return single_tokens(fact)


def _first(rows: pl.DataFrame) -> str:
    known = rows["fact_id"].unique(maintain_order=True)
    return ", ".join(map(repr, known[:10])) + (", ..." if len(known) > 10 else "")


def _name(state: draw.State) -> str:
    method, kind, window = state
    return f"{kind}:{window}" if method == "restore" else f"{kind}:{window} ({method})"


def _draw_traces(fact: pl.DataFrame) -> Figure:
    states = draw.states_of(fact)
    tokens = fact.select("token", "token_text", "subject_start", "subject_end").unique("token").sort("token")
    texts = tokens["token_text"].fill_null("").to_list()
    inside = ((tokens["token"] >= tokens["subject_start"]) & (tokens["token"] < tokens["subject_end"])).to_list()
    layers = draw.layer_count(fact)
    fact, label = _drawable(fact)
    figure, grid = _map_grid(len(states), texts, layers)
    scale = Normalize(*_limits(fact))
    for number, (axes, state) in enumerate(zip(grid, states, strict=True)):
        values = draw.grid(rows_of(fact, state), "token", tokens["token"].to_list(), "p_patched", layers)
        mesh = draw.cells(axes, values, scale, draw.KIND_COLORS.get(state[1], "Blues"))
        axes.set_title(draw.state_title(state), fontsize=10)
        draw.layer_axis(axes, state[2], layers)
        _label_tokens(figure, axes, texts, inside, labels=number % MAP_COLUMNS == 0)
        _probability_bar(figure, axes, mesh, fact, label)
    return figure


def _drawable(fact: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    """Its probabilities, over the largest of them where all are too small for a number; and what they are."""
    top = float(fact.select(pl.max_horizontal(pl.col("logp_clean", "logp_corrupted", "logp_patched").max())).item())
    if top > math.log(SMALL) or top == -math.inf:
        return fact, "p(target)"
    each = [scaled(p, pl.lit(top)) for p in ("p_clean", "p_corrupted", "p_patched")]
    return fact.with_columns(each), f"p(target) / e^{top:.0f}"


def _limits(fact: pl.DataFrame) -> tuple[float, float]:
    low, clean = float(fact["p_corrupted"][0]), float(fact["p_clean"][0])
    return low, max(clean, float(fact["p_patched"].to_numpy().max()), low + 1e-9 * (low or 1))


def _probability_bar(figure: Figure, axes: Axes, mesh: QuadMesh, fact: pl.DataFrame, label: str) -> None:
    """A bar that names p_corrupted, its lower end, and p_clean where that lies on the scale."""
    low, high, clean = *_limits(fact), float(fact["p_clean"][0])
    labels = {low: f"{low:.3g} corrupted", clean: f"{clean:.3g} clean"}
    if (clean - low) / (high - low) <= 0.12:
        labels = {low: f"{low:.3g} corrupted\n{clean:.3g} clean"}
    named = list(labels)
    for tick in MaxNLocator(nbins=4).tick_values(low, high):
        apart = all(abs(tick - other) > 0.12 * (high - low) for other in named)
        if low < tick < high and apart and high - low > 1e-6 * high:
            labels[tick] = f"{tick:.3g}"
    below = bool((fact["p_patched"] < low - 0.01 * (high - low)).any())
    bar = draw.color_bar(figure, axes, mesh, label, extend="min" if below else "neither")
    bar.set_ticks(list(labels), labels=list(labels.values()))


def _prompt_text(texts: Sequence[str]) -> str:
    glue = "" if any(text[:1] in (" ", "▁") for text in texts) else " "  # some tokenizers drop a token's space
    return draw.drawable(glue.join(texts).replace("▁", " ").replace("\n", "↵").strip())


def _label_tokens(figure: Figure, axes: Axes, texts: Sequence[str], inside: Sequence[bool], labels: bool) -> None:
    """Token texts as row labels, those ``inside`` the subject set off by weight, asterisk and bracket."""
    shown = map(draw.visible_token, texts)
    marked = [f"{text}*" if subject else text for text, subject in zip(shown, inside, strict=True)]
    axes.set_yticks(range(len(marked)), marked if labels else [""] * len(marked))
    axes.tick_params(axis="y", length=0, pad=11)
    for label, subject in zip(axes.get_yticklabels(), inside, strict=True):
        label.set(**draw.plain(8.5, fontweight="bold" if subject else "normal", color="black" if subject else "0.25"))
    if any(inside):
        first, last = inside.index(True), len(inside) - 1 - inside[::-1].index(True)
        aside = ScaledTranslation(-7 * _POINT, 0, figure.dpi_scale_trans)
        corners = [0.012, 0, 0, 0.012], [first - 0.4, first - 0.4, last + 0.4, last + 0.4]
        axes.plot(*corners, transform=axes.get_yaxis_transform() + aside, clip_on=False, color="0.15", linewidth=1.4)


def _map_grid(maps: int, texts: Sequence[str], layers: int) -> tuple[Figure, list[Axes]]:
    """A figure with the prompt above the axes of all maps of these tokens; axes left over are hidden."""
    columns = min(maps, MAP_COLUMNS)
    rows = -(-maps // columns)
    map_width, map_height = min(5.2, max(2.4, 0.15 * layers)), max(1.3, 0.21 * len(texts))
    width = columns * (map_width + 1.3) + 0.4 + 0.09 * max(len(draw.visible_token(text)) for text in texts)
    figure = draw.new_figure(width, rows * (map_height + 0.8) + 0.6)
    shown = textwrap.fill(_prompt_text(texts), int(width * 9), max_lines=3, placeholder=" …")
    figure.suptitle(shown, **draw.plain(11, fontweight="bold"))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[maps:]:
        axes.set_visible(False)
    return figure, grid[:maps]
