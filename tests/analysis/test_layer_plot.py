"""Figures of means by layer and of gradients show what the tables hold, with nothing overlapping."""

from itertools import combinations

import numpy as np
import polars as pl
import pytest
from helpers.figures import texts_outside, visible_texts
from helpers.trace_tables import fact_traces, made_up_traces
from matplotlib.transforms import Bbox

from causalcone.analysis import TableError, joint_effects, plot, severed_effects, zeroing_curve

TOKENS = ["The", " city", " of", " Big", " Rome", " is"]
SUBJECT = (3, 5)


def by_layer(layers, facts=3, method="zero", kind="mlp", window=5, seed=0):
    """Tables about several tokens together."""
    generator = np.random.default_rng(seed)
    tables = []
    for fact in range(facts):
        values = {(layer, 0): 0.9 * generator.random() for layer in range(layers)}
        names = {"fact_id": str(fact), "method": method, "kind": kind, "window": window}
        tables.append(fact_traces(values, tokens=TOKENS, subject=SUBJECT, p_clean=0.9, p_corrupted=0.1, **names))
    return pl.concat(tables).with_columns(token=pl.lit(None, pl.Int64), token_text=pl.lit(None, pl.String))


def severed_tables(layers, facts=3, states=(("hidden", 1),)):
    plain = pl.concat([made_up_traces(TOKENS, SUBJECT, layers, states, str(i), seed=i) for i in range(facts)])
    parts = [
        plain.with_columns(method=pl.lit(f"sever_{name}"), p_patched=pl.col("p_patched") * share)
        for name, share in (("mlp", 0.4), ("attn", 0.8), ("both", 0.3))
    ]
    return [plain, *parts]


def gradients_table(layers, kinds=("hidden", "mlp", "attn")):
    rows = [
        ("7", kind, layer, token, place + layer + token / 10, 0.1, 0.0)
        for place, kind in enumerate(kinds)
        for layer in range(layers)
        for token in range(len(TOKENS))
    ]
    return pl.DataFrame(rows, schema=["fact_id", "kind", "layer", "token", "norm", "total", "gap"], orient="row")


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}


def test_the_zeroing_curve_is_drawn():
    table = pl.concat([by_layer(6), by_layer(6, kind="head.3", window=1, seed=1)])
    figure = plot.zeroing(table)
    (axes,) = figure.axes
    lines, curve = lines_of(axes), zeroing_curve(table)
    assert list(lines) == ["5 MLP outputs", "head 3"]
    means = curve.filter(kind="mlp")
    assert lines["5 MLP outputs"].get_ydata() == pytest.approx(means["effect"].to_list())
    band = axes.collections[0].get_paths()[0].get_extents()
    assert band.ymax == pytest.approx((means["effect"] + 1.96 * means["standard_error"]).max())
    assert figure.get_suptitle() == "Effect of zeroing, mean of 3 facts with 95 % intervals"


def test_of_many_states_those_with_the_largest_effects_are_drawn():
    table = pl.concat([by_layer(4, kind=f"head.{head}", window=1, seed=head) for head in range(25)])
    figure = plot.zeroing(table)
    lines = lines_of(figure.axes[0])
    peaks = zeroing_curve(table).group_by("kind").agg(pl.max("effect")).sort("effect", descending=True)["kind"][:10]
    assert set(lines) == {kind.replace(".", " ") for kind in peaks}
    assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == 10
    assert list(lines) == sorted(lines, key=lambda name: int(name.split()[1]))
    assert figure.get_suptitle().endswith("(10 of 25 states)")


def test_joint_effects_are_drawn():
    table = by_layer(4, facts=1, method="restore", kind="hidden", window=1)
    figure = plot.joint_effect(table)
    (line,) = lines_of(figure.axes[0]).values()
    assert line.get_ydata() == pytest.approx(joint_effects(table)["effect"].to_list())
    assert figure.get_suptitle() == "Effect of restoring tokens together, one fact"


def test_severed_is_drawn_beside_plain():
    tables = severed_tables(6)
    figure = plot.severed(*tables)
    means = severed_effects(*tables)
    lines = lines_of(figure.axes[0])
    assert list(lines) == ["nothing severed", "MLP severed", "attention severed", "MLP and attention severed"]
    assert lines["nothing severed"].get_ydata() == pytest.approx(means.filter(method="sever_mlp")["plain"].to_list())
    for name, label in (("sever_mlp", "MLP severed"), ("sever_attn", "attention severed")):
        assert lines[label].get_ydata() == pytest.approx(means.filter(method=name)["severed"].to_list())
    assert len({line.get_marker() for line in lines.values()}) == 4
    assert figure.get_suptitle() == "Last subject token, mean of 3 facts with 95 % intervals"


def test_severed_states_have_a_column_each():
    figure = plot.severed(*severed_tables(6, states=(("hidden", 1), ("hidden", 3))), role="last")
    assert [axes.get_title() for axes in figure.axes] == ["Restoring one hidden state", "Restoring 3 hidden states"]
    assert figure.get_suptitle().startswith("Last token")


def test_gradients_have_a_map_per_kind_on_its_own_scale(tmp_path):
    figure = plot.gradients(gradients_table(5), "7", TOKENS, SUBJECT, tmp_path / "maps.png")
    maps = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title().split("\n")[1] for axes in maps] == ["hidden state", "MLP output", "attention output"]
    values = np.add.outer(np.arange(len(TOKENS)) / 10, np.arange(5))
    for place, axes in enumerate(maps):
        (mesh,) = axes.collections
        assert np.asarray(mesh.get_array()) == pytest.approx(values + place)
        assert mesh.get_clim() == (0, pytest.approx(values.max() + place))
    labels = [label.get_text() for label in maps[0].get_yticklabels()]
    assert labels == ["The", "␣city", "␣of", "␣Big*", "␣Rome*", "␣is"]
    assert figure.get_suptitle() == "The city of Big Rome is"
    assert (tmp_path / "maps.png").stat().st_size > 10_000


def test_gradients_of_some_tokens_and_of_nothing():
    table = gradients_table(3, kinds=("mlp",)).filter(pl.col("token") >= 4).with_columns(norm=pl.lit(0.0))
    figure = plot.gradients(table, "7", TOKENS)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["␣Rome", "␣is"]
    with pytest.raises(TableError, match="no gradients of fact '8'; there are '7'"):
        plot.gradients(table, "8", TOKENS)
    with pytest.raises(TableError, match="token 5, but there are texts of 3 tokens"):
        plot.gradients(table, "7", TOKENS[:3])


FIGURES = {
    "one state": lambda: plot.zeroing(by_layer(6)),
    "many heads": lambda: plot.zeroing(pl.concat([by_layer(48, kind=f"head.{i}", seed=i) for i in range(25)])),
    "joint": lambda: plot.joint_effect(by_layer(6, method="restore", kind="hidden", window=1)),
    "severed": lambda: plot.severed(*severed_tables(6)),
    "severed, two states": lambda: plot.severed(*severed_tables(48, states=(("hidden", 1), ("hidden", 10)))),
    "gradients": lambda: plot.gradients(gradients_table(6), "7", TOKENS, SUBJECT),
    "gradients of one kind": lambda: plot.gradients(gradients_table(48, ("mlp",)), "7", TOKENS, SUBJECT),
    "heads": lambda: plot.heatmaps(
        made_up_traces(TOKENS, SUBJECT, 6, states=[("hidden", 1)] + [(f"head.{i}", 1) for i in range(12)]), "0"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_another_or_leaves_the_figure(name):
    figure = FIGURES[name]()
    texts = visible_texts(figure)
    assert texts_outside(figure, texts) == []
    assert [(a, b) for (a, one), (b, other) in combinations(texts, 2) if Bbox.intersection(one, other)] == []


def test_heads_have_maps_in_their_order():
    states = [(f"head.{head}", 1) for head in (11, 2, 0)] + [("attn", 5), ("head.2", 3)]
    figure = plot.heatmaps(made_up_traces(TOKENS, SUBJECT, 6, states=states), "0")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    heads = ["head 0", "head 2", "head 2 of 3 layers", "head 11"]
    assert titles == ["Restoring 5 attention outputs", *(f"Restoring {head}" for head in heads)]
