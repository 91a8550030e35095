"""The figures show what the table holds: rows, scales, marks and texts, with nothing overlapping."""

from __future__ import annotations

import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers.figures import texts_outside, visible_texts
from helpers.trace_tables import fact_traces, made_up_traces
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.transforms import Bbox

from causalcone.analysis import TableError, average_indirect_effect, plot
from causalcone.analysis.plot.draw import KIND_COLORS, visible_token

TOKENS = ["The", " mother", " tongue", " of", " Danielle", " Dar", "rie", "ux", " is"]
SUBJECT = (4, 8)


@pytest.fixture
def traces() -> pl.DataFrame:
    return made_up_traces(TOKENS, SUBJECT, layers=12)


def maps_of(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_title().startswith("Restoring")]


def row_labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def color_bar(figure: Figure) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == "p(target)")


def test_heatmap_shows_every_token_and_layer(traces: pl.DataFrame) -> None:
    figure = plot.heatmap(traces, fact_id="0", kind="mlp", window=10)
    (axes,) = maps_of(figure)
    (mesh,) = axes.collections
    shown = traces.filter(kind="mlp").sort("token", "layer")["p_patched"].to_numpy().reshape(9, 12)
    assert np.array_equal(np.asarray(mesh.get_array()), shown)
    assert mesh.get_clim() == (0.05, max(0.8, shown.max()))
    assert axes.get_xlim() == (-0.5, 11.5)
    assert axes.get_ylim() == (8.5, -0.5)  # the first token is at the top
    assert axes.get_title() == "Restoring 10 MLP outputs"
    assert axes.get_xlabel() == "centre layer of the window"
    assert figure.get_suptitle() == "The mother tongue of Danielle Darrieux is"


def test_subject_is_marked(traces: pl.DataFrame) -> None:
    (axes,) = maps_of(plot.heatmap(traces, "0"))
    labels = axes.get_yticklabels()
    marked = ["The", "␣mother", "␣tongue", "␣of", "␣Danielle*", "␣Dar*", "rie*", "ux*", "␣is"]
    assert row_labels(axes) == marked
    assert [label.get_fontweight() for label in labels] == ["normal"] * 4 + ["bold"] * 4 + ["normal"]
    (bracket,) = axes.lines
    assert bracket.get_ydata() == pytest.approx([3.6, 3.6, 7.4, 7.4])
    assert axes.get_xlabel() == "layer"


@pytest.mark.parametrize(("kind", "window"), [("hidden", 1), ("mlp", 10), ("attn", 10)])
def test_each_kind_has_its_hue(traces: pl.DataFrame, kind: str, window: int) -> None:
    (axes,) = maps_of(plot.heatmap(traces, "0", kind, window))
    (mesh,) = axes.collections
    assert mesh.get_cmap().name == KIND_COLORS[kind]
    red, green, blue = colormaps[KIND_COLORS[kind]](np.linspace(0, 1, 64))[:, :3].T
    assert (np.diff(0.2126 * red + 0.7152 * green + 0.0722 * blue) < 0).all()


def test_color_bar_names_the_clean_and_the_corrupted_run() -> None:
    def labels(p_clean: float, p_corrupted: float, p_patched: float) -> list[str]:
        values = {(0, 0): p_patched, (1, 0): p_corrupted}
        table = fact_traces(values, tokens=["A"], subject=(0, 1), p_clean=p_clean, p_corrupted=p_corrupted)
        return [label.get_text() for label in color_bar(plot.heatmap(table, "0")).get_yticklabels()]

    assert {"0.1 corrupted", "0.8 clean", "0.4"} <= set(labels(0.8, 0.1, 0.4))
    assert {"0.1 corrupted", "0.6 clean", "0.8"} <= set(labels(0.6, 0.1, 0.9))
    assert "0.1 corrupted\n0.11 clean" in labels(0.11, 0.1, 0.9)
    assert labels(0.1, 0.3, 0.2) == ["0.3 corrupted\n0.1 clean"]


def test_values_below_the_corrupted_run_show_as_an_arrow(traces: pl.DataFrame) -> None:
    lower = traces.with_columns(p_patched=pl.when(token=2).then(0.01).otherwise("p_patched"))
    above, below = (plot.heatmap(table, "0").axes[0].collections[0].colorbar for table in (traces, lower))
    assert above is not None
    assert below is not None
    assert (above.extend, below.extend) == ("neither", "min")


def test_what_was_not_computed_is_hatched(traces: pl.DataFrame) -> None:
    partial = traces.filter((pl.col("token") >= 4) & ((pl.col("token") != 6) | (pl.col("layer") > 2)))
    (axes,) = maps_of(plot.heatmap(partial, "0"))
    (mesh,) = axes.collections
    hidden = np.ma.getmaskarray(np.ma.asarray(mesh.get_array()))
    assert row_labels(axes) == ["␣Danielle*", "␣Dar*", "rie*", "ux*", "␣is"]
    assert np.argwhere(hidden).tolist() == [[2, 0], [2, 1], [2, 2]]
    assert axes.patch.get_hatch()
    assert not maps_of(plot.heatmap(traces, "0"))[0].patch.get_hatch()


def test_heatmaps_show_every_state_on_one_scale(traces: pl.DataFrame) -> None:
    severed = traces.filter(kind="hidden").with_columns(method=pl.lit("sever_mlp"), p_patched=pl.lit(0.9))
    figure = plot.heatmaps(pl.concat([severed, traces]), "0")
    axes = maps_of(figure)
    assert [each.get_title() for each in axes] == [
        "Restoring one hidden state",
        "Restoring 10 MLP outputs",
        "Restoring 10 attention outputs",
        "Restoring one hidden state,\nMLP severed",
    ]
    assert {each.collections[0].get_clim() for each in axes} == {(0.05, 0.9)}
    assert [row_labels(each)[0] for each in axes] == ["The", "", "", "The"]  # labels at the left edge only
    assert sum(not each.get_visible() for each in figure.axes) == 2


def test_files_are_written(traces: pl.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "map.png"
    figure = plot.heatmap(traces, "0", path=path)
    pixels = imread(path)[:, :, :3]
    width, height = figure.get_size_inches() * 200
    assert pixels.shape[:2] == pytest.approx((height, width), abs=1)
    darkest = np.array(colormaps["Purples"](1.0)[:3])
    assert (np.abs(pixels - darkest).max(axis=2) < 0.02).sum() > 100
    plot.heatmaps(traces, "0", tmp_path / "maps.pdf")
    assert (tmp_path / "maps.pdf").read_bytes().startswith(b"%PDF")
    plot.indirect_effect(traces, tmp_path / "roles.svg")
    assert "<svg" in (tmp_path / "roles.svg").read_text(encoding="utf-8")


def test_plotting_leaves_the_settings_alone(traces: pl.DataFrame) -> None:
    before = dict(rcParams)
    plot.heatmaps(traces, "0")
    plot.indirect_effect(traces)
    assert dict(rcParams) == before


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a b", "␣a␣b"),
        ("\n\n", "↵↵"),
        ("\t\r", "⇥⇤"),
        ("", "∅"),
        ("a\x00\u200b", "a▯▯"),
        ("\ufffd", "\ufffd"),
        ("\U0010fffd", "▯"),
        ("$x_1$ \\frac{", "$x_1$␣\\frac{"),
        ("-" * 60, "-" * 23 + "…"),
    ],
)
def test_tokens_made_visible(text: str, shown: str) -> None:
    assert visible_token(text) == shown


def test_strange_tokens_are_shown_as_they_are(tmp_path: Path) -> None:
    tokens = [
        "$",
        " $x_{",
        "^2$",
        "\\frac",
        " 日本",
        "\U0001f5fe",
        "a\x00",
        "\ud7ff",
        "%",
        "\u202e ab",
        "ﷺ",
        " " * 50,
        "_",
    ]
    table = made_up_traces(tokens, (3, 6), layers=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot.heatmap(table, "0", path=tmp_path / "strange.png")
        plot.heatmaps(table, "0", tmp_path / "strange.pdf")
    (axes,) = maps_of(figure)
    assert row_labels(axes)[:4] == ["$", "␣$x_{", "^2$", "\\frac*"]
    assert figure.get_suptitle().startswith("$ $x_{^2$\\frac")


def test_prompt_of_tokens_without_spaces_is_readable() -> None:
    table = made_up_traces(["The", "city", "of", "Rome"], (3, 4), layers=4)
    assert plot.heatmap(table, "0").get_suptitle() == "The city of Rome"
    table = made_up_traces(["▁The", "▁city", "▁of", "▁Ro", "me"], (3, 5), layers=4)
    assert plot.heatmap(table, "0").get_suptitle() == "The city of Rome"


def test_missing_facts_and_states_are_named(traces: pl.DataFrame) -> None:
    with pytest.raises(TableError, match="no traces of fact '7'; there are '0'"):
        plot.heatmap(traces, "7")
    with pytest.raises(TableError, match="has no mlp:3; it has hidden:1, mlp:10, attn:10"):
        plot.heatmap(traces, "0", "mlp", 3)
    with pytest.raises(TableError, match=r"has no hidden:1 \(sever_mlp\)"):
        plot.heatmap(traces, "0", method="sever_mlp")
    with pytest.raises(TableError, match="no restored state"):
        plot.indirect_effect(traces.with_columns(method=pl.lit("zero")))


def test_indirect_effect_lines_are_the_averages() -> None:
    table = pl.concat(
        [made_up_traces(TOKENS, SUBJECT, 6, seed=i, fact_id=str(i), p_clean=0.4 + i / 9) for i in range(4)]
    )
    averages = average_indirect_effect(table)
    figure = plot.indirect_effect(table)
    columns = maps_of(figure)
    for axes, (kind, window) in zip(columns, [("hidden", 1), ("mlp", 10), ("attn", 10)], strict=True):
        lines = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
        assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 6
        assert len({line.get_color() for line in lines.values()}) == len({line.get_marker() for line in lines.values()})
        expected = averages.filter(kind=kind, window=window, role="last_subject")
        assert lines["last subject token"].get_ydata() == pytest.approx(expected["effect"].to_list())
        band = axes.collections[2].get_paths()[0].get_extents()  # roles in order: last subject is the third
        spread = 1.96 * expected["standard_error"]
        assert band.ymax == pytest.approx((expected["effect"] + spread).max())
        assert band.ymin == pytest.approx((expected["effect"] - spread).min())
    assert columns[0].get_ylim() == columns[1].get_ylim() == columns[2].get_ylim()
    assert figure.get_suptitle() == "Average indirect effect over 4 facts, with 95 % intervals"


def test_indirect_effect_of_more_states_than_fit_in_a_row() -> None:
    states = [("hidden", 1), ("mlp", 1), ("mlp", 5), ("mlp", 10)]
    figure = plot.indirect_effect(made_up_traces(TOKENS, SUBJECT, 6, states=states))
    titles = [axes.get_title() for axes in maps_of(figure)]
    assert titles == [
        "Restoring one hidden state",
        *(f"Restoring {n}" for n in ("one MLP output", "5 MLP outputs", "10 MLP outputs")),
    ]
    assert sum(not axes.get_visible() for axes in figure.axes) == 4


LONG_PROMPT = [" Auton", "omous", " University", " of", " Madrid", ","] + [f" word{i}" for i in range(19)]
SIZES = {
    "4 tokens, 6 layers": (["Oslo", " lies", " far", " in"], (0, 1), 6),
    "9 tokens, 12 layers": (TOKENS, SUBJECT, 12),
    "25 tokens, 48 layers": (LONG_PROMPT, (0, 5), 48),
    "long labels": (["x" * 40, " y" * 12, "z"], (0, 1), 6),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("heatmap", name) for name in SIZES),
        *(("heatmaps", name) for name in ("4 tokens, 6 layers", "25 tokens, 48 layers")),
        *(("indirect_effect", name) for name in ("4 tokens, 6 layers", "25 tokens, 48 layers")),
    ],
)
def test_no_text_overlaps_another_or_leaves_the_figure(kind: str, name: str) -> None:
    tokens, subject, layers = SIZES[name]
    table = made_up_traces(tokens, subject, layers)
    if kind == "heatmap":
        figure = plot.heatmap(table, "0", "attn", 10)
    elif kind == "heatmaps":
        severed = table.with_columns(method=pl.lit("sever_both"))
        figure = plot.heatmaps(pl.concat([table, severed]), "0")
    else:
        figure = plot.indirect_effect(table)
    texts = visible_texts(figure)
    assert len(texts) > len(tokens)
    assert texts_outside(figure, texts) == []
    assert [(a, b) for (a, one), (b, other) in combinations(texts, 2) if Bbox.intersection(one, other)] == []
