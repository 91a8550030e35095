"""Where the texts of a figure are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox


def visible_texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text with ink on it and its place in pixels; ticks outside an axis's range are not drawn."""
    figure.canvas.draw()
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        if axes.get_visible():
            texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]  # type: ignore[attr-defined]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
                texts += [label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()]
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]


def texts_outside(figure: Figure, texts: Sequence[tuple[str, Bbox]]) -> list[str]:
    """The texts that leave the figure."""
    page = figure.bbox
    return [t for t, box in texts if box.x0 < page.x0 or box.y0 < page.y0 or box.x1 > page.x1 or box.y1 > page.y1]
