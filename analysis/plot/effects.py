"""Figures of tracing effects by window size: means by layer, and where they peak (Hase et al. 2023, Figs. 10, 11)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from causalcone.analysis.effects import Compat, concentrated_facts, mean_effects
from causalcone.analysis.plot.parts import finish, layer_axis, layer_count, new_figure
from causalcone.analysis.tables.traces import TableError

PathLike = str | os.PathLike[str]

# Okabe and Ito's colours with a marker and a dash each, for print in grey.
_STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#000000", "D", ":"),
    ("#CC79A7", "v", "-"),
)


def effects_by_window(
    effects: Mapping[int, pl.DataFrame], path: PathLike | None = None, *, compat: Compat | None = None
) -> Figure:
    """Mean tracing effect by layer, a line for each window size with a band of 1.96 standard errors (Hase et al. 2023,
    Fig. 10). ``effects`` is what ``tracing_effects`` gives, by window size; see ``mean_effects``. Sizes without any
    effect are left out.

    Raises ``TableError`` where no size is left.
    """
    effects = _known(effects)
    layers = max(layer_count(each) for each in effects.values())
    figure = new_figure(max(6.0, min(9.0, 0.2 * layers + 3.6)), 3.8)
    axes = figure.subplots()
    for (size, each), (color, marker, dash) in zip(sorted(effects.items()), _styles(len(effects)), strict=True):
        means = mean_effects(each, compat)
        layer, mean = means["layer"].to_numpy(), means["mean"].to_numpy()
        band = 1.96 * means["standard_error"].fill_null(np.nan).to_numpy()
        axes.fill_between(layer, mean - band, mean + band, color=color, alpha=0.15, linewidth=0)
        axes.plot(
            layer, mean, color=color, marker=marker, linestyle=dash, linewidth=1.6, markersize=4.5,
            markevery=max(1, len(layer) // 12), label="one layer" if size == 1 else f"{size} layers",
        )  # fmt: skip
    layer_axis(axes, max(effects), layers)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("fraction of p(target) restored", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    facts = max(each["fact_id"].n_unique() for each in effects.values())
    which = ", positive effects only" if compat == "published" else ""
    figure.suptitle(
        f"Tracing effect, largest over tokens, mean of {facts} facts{which}", fontsize=11, fontweight="bold"
    )
    figure.legend(loc="outside lower center", ncols=5, fontsize=8.5, frameon=False, handlelength=3)
    return finish(figure, path)


def peak_layers_by_window(effects: Mapping[int, pl.DataFrame], path: PathLike | None = None) -> Figure:
    """At which layer facts have their largest tracing effect, as a share of the facts: a panel for each window size
    (Hase et al. 2023, Fig. 11). Facts without a positive effect have no such layer and are left out; the panel says how
    many. Arguments and errors as those of ``effects_by_window``."""
    effects = _known(effects)
    layers = max(layer_count(each) for each in effects.values())
    width = max(2.6, min(5.0, 0.12 * layers + 1.6))
    figure = new_figure(width * len(effects) + 0.5, 3.0)
    grid = figure.subplots(1, len(effects), squeeze=False, sharey=True)[0]
    for axes, (size, each), (color, _, _) in zip(grid, sorted(effects.items()), _styles(len(effects)), strict=True):
        facts = concentrated_facts(each)
        peaks = facts.filter(pl.col("peak_effect") > 0)["peak_layer"].to_numpy()
        share = np.bincount(peaks, minlength=layers) / max(1, len(peaks))
        apart = len(facts) - len(peaks)
        axes.bar(np.arange(layers), share, color=color, width=0.85)
        named = "one layer" if size == 1 else f"{size} layers"
        axes.set_title(f"{named}\n({apart} without effect)" if apart else named, fontsize=10)
        layer_axis(axes, size, layers)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", labelsize=8)
    grid[0].set_ylabel("share of facts", fontsize=9)
    figure.suptitle("Layer of the largest tracing effect, by size of the window", fontsize=11, fontweight="bold")
    return finish(figure, path)


def _styles(count: int) -> list[tuple[str, str, str]]:
    return [_STYLES[number % len(_STYLES)] for number in range(count)]


def _known(effects: Mapping[int, pl.DataFrame]) -> dict[int, pl.DataFrame]:
    """The sizes with effects that are known."""
    known = {size: each.drop_nulls("effect") for size, each in effects.items()}
    known = {size: each for size, each in known.items() if not each.is_empty()}
    if not known:
        raise TableError("there are no effects to draw; trace at least one state")
    return known
