"""Maps of one prompt: what stands where, in any width, encoding and colour, whatever the tokens are."""

import io
import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest
from rich.cells import cell_len
from rich.console import Console

from causalcone.analysis.prompt_map import PromptMap

TEXTS = ["The", " capital\n", "\tof", " 北京市", "[red]", "\x1b[31m", "<b>&", "e\u0301", "", " is"]
HEAD = ["The capital\n\tof 北京市[red]\x1b[31m<b>&e\u0301 is -> [bold]Paris", "p_clean 0.8, p_corrupted 0.1"]
DEPTH = 12
STATES = (("hidden", 1), ("mlp", 10), ("attn", 10))


def probability(kind, layer, token):
    return 0.1 + 0.7 * (layer + 1) / DEPTH * (token % 3) / 2 * (1 if kind == "hidden" else 0.5)


def made_map(depth=DEPTH, head=HEAD, **columns):
    same = {"method": "restore", "p_clean": 0.8, "p_corrupted": 0.1} | columns
    rows = [
        {"kind": kind, "window": window, "layer": layer, "token": token, "p_patched": probability(kind, layer, token)}
        | same
        for kind, window in STATES
        for layer in range(depth)
        for token in range(len(TEXTS))
    ]
    return PromptMap.of(pa.Table.from_pylist(rows), head, TEXTS, (3, 5))


def printed(shown, width=80, **options):
    file = io.StringIO()
    Console(file=file, width=width, **options).print(shown)
    return file.getvalue()


def test_cells_are_shares_of_the_way_from_corrupted_to_clean():
    wide = [line for line in printed(made_map(), 300).splitlines() if line.startswith(("␣is", "[red]"))]
    for line, token in zip(wide, (4, 9), strict=True):
        cells = [int(cell) for cell in line.split()[1:]]
        p = [probability(kind, layer, token) for kind, _ in STATES for layer in range(DEPTH)]
        assert cells == [round((value - 0.1) / 0.7 * 100) for value in p]
    narrow = [line for line in printed(made_map(), 40).splitlines() if line.startswith("␣is")]
    assert [len(line.split()) for line in narrow] == [13] * 3
    red = next(line for line in printed(made_map(), 40).splitlines() if line.startswith("[red]"))
    tenths = [int((probability("hidden", layer, 4) - 0.1) / 0.7 * 10 + 1e-9) for layer in range(DEPTH)]
    assert red.split()[1:] == [str(tenth or ".") for tenth in tenths]


def test_where_restoring_helps_beyond_clean_the_highest_is_the_end_of_the_scale():
    shown = printed(made_map(p_clean=0.4), 300)
    assert "the highest p (0.8)" in shown
    lost = printed(made_map(method="zero", p_corrupted=None), 300)
    assert "p_clean that zeroing takes away" in lost
    first = next(line for line in lost.splitlines() if line.split()[:2] == ["The", "88"])
    assert first.split()[1:] == ["88"] * DEPTH * 3  # (0.8 - 0.1) / 0.8


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("width", [20, 39, 40, 61, 80, 100, 133, 300])
def test_lines_fit_and_line_up(width, ascii_only):
    lines = [line.plain for line in made_map(48).lines(width, ascii_only)]
    assert max(map(cell_len, lines)) <= width
    assert all(line.isprintable() for line in lines)
    assert all(line.isascii() for line in lines) or not ascii_only
    blocks = "\n".join(line if line.strip() else "" for line in lines).split("\n\n")[1:-1]
    assert all(len({cell_len(line) for line in block.split("\n")}) == 1 for block in blocks)
    layers = [int(number) for block in blocks for number in block.split("\n")[-1].split()[1:]]
    assert {0, 40} <= set(layers)


def test_subjects_are_marked_and_tokens_are_one_line_each():
    lines = printed(made_map()).splitlines()
    first = next(number for number, line in enumerate(lines) if "hidden:1" in line) + 1
    assert [line.split()[0] for line in lines[first : first + len(TEXTS)]] == [
        "The", "␣capital↵", "⇥of", "␣北京市*", "[red]*", "▯[31m", "<b>&", "e\u0301", "∅", "␣is",
    ]  # fmt: skip
    assert "[bold]Paris" in lines[0] + lines[1]


def test_colours_are_those_of_the_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = printed(made_map(), color_system=None)
    coloured = printed(made_map(), force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;0;0;0;48;2;239;237;245m" in coloured
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert "48;2" not in printed(made_map(), force_terminal=True, color_system="truecolor")


def test_terminals_without_utf_8_get_ascii(monkeypatch):
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    Console(file=latin, width=80).print(made_map())
    latin.seek(0)
    assert "\\u5317" in latin.read()
    monkeypatch.setattr("sys.stdout", latin)
    print(made_map())
    assert str(made_map()).isascii()


class Page(HTMLParser):
    """What a browser would show, the tags of it and their colours."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.grounds = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.grounds += re.findall("background-color: (#[0-9a-f]{6})", dict(attributes).get("style", ""))

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_data(self, data):
        self.text += data


def test_notebooks_get_the_same_map_as_html():
    page = Page(made_map()._repr_html_())
    assert set(page.tags) == {"pre", "/pre", "span", "/span"}
    assert page.tags.count("span") == page.tags.count("/span")
    assert page.text.splitlines() == [line.plain for line in made_map().lines(120)]
    assert {"#efedf5", "#54278f"} <= set(page.grounds)
