"""Shared by all figures: fonts, tokens made visible, colours, lines, axes, legends, and the way to a file."""

import os
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.ticker import MaxNLocator

from causalcone.analysis.tables.names import COLORS
from causalcone.analysis.tables.traces import STATE, State

PathLike = str | os.PathLike[str]
LineStyle = tuple[Any, str, str]
"""Colour, marker and dash."""

# The hues of lines, with a marker for print in grey.
LINES = tuple(
    (COLORS[color], marker)
    for color, marker in zip(("vermilion", "blue", "green", "orange", "purple", "sky", "black"), "os^DvPX", strict=True)
)
# One hue per kind of state, as in the published figures; lightness falls steadily, so they read in grey as well.
# Heads and what else there may be are blue.
KIND_COLORS = {"hidden": "Purples", "mlp": "Greens", "attn": "Reds"}
KIND_NAMES = {"hidden": "hidden state", "mlp": "MLP output", "attn": "attention output"}
_MODULES = {"mlp": "MLP", "attn": "attention", "both": "MLP and attention"}
METHOD_NAMES = {f"sever_{module}": f"{name} severed" for module, name in _MODULES.items()}

UNKNOWN: dict[str, Any] = {"facecolor": "0.95", "hatch": "////", "edgecolor": "0.8"}
"""Cells without a value, which must not look like a low one."""

_SPACES = {" ": "␣", "\n": "↵", "\r": "⇤", "\t": "⇥"}
_OTHER_FONTS = ("Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari")
_LONGEST_TOKEN = 24


@cache
def font_families() -> tuple[str, ...]:
    """Matplotlib's own font, and fonts for other scripts where they are installed."""
    installed = set(fontManager.get_font_names())
    return ("DejaVu Sans", *(name for name in _OTHER_FONTS if name in installed))


@cache
def _drawable_characters() -> frozenset[int]:
    fonts = (get_font(findfont(FontProperties(family=name))) for name in font_families())
    return frozenset(code for font in fonts for code in font.get_charmap())


def drawable(text: str) -> str:
    """``text`` with an empty box for every character that is unprintable or in none of the fonts."""
    return "".join(c if c.isprintable() and ord(c) in _drawable_characters() else "▯" for c in text)


def visible_token(text: str) -> str:
    """A token's text with spaces and line breaks as signs, shortened if very long."""
    shown = drawable("".join(_SPACES.get(character, character) for character in text)) or "∅"
    return shown if len(shown) <= _LONGEST_TOKEN else shown[: _LONGEST_TOKEN - 1] + "…"


def plain(size: float, **more: Any) -> dict[str, Any]:
    """Text properties for text that is shown as it is: "$" starts no formula, whatever the user's settings."""
    return {"fontsize": size, "fontfamily": list(font_families()), "parse_math": False, "usetex": False, **more}


def states_of(frame: pl.DataFrame) -> list[State]:
    """The states of a table: plain restoring before severed, kinds in their usual order, small windows first."""

    def order(state: State) -> tuple[bool, str, tuple[int, str, int], int]:
        method, kind, window = state
        return method != "restore", method, kind_order(kind), window

    return sorted(frame.select(STATE).unique().rows(), key=order)


def kind_order(kind: str) -> tuple[int, str, int]:
    """To sort kinds in their usual order, and heads by number after them."""
    rank = list(KIND_NAMES).index(kind) if kind in KIND_NAMES else len(KIND_NAMES)
    name, _, number = kind.partition(".")
    return rank, name, int(number) if number.isdigit() else -1


def layer_count(frame: pl.DataFrame) -> int:
    return int(frame["layer"].to_numpy().max()) + 1


def state_title(state: State) -> str:
    """The intervention, as a heading."""
    method, kind, window = state
    severed = METHOD_NAMES.get(method)
    intervention = "Zeroing" if method == "zero" else "Restoring"
    return f"{intervention} {kind_name(kind, window)}" + (f",\n{severed}" if severed else "")


def kind_name(kind: str, window: int) -> str:
    """A state in words."""
    head = kind.removeprefix("head.")
    if head != kind:
        return f"head {head}" if window == 1 else f"head {head} of {window} layers"
    name = KIND_NAMES.get(kind, kind)
    return f"one {name}" if window == 1 else f"{window} {name}s"


def layer_axis(axes: Axes, window: int, layers: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 4, 5, 10], integer=True))
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_xlabel("layer" if window == 1 else "centre layer of the window", fontsize=9)
    axes.tick_params(axis="x", labelsize=8, length=3, color="0.4")


def value_axis(axes: Axes, label: str | None = None) -> None:
    """The vertical axis of values, without a frame around them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    if label is not None:
        axes.set_ylabel(label, fontsize=9)


def line(
    axes: Axes, means: pl.DataFrame, style: LineStyle, label: str, *, column: str = "effect", band: bool = True
) -> None:
    """One line of a column by layer, with a band of 1.96 standard errors."""
    color, marker, dash = style
    layer, mean, error = by_layer(means, column)
    if band:
        axes.fill_between(layer, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
    look = {"color": color, "marker": marker, "linestyle": dash, "markersize": 4.5, "linewidth": 1.6}
    axes.plot(layer, mean, **look, markevery=max(1, len(layer) // 12), label=label)


def by_layer(means: pl.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Layers, means, and 1.96 standard errors, NaN where there are none."""
    ordered = means.sort("layer")
    error = 1.96 * ordered["standard_error"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    return ordered["layer"].to_numpy(), ordered[column].to_numpy(), error


def mean_of(facts: int, bands: bool = True) -> str:
    return "one fact" if facts == 1 else f"mean of {facts} facts" + " with 95 % intervals" * bands


def title(figure: Figure, text: str) -> None:
    """A title of all panels, in as many lines as it needs at about ten letters an inch."""
    figure.suptitle(textwrap.fill(text, int(10 * figure.get_figwidth())), fontsize=11, fontweight="bold")


def legend(figure: Figure, columns: int, axes: Axes | None = None, **options: Any) -> None:
    """The legend of all panels, below them; of one panel's lines where that is given."""
    if axes is not None:
        options["handles"], options["labels"] = axes.get_legend_handles_labels()
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False, **options)


def grid(rows: pl.DataFrame, key: str, names: Sequence[Any], column: str, layers: int) -> np.ndarray:
    """A column as (names of the key, layers), NaN where the table has no row."""
    values = np.full((len(names), layers), np.nan)
    numbers = {name: number for number, name in enumerate(names)}
    for name, layer, value in rows.select(key, "layer", column).iter_rows():
        values[numbers[name], layer] = value
    return values


def cells(axes: Axes, values: np.ndarray, scale: Normalize, colors: str) -> QuadMesh:
    """Values (rows, layers) as cells, the first row at the top."""
    edges = (np.arange(size + 1) - 0.5 for size in reversed(values.shape))
    shown = np.ma.masked_invalid(values)
    mesh = axes.pcolormesh(*edges, shown, cmap=colors, norm=scale, edgecolors="white", linewidth=0.4)
    if np.isnan(values).any():
        axes.patch.set(**UNKNOWN)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    return mesh


def color_bar(figure: Figure, axes: Axes, mesh: QuadMesh, label: str = "", aspect: int = 18, **more: Any) -> Colorbar:
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=aspect, **more)
    bar.ax.tick_params(labelsize=8, length=2, color="0.4")
    if label:
        bar.ax.set_title(label, fontsize=8.5, loc="left", pad=9)
    bar.outline.set(edgecolor="0.7", linewidth=0.5)
    return bar


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, drawn without a display and without pyplot's list of figures."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Figure, path: PathLike | None) -> Figure:
    """Write the figure where a path is given; the suffix chooses the format."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
    return figure
