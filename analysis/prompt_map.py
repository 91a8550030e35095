"""One prompt's table as a map of its tokens and the layers, drawn with characters: on the terminal, and as HTML."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

SIGNS = {" ": "␣", "\n": "↵", "\r": "⇤", "\t": "⇥"}
"""Signs for white space in tokens."""

Row = Mapping[str, Any]
Piece = tuple[str, str]
"""A text, and its style as rich names styles."""

_GAP, _WIDE, _NARROW = 2, 4, 2
"""Columns between panels, of a cell that holds percent, and of one that holds tenths after a space."""
_PAGE = 120
"""Columns in notebooks."""
_HUES = {"hidden": ("efedf5", "54278f"), "mlp": ("e5f5e0", "005a32"), "attn": ("fee0d2", "a50f15")}
_OTHER = ("deebf7", "08306b")
"""Colours of nothing and of all: the hues of figures."""


@dataclass(frozen=True)
class Panel:
    """The map of one state. shares: of the scale, by row of the map and layer."""

    title: str
    kind: str
    layers: range
    shares: Mapping[tuple[int, int], float]

    def width(self, cell: int) -> int:
        return _GAP + max(len(self.title), len(self.layers) * cell)

    def cells(self, row: int, cell: int) -> Iterator[Piece]:
        yield " " * _GAP, ""
        for layer in self.layers:
            share = self.shares.get((row, layer))
            tenths = min(9, int(max(0.0, share or 0.0) * 10 + 1e-9))
            shown = f"{min(9.99, max(-9.99, share or 0.0)) * 100:z.0f}" if cell == _WIDE else str(tenths or ".")
            yield ("", "") if share is None else (f"{shown:>{cell}}", self._style(share))
        yield " " * (self.width(cell) - _GAP - len(self.layers) * cell), ""

    def _style(self, share: float) -> str:
        part = min(1.0, max(0.0, share))
        ends = zip(*map(bytes.fromhex, _HUES.get(self.kind, _OTHER)), strict=True)
        ground = bytes(round(low + part * (high - low)) for low, high in ends).hex()
        return f"{'#ffffff' if part > 0.5 else '#000000'} on #{ground}"

    def axis(self, cell: int) -> str:
        """Numbers of layers below their cells, as many as can be told apart."""
        digits, line = len(str(self.layers[-1])), ""
        step = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if step * cell > digits)
        for place, layer in enumerate(self.layers, start=1):
            if layer % step == 0:
                line = line.ljust(_GAP + place * cell - len(str(layer))) + str(layer)
        return line.ljust(self.width(cell))


@dataclass(frozen=True, repr=False)
class PromptMap:
    """A prompt's tokens and the layers: ``print`` shows them on the terminal, a notebook as HTML.

    Attributes:
        table: The prompt's rows, with the columns of ``TRACE_SCHEMA`` or ``GRADIENT_SCHEMA``.
        head: Lines above the map: prompt, answer and probabilities.
        labels: Texts of the rows' tokens.
        inside: Whether they are the subject's.
        panels: The map of each state.
        scale: What a cell is a share of, in words.
    """

    table: pa.Table
    head: tuple[str, ...]
    labels: tuple[str, ...]
    inside: tuple[bool, ...]
    panels: tuple[Panel, ...]
    scale: str

    @classmethod
    def of(cls, table: pa.Table, head: Sequence[str], texts: Sequence[str], subject: tuple[int, int]) -> PromptMap:
        """The map of a table of one fact.

        Args:
            table: Its traces or gradients.
            head: Lines to stand above the map.
            texts: Of all tokens of its prompt.
            subject: The half-open range of those that are the subject's.
        """
        rows: list[Row] = table.to_pylist()
        tokens = sorted({row["token"] for row in rows}, key=lambda token: -1 if token is None else token)
        at = {token: number for number, token in enumerate(tokens)}
        share, scale = _scale(rows)
        states: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
        for row in rows:
            states.setdefault((_title(row), row["kind"]), {})[at[row["token"]], row["layer"]] = share(row)
        panels = (Panel(*state, range(1 + max(layer for _, layer in of)), of) for state, of in states.items())
        labels = ("together" if token is None else texts[token] for token in tokens)
        inside = (token is not None and subject[0] <= token < subject[1] for token in tokens)
        return cls(table, tuple(head), tuple(labels), tuple(inside), tuple(panels), scale)

    def __str__(self) -> str:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        lines = self.lines(shutil.get_terminal_size().columns, not encoding.lower().startswith("utf"))
        return "\n".join(line.plain.rstrip() for line in lines)

    __repr__ = __str__

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Text]:
        """What rich prints: in colour where the terminal has it."""
        return self.lines(options.max_width, options.ascii_only)

    def _repr_html_(self) -> str:
        console = Console(record=True, file=io.StringIO(), width=_PAGE, force_jupyter=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.3">{code}</pre>')

    def lines(self, width: int = 80, ascii_only: bool = False) -> Iterator[Text]:
        """Lines of at most ``width`` columns. Cells hold percent where there is room, else tenths."""
        marked = [visible(text, ascii_only) + "*" * own for text, own in zip(self.labels, self.inside, strict=True)]
        room = min(max(map(cell_len, (*marked, "layer"))), max(6, width // 4))
        cell, bands = self._layout(width - room)
        for text in self.head:
            yield from _wrapped(text, width, ascii_only)
        for band in bands:
            yield Text()
            yield _line((" " * room, ""), *((_fitted("  " + panel.title, panel.width(cell)), "bold") for panel in band))
            for row, label in enumerate(marked):
                shown = _fitted(label, room, "~" if ascii_only else "…"), "bold" * self.inside[row]
                yield _line(shown, *(piece for panel in band for piece in panel.cells(row, cell)))
            yield _line(("layer".ljust(room), "dim"), *((panel.axis(cell), "dim") for panel in band))
        yield Text()
        unit = "percent" if cell == _WIDE else "0-9: tenths"
        yield from _wrapped(f"{unit} of {self.scale}; *: the subject", width, ascii_only)

    def _layout(self, free: int) -> tuple[int, list[list[Panel]]]:
        """The width of cells, and the panels side by side in bands: all in one where that can be read, else cells as
        wide as one panel can have them; a panel of too many layers in pieces."""
        fitting = (c for fit in (sum, max) for c in (_WIDE, _NARROW) if fit(p.width(c) for p in self.panels) <= free)
        cell = next(fitting, 1)
        most = max(1, (free - _GAP) // cell)
        pieces = (replace(p, layers=p.layers[i : i + most]) for p in self.panels for i in range(0, len(p.layers), most))
        bands: list[list[Panel]] = []
        for piece in pieces:
            if not bands or sum(panel.width(cell) for panel in (*bands[-1], piece)) > free:
                bands.append([])
            bands[-1].append(piece)
        return cell, bands


def visible(text: str, ascii_only: bool = False) -> str:
    """A token's text on one line: white space as signs, an empty box for what cannot be printed; or, in ASCII alone,
    as Python escapes it."""
    if ascii_only:
        return "".join("_" if c == " " else c.encode("unicode_escape").decode() for c in text) or "''"
    return "".join(SIGNS.get(c, c if c.isprintable() else "▯") for c in text) or "∅"


def one_line(text: str, ascii_only: bool = False) -> str:
    """A text as ``visible`` shows it, spaces apart."""
    return " ".join(visible(word, ascii_only) if word else "" for word in text.split(" "))


def _title(row: Row) -> str:
    method = row.get("method", "")
    window = f":{row['window']}" if "window" in row else ""
    return f"{row['kind']}{window}" + (f" {method}" if method.startswith("sever") else "")


def _scale(rows: Sequence[Row]) -> tuple[Callable[[Row], float], str]:
    """A row's share of the scale, and what that is a share of in words."""
    if "norm" in rows[0]:
        most = {row["kind"]: 0.0 for row in rows}
        for row in rows:
            most[row["kind"]] = max(row["norm"], most[row["kind"]], 1e-300)
        return lambda row: row["norm"] / most[row["kind"]], "the largest norm of integrated gradients of a kind"
    clean, low = rows[0]["p_clean"], rows[0]["p_corrupted"]
    if rows[0]["method"] == "zero":
        return lambda row: (clean - row["p_patched"]) / max(clean, 1e-300), "p_clean that zeroing takes away"
    high = max(clean, low, *(row["p_patched"] for row in rows))
    whole = "p_clean" if high == clean else f"the highest p ({high:.3g})"
    return lambda row: (row["p_patched"] - low) / ((high - low) or 1.0), f"the way back from p_corrupted to {whole}"


def _line(*pieces: Piece) -> Text:
    return Text.assemble(*pieces, no_wrap=True)


def _fitted(text: str, room: int, cut: str = "") -> str:
    """A text in exactly so many columns."""
    return set_cell_size(text if cell_len(text) <= room else set_cell_size(text, room - len(cut)) + cut, room)


def _wrapped(text: str, width: int, ascii_only: bool) -> Iterator[Text]:
    yield from Text(one_line(text, ascii_only)).wrap(Console(), width)
