"""The figure of integrated gradients: token-by-layer maps of their norm."""

from __future__ import annotations

import os
from collections.abc import Sequence

import polars as pl
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from causalcone.analysis.plot.maps import MAP_COLUMNS, draw_map, label_tokens, map_grid, token_grid
from causalcone.analysis.plot.parts import KIND_COLORS, KIND_NAMES, finish, kind_order, layer_axis, layer_count
from causalcone.analysis.tables.traces import TableError, TraceSource, read_gradients


def gradients(
    table: TraceSource,
    fact_id: str,
    texts: Sequence[str],
    subject: tuple[int, int] = (0, 0),
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Token-by-layer heat maps of the norm of one fact's integrated gradients, one per kind, each on its own scale
    (Meng et al. 2022, Fig. 16).

    ``texts`` are those of all tokens of the fact's prompt, which the table does not hold; ``subject`` is the half-open
    range of them that is marked as the subject. Raises ``TableError`` where the table holds no such fact, or tokens
    that have no text.
    """
    every = read_gradients(table)
    fact = every.filter(pl.col("fact_id") == str(fact_id))
    if fact.is_empty():
        known = ", ".join(map(repr, every["fact_id"].unique(maintain_order=True)[:10]))
        raise TableError(f"no gradients of fact {fact_id!r}; there are {known}")
    tokens = fact["token"].unique().sort().to_list()
    if tokens[-1] >= len(texts):
        raise TableError(f"the table has token {tokens[-1]}, but there are texts of {len(texts)} tokens only")
    chosen = [texts[token] for token in tokens]
    inside = [subject[0] <= token < subject[1] for token in tokens]
    kinds = sorted(fact["kind"].unique(), key=kind_order)
    layers = layer_count(fact)
    figure, grid = map_grid(len(kinds), chosen, layers)
    for place, (axes, kind) in enumerate(zip(grid, kinds, strict=True)):
        values = token_grid(fact.filter(kind=kind), "norm", tokens, layers)
        mesh = draw_map(axes, values, Normalize(0, max(values.max(), 1e-12)), KIND_COLORS.get(kind, "Blues"))
        axes.set_title(f"Norm of integrated gradients,\n{KIND_NAMES.get(kind, kind)}", fontsize=10)
        layer_axis(axes, 1, layers)
        label_tokens(figure, axes, chosen, inside, labels=place % MAP_COLUMNS == 0)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=18)
        bar.ax.tick_params(labelsize=8, length=2, color="0.4")
        bar.outline.set(edgecolor="0.7", linewidth=0.5)
    return finish(figure, path)
