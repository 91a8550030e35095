"""The demo command on the trained model: what it says, and that a second run finds the first one's results."""

import io
import json
import re

import pytest
from rich.console import Console

from causalcone.analysis import average_indirect_effect, severed_effects, zeroing_curve
from causalcone.runners import demo
from causalcone.runners.demo_model import demo_world
from causalcone.runners.results import ResultError
from causalcone.runners.summary import Sites, find_sites

pytestmark = pytest.mark.slow


def said(out, count, **options):
    console = Console(file=io.StringIO(), width=400)
    demo.run_demo(out, count, console, **options)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "results"
    return out, said(out, 50)


def test_the_summary_states_the_papers_pattern(first):
    out, text = first
    sites = find_sites(average_indirect_effect(out / "traces"))
    assert sites.early_layer < sites.late_layer
    assert max(sites.subject_last) > 0.3
    assert sites.subject_last[-1] < 0.1 * max(sites.subject_last)
    assert sites.last[0] < 0.1 < 0.3 < max(sites.last)
    for number in (max(sites.subject_last), sites.subject_last[-1], sites.last[0], max(sites.last)):
        assert f"{number:+.3f}" in text


def test_the_summary_says_what_severing_and_zeroing_take(first):
    out, text = first
    severed = severed_effects(out / "traces", out / "severed")
    mlp, attn = (severed.filter(method=f"sever_{name}").sort("layer") for name in ("mlp", "attn"))
    layer = mlp["difference"].arg_max()
    assert mlp["difference"][layer] > 0.05
    assert f"{mlp['plain'][layer]:+.3f} that the subject's last token brings back at layer {layer}, " in text
    assert f"{mlp['severed'][layer]:+.3f} remains" in text
    assert f"{attn['severed'][layer]:+.3f} with its later attention" in text
    assert mlp["severed"][-1] == pytest.approx(mlp["plain"][-1])  # nothing is left to sever
    curve = zeroing_curve(out / "zeroed")
    assert curve["effect"][0] > 0.3 > 0.1 > curve["effect"][-1]
    assert f"{curve['effect'].max():.3f} of p(answer) is lost" in text
    assert curve["facts"].to_list() == [50] * len(curve)


def test_every_figure_is_there(first):
    out, text = first
    figures = re.findall(r"\S+\.png", text)
    assert len(figures) == demo.PLOTS + 3
    assert all((out / "plots" / name.split("/")[-1]).stat().st_size > 10_000 for name in figures)


def test_a_second_run_finds_the_results_of_the_first(first, monkeypatch):
    out, text = first
    monkeypatch.setattr(demo, "carry_out", None)  # calling it would fail
    assert said(out, 50).splitlines() == text.splitlines()[-len(said(out, 50).splitlines()) :]


def test_another_number_of_facts_is_another_run(first, tmp_path):
    assert "4 facts in" in said(tmp_path / "few", 4)
    (tmp_path / "few" / "run.json").write_text(json.dumps({"command": "demo", "status": "running"}))
    assert "3 facts in" in said(tmp_path / "few", 3)


def test_results_of_another_origin_are_replaced_only_when_asked(tmp_path):
    out = tmp_path / "results"
    (out / "traces").mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"command": "trace"}))
    with pytest.raises(ResultError, match="--overwrite"):
        said(out, 2)
    assert "2 facts in" in said(out, 2, overwrite=True)


def test_facts_are_spread_over_the_world():
    facts = demo.demo_facts(60)
    assert len({fact.id for fact in facts}) == 60
    assert len({fact.relation_id for fact in facts}) == len({fact.relation_id for fact in demo_world().facts})


def test_sites_are_read_off_the_effects():
    sites = Sites(subject_last=[0.2, 0.5, 0.1], last=[0.0, 0.4, 0.7])
    assert (sites.early_layer, sites.late_layer) == (1, 1)
    assert "+0.500 of p(answer) at layer 1" in sites.sentence()
