"""The demo command on the trained model: what it says, and that a second run finds the first one's results."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import causalcone as cc
from causalcone.analysis import average_indirect_effect, mean_scores, scores, severed_effects, zeroing_curve
from causalcone.runners import demo, demo_model
from causalcone.runners.demo_model import demo_moments, demo_world
from causalcone.runners.edit_study import EditStudy
from causalcone.runners.presets import load_hparams
from causalcone.runners.results import ResultError
from causalcone.runners.summary import Sites, find_sites
from causalcone.runners.training import Recipe
from causalcone.runners.training_text import Packing, running_texts

pytestmark = pytest.mark.slow

EDITED = 8
EXAMPLE = (Path(__file__).resolve().parents[1] / "docs" / "editing.md").read_text(encoding="utf-8")


def said(out, count, edited=1, **options):
    console = Console(file=io.StringIO(), width=400)
    demo.run_demo(out, count, console, edited=edited, **options)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "results"
    return out, said(out, 50, EDITED)


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


def test_the_summary_has_the_scores_of_every_method_at_every_layer(first):
    out, text = first
    table = scores(out / "edits", out / "probes", aggregate="mean")
    assert len(table) == 3 * 8 * EDITED
    means = mean_scores(table)
    for method, title in (("rome", "ROME"), ("memit", "MEMIT of 3 layers"), ("finetune", "Fine-tuning of one layer")):
        own = means.filter(method=method, score="overall").sort("mean", "layer", descending=[True, False])
        layer, best = own.select("layer", "mean").row(0)
        heading = f"{title}: mean scores of {EDITED} facts by layer"
        lines = text[text.index(heading) :].splitlines()
        (row,) = (line for line in lines[:12] if line.startswith(f"│ {layer} "))
        assert f"{best:.3f}" in row
        assert (
            f"{title[0].lower() + title[1:] if method == 'finetune' else title} at layer {layer} ({best:.3f})" in text
        )


def test_editing_works_early_and_not_at_the_last_layer(first):
    """As restoring the subject's last token does: no later layer reads what it says at the last one."""
    out, _ = first
    rewrite = mean_scores(scores(out / "edits", out / "probes")).filter(score="rewrite")
    for method in ("rome", "memit"):
        own = rewrite.filter(method=method).sort("layer")["mean"]
        assert max(own[:4]) > 0.7
        assert own[7] < 0.01
    kept = mean_scores(scores(out / "edits", out / "probes")).filter(score="neighborhood")
    assert kept["mean"].min() > 0.5


def test_the_methods_have_the_presets_hyperparameters(first):
    out, _ = first
    editing = json.loads((out / "run.json").read_text())["editing"]
    assert editing["layers"] == list(range(8))
    for method, (name, window) in zip(editing["methods"], (("rome", 1), ("memit", 3), ("finetune", 1)), strict=True):
        assert (method["method"], method["window"]) == (name, window)
        assert method["hparams"] == vars(load_hparams("demo", name, "error_injection", window))


def test_every_figure_is_there(first):
    out, text = first
    figures = re.findall(r"\S+\.png", text)
    assert len(figures) == demo.PLOTS + 4
    assert all((out / "plots" / name.split("/")[-1]).stat().st_size > 10_000 for name in figures)


def test_a_second_run_finds_the_results_of_the_first(first, monkeypatch):
    out, text = first
    monkeypatch.setattr(demo, "carry_out", None)  # calling it would fail
    monkeypatch.setattr(EditStudy, "carry_out", None)
    again = said(out, 50, EDITED).splitlines()
    assert again == text.splitlines()[-len(again) :]
    assert any("mean scores" in line for line in again)


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


# --- moments, and the example of docs/editing.md ---


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A recipe of three steps, and a cache of its own."""
    recipe = Recipe(subjects=12, layers=3, width=16, heads=2, steps=3, packing=Packing(rows=4), first_open_layer=2)
    monkeypatch.setitem(demo_model.RECIPES, "demo", recipe)
    monkeypatch.setenv("CAUSALCONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_demo_models_moments_are_collected_once(quick, monkeypatch):
    moments = demo_moments(progress=False)
    model, tokenizer = demo_model.demo_model(progress=False)
    expected = cc.Moments.collect(model, tokenizer, running_texts(demo_world()), tokens="all")
    assert moments.tokens == expected.tokens
    assert all(torch.equal(moments.matrices[layer], expected.matrices[layer]) for layer in range(3))
    monkeypatch.setattr(cc.Moments, "collect", lambda *_, **__: pytest.fail("they are there"))
    again = demo_moments(progress=False)
    again.check(model, range(3))
    assert all(torch.equal(moments.matrices[layer], again.matrices[layer]) for layer in range(3))


def test_moments_of_another_model_are_replaced(quick):
    demo_moments(progress=False)
    (path,) = quick.glob("*-moments.safetensors")
    model, tokenizer = demo_model.demo_model(progress=False)
    with torch.no_grad():
        model.transformer.wte.weight += 1
    cc.Moments.collect(model, tokenizer, ["Some text."], tokens="all").save(path)
    demo_moments(progress=False).check(demo_model.demo_model(progress=False)[0], range(3))
    path.write_bytes(b"half a file")
    demo_moments(progress=False).check(demo_model.demo_model(progress=False)[0], range(3))


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", EXAMPLE, re.DOTALL)
    names = {}
    exec(example, names)
    assert len(names["edits"]) == 4 * 2 + 4 + 4
    assert all(edit.status == "done" for edit in names["edits"])
    fact = names["requests"][0].fact
    assert f"{fact.text} {fact.target_new}" in capsys.readouterr().out  # which the first edit made it say
    assert cc.Delta.load(tmp_path / "delta.safetensors").layers == (0,)
    assert cc.Editor.from_pretrained(str(tmp_path / "edited-model")).session.sizes.depth == 8
