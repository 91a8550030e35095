"""Figures of tracing effects by window size: means by layer, and where they peak (Hase et al. 2023, Figs. 10, 11)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from causalcone.analysis.effects import Compat, concentrated_facts, mean_effects
from causalcone.analysis.plot import draw
from causalcone.analysis.tables.names import COLORS, counted, window_name
from causalcone.analysis.tables.traces import TableError

_LOOKS = zip(("blue", "vermilion", "green", "black", "purple"), "os^Dv", ("-", "--", "-.", ":", "-"), strict=True)
_STYLES: tuple[draw.LineStyle, ...] = tuple((COLORS[color], marker, dash) for color, marker, dash in _LOOKS)


def effects_by_window(
    effects: Mapping[int, pl.DataFrame], path: draw.PathLike | None = None, *, compat: Compat | None = None
) -> Figure:
    """Mean tracing effect by layer, a line for each window size with a band of 1.96 standard errors (Hase et al. 2023,
    Fig. 10). ``effects``: by window size, as ``tracing_effects`` returns them; see ``mean_effects``. Sizes without any
    effect are left out; ``TableError`` where no size is left."""
    effects = _known(effects)
    layers = max(map(draw.layer_count, effects.values()))
    figure = draw.new_figure(max(6.0, min(9.0, 0.2 * layers + 3.6)), 3.8)
    axes = figure.subplots()
    for number, size in enumerate(sorted(effects)):
        means = mean_effects(effects[size], compat)
        draw.line(axes, means, _STYLES[number % len(_STYLES)], window_name(size), column="mean")
    draw.layer_axis(axes, max(effects), layers)
    axes.set_ylim(bottom=0)
    draw.value_axis(axes, "fraction of p(target) restored")
    facts = max(frame["fact_id"].n_unique() for frame in effects.values())
    positive = ", positive effects only" if compat == "published" else ""
    draw.title(figure, f"Tracing effect, largest over tokens, {draw.mean_of(facts)}{positive}")
    draw.legend(figure, 5, handlelength=3)
    return draw.finish(figure, path)


def peak_layers_by_window(effects: Mapping[int, pl.DataFrame], path: draw.PathLike | None = None) -> Figure:
    """Layers of facts' largest tracing effects, as a share of the facts: a panel for each window size, which says how
    many facts have no effect and are left out (Hase et al. 2023, Fig. 11). See ``effects_by_window``."""
    effects = _known(effects)
    layers = max(map(draw.layer_count, effects.values()))
    width = max(2.6, min(5.0, 0.12 * layers + 1.6))
    figure = draw.new_figure(width * len(effects) + 0.5, 3.0)
    grid = figure.subplots(1, len(effects), squeeze=False, sharey=True)[0]
    for number, (axes, size) in enumerate(zip(grid, sorted(effects), strict=True)):
        facts = concentrated_facts(effects[size])
        peaks = facts.filter(pl.col("peak_effect") > 0)["peak_layer"].to_numpy()
        share = np.bincount(peaks, minlength=layers) / max(1, len(peaks))
        without = len(facts) - len(peaks)
        axes.bar(np.arange(layers), share, color=_STYLES[number % len(_STYLES)][0], width=0.85)
        title = window_name(size)
        axes.set_title(f"{title}\n({without} without effect)" if without else title, fontsize=10)
        draw.layer_axis(axes, size, layers)
        draw.value_axis(axes)
    grid[0].set_ylabel("share of facts", fontsize=9)
    count = max(frame["fact_id"].n_unique() for frame in effects.values())
    draw.title(figure, f"Layer of the largest tracing effect, by size of the window ({counted(count, 'fact')})")
    return draw.finish(figure, path)


def _known(effects: Mapping[int, pl.DataFrame]) -> dict[int, pl.DataFrame]:
    """The sizes with effects that are known."""
    known = {size: frame for size in effects if len(frame := effects[size].drop_nulls("effect"))}
    if not known:
        raise TableError("there are no effects to draw; trace at least one state")
    return known
