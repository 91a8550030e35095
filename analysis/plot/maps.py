"""Token-by-layer maps: what their figures share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from causalcone.analysis.plot.parts import drawable, new_figure, plain, visible_token

MAP_COLUMNS = 3
_POINT = 1 / 72


def prompt_text(texts: Sequence[str]) -> str:
    """Tokens' texts as a line."""
    glue = "" if any(text[:1] in (" ", "▁") for text in texts) else " "  # some tokenizers drop each token's space
    return drawable(glue.join(texts).replace("▁", " ").replace("\n", "↵").strip())


def token_grid(cells: pl.DataFrame, column: str, tokens: Sequence[int], layers: int) -> NDArray[np.float64]:
    """A column as (tokens, layers), NaN where the table has no row."""
    values = np.full((len(tokens), layers), np.nan)
    row = {token: place for place, token in enumerate(tokens)}
    for token, layer, value in cells.select("token", "layer", column).iter_rows():
        values[row[token], layer] = value
    return values


def draw_map(axes: Axes, values: NDArray[np.float64], scale: Normalize, colors: str) -> QuadMesh:
    """Values (tokens, layers) as cells, the first token at the top."""
    tokens, layers = values.shape
    mesh = axes.pcolormesh(
        np.arange(layers + 1) - 0.5,
        np.arange(tokens + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=colors,
        norm=scale,
        edgecolors="white",
        linewidth=0.4,
    )
    if np.isnan(values).any():  # what was not computed must not look like a low probability
        axes.patch.set(facecolor="0.95", hatch="////", edgecolor="0.8")
    axes.set_ylim(tokens - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    return mesh


def label_tokens(figure: Figure, axes: Axes, texts: Sequence[str], inside: Sequence[bool], labels: bool) -> None:
    """Token texts as row labels, those ``inside`` the subject set off by weight, asterisk and bracket."""
    shown = map(visible_token, texts)
    marked = [f"{text}*" if subject else text for text, subject in zip(shown, inside, strict=True)]
    axes.set_yticks(range(len(marked)), marked if labels else [""] * len(marked))
    axes.tick_params(axis="y", length=0, pad=11)
    for label, subject in zip(axes.get_yticklabels(), inside, strict=True):
        label.set(**plain(8.5, fontweight="bold" if subject else "normal", color="black" if subject else "0.25"))
    if any(inside):
        first, last = inside.index(True), len(inside) - 1 - inside[::-1].index(True)
        aside = ScaledTranslation(-7 * _POINT, 0, figure.dpi_scale_trans)
        corners = [0.012, 0, 0, 0.012], [first - 0.4, first - 0.4, last + 0.4, last + 0.4]
        axes.plot(*corners, transform=axes.get_yaxis_transform() + aside, clip_on=False, color="0.15", linewidth=1.4)


def map_grid(maps: int, texts: Sequence[str], layers: int) -> tuple[Figure, list[Axes]]:
    """A figure with the prompt above places for so many maps of these tokens; those left over are hidden."""
    columns = min(maps, MAP_COLUMNS)
    rows = -(-maps // columns)
    map_width, map_height = min(5.2, max(2.4, 0.15 * layers)), max(1.3, 0.21 * len(texts))
    width = columns * (map_width + 1.3) + 0.4 + 0.09 * max(len(visible_token(text)) for text in texts)
    figure = new_figure(width, rows * (map_height + 0.8) + 0.6)
    shown = textwrap.fill(prompt_text(texts), int(width * 9), max_lines=3, placeholder=" …")
    figure.suptitle(shown, **plain(11, fontweight="bold"))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[maps:]:
        axes.set_visible(False)
    return figure, grid[:maps]
