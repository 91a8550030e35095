"""The demo command on the trained model: what it says, and that a second run finds the first one's results."""

import io
import json
import re
from pathlib import Path

import polars as pl
import pytest
import torch
from rich.console import Console

import causalcone as cc
from causalcone.analysis import average_indirect_effect, mean_scores, scores, severed_effects, zeroing_curve
from causalcone.runners.commands import demo_run as demo
from causalcone.runners.demo import model as demo_model
from causalcone.runners.demo.corpus import Packing, running_texts
from causalcone.runners.demo.model import demo_moments, demo_world
from causalcone.runners.demo.training import Recipe
from causalcone.runners.edits.presets import load_hparams
from causalcone.runners.results.folder import ResultError
from causalcone.runners.show.tables import Sites, find_sites
from causalcone.runners.sweep.config import load_sweep
from causalcone.runners.sweep.stages import stages_of
from causalcone.runners.sweep.worker import Worker

METHODS = (("rome", 1, "ROME"), ("memit", 3, "MEMIT-3"), ("finetune", 1, "FT-1"), ("finetune", 5, "FT-5"))
PROBLEMS = ("error_injection", "tracing_reversal", "fact_erasure", "fact_amplification", "fact_forcing")
EXAMPLE = (Path(__file__).resolve().parents[2] / "docs" / "editing.md").read_text(encoding="utf-8")


def said(out, facts, edits=1, **options):
    console = Console(file=io.StringIO(), width=400)
    demo.run_demo(demo.WORLD, out, facts, edits, console, **options)
    return console.file.getvalue()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((12, 1), id="few facts", marks=pytest.mark.demo),
        pytest.param((50, 2), id="many facts", marks=[pytest.mark.demo, pytest.mark.long]),
    ],
)
def size(request):
    """How many facts are traced, and how many of them are edited."""
    return request.param


@pytest.fixture(scope="module")
def first(size, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "results"
    return out, said(out, *size)


@pytest.fixture(scope="module")
def table(first):
    out, _ = first
    return scores(out / "edits", out / "probes", out / "metrics", aggregate="mean")


def test_the_summary_states_the_papers_pattern(first):
    out, text = first
    sites = find_sites(average_indirect_effect(out / demo.TRACES))
    assert sites.early_layer < sites.late_layer
    assert max(sites.subject_last) > 0.3
    assert sites.subject_last[-1] < 0.1 * max(sites.subject_last)
    assert sites.last[0] < 0.1 < 0.3 < max(sites.last)
    for number in (max(sites.subject_last), sites.subject_last[-1], sites.last[0], max(sites.last)):
        assert f"{number:+.3f}" in text


def test_the_summary_says_what_severing_and_zeroing_take(first, size):
    out, text = first
    severed = severed_effects(out / "traces")
    mlp, attn = (severed.filter(method=f"sever_{name}").sort("layer") for name in ("mlp", "attn"))
    layer = mlp["difference"].arg_max()
    assert mlp["difference"][layer] > 0.05
    assert f"{mlp['plain'][layer]:+.3f} that the subject's last token brings back at layer {layer}, " in text
    assert f"{mlp['severed'][layer]:+.3f} remains" in text
    assert f"{attn['severed'][layer]:+.3f} with its later attention" in text
    assert mlp["severed"][-1] == pytest.approx(mlp["plain"][-1])  # nothing is left to sever
    curve = zeroing_curve(out / demo.ZEROED)
    assert curve["effect"][0] > 0.3 > 0.1 > curve["effect"][-1]
    assert f"{curve['effect'].max():.3f} of p(answer) is lost" in text
    assert curve["facts"].to_list() == [size[0]] * len(curve)


def test_every_problem_method_and_score_is_there(first, table):
    out, _ = first
    settings = [(problem, method, window) for problem in PROBLEMS for method, window, _ in METHODS]
    assert set(table.select("problem", "method", "window").rows()) == set(settings)
    assert table["layer"].unique().sort().to_list() == list(range(8))
    assert table.select("rewrite", "paraphrase", "neighborhood", "essence").null_count().row(0) == (0, 0, 0, 0)
    metrics = pl.read_parquet(out / "metrics" / "error_injection" / "**" / "*.parquet")
    assert {"perplexity", "rewrite_accuracy", "generation_entropy", "reference_score"} <= set(metrics["metric"])
    elsewhere = pl.read_parquet(out / "metrics" / "fact_erasure" / "**" / "*.parquet")
    assert "generation_entropy" not in set(elsewhere["metric"])


def test_the_summary_has_the_rewrite_scores_of_every_problem_and_method_at_every_layer(first, table):
    _, text = first
    means = mean_scores(table).filter(score="rewrite")
    for problem in PROBLEMS:
        title = problem.replace("_", " ").capitalize()
        lines = text[text.index(f"{title}: mean rewrite score of ") :].splitlines()[:9]
        for method, window, name in METHODS:
            own = means.filter(problem=problem, method=method, window=window).sort("layer")
            (row,) = (line for line in lines if line.startswith(f"│ {name} "))
            assert [cell.strip() for cell in row.split("│")[2:-1]] == [f"{mean:.3f}" for mean in own["mean"]]


def test_the_summary_names_the_best_layers(first, table):
    _, text = first
    means = mean_scores(table).filter(problem="error_injection", score="overall")
    (line,) = (line for line in text.splitlines() if line.startswith("Error injection: the best overall scores"))
    for method, window, name in METHODS:
        own = means.filter(method=method, window=window).sort("mean", "layer", descending=[True, False])
        layer, best = own.select("layer", "mean").row(0)
        assert f"{name} at layer {layer} ({best:.3f})" in line


def test_editing_works_early_and_not_at_the_last_layer(table):
    """As restoring the subject's last token does: no later layer reads what it says at the last one."""
    means = mean_scores(table).filter(problem="error_injection")
    for method in ("rome", "memit"):
        own = means.filter(method=method, score="rewrite").sort("layer")["mean"]
        assert max(own[:4]) > 0.7
        assert own[7] < 0.01
    assert means.filter(score="neighborhood")["mean"].min() > 0.5


def test_the_methods_have_the_presets_hyperparameters():
    plans = stages_of(load_sweep("demo"))["edit"].plans
    for problem in PROBLEMS:
        for setting, (method, window, _) in zip(plans[problem].settings, METHODS, strict=True):
            assert (setting.method, setting.window) == (method, window)
            assert setting.hparams == load_hparams("demo", method, problem, window)


def test_every_figure_is_there(first):
    out, text = first
    figures = re.findall(r"\S+\.png", text)
    assert len(figures) == 2 * demo.MAPS + 4
    assert all((out / "plots" / name.split("/")[-1]).stat().st_size > 10_000 for name in figures)


def test_a_second_run_finds_the_results_of_the_first(first, size, monkeypatch):
    out, text = first
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("everything is there"))
    drawn = {path: path.stat().st_mtime for path in out.rglob("*.png")}
    again = said(out, *size)
    start = "│ hidden:1"
    shown, shown_again = (
        [line for line in each[each.index(start) :].splitlines() if not line.startswith("complete after")]
        for each in (text, again)
    )
    assert shown == shown_again
    assert {path: path.stat().st_mtime for path in out.rglob("*.png")} == drawn


def test_another_number_of_facts_is_refused(first, size):
    out, _ = first
    kept = (out / "run.json").read_text()
    with pytest.raises(ResultError, match=r"(?s)limit.*--overwrite"):
        said(out, size[0] - 1, size[1])
    assert (out / "run.json").read_text() == kept


@pytest.mark.demo
def test_results_of_another_origin_are_left(tmp_path):
    out = tmp_path / "results"
    (out / "traces").mkdir(parents=True)
    (out / "traces" / "part.parquet").write_bytes(b"theirs")
    (out / "run.json").write_text(json.dumps({"command": "trace"}))
    for overwrite in (False, True):
        with pytest.raises(ResultError, match="choose another folder"):
            said(out, 2, overwrite=overwrite)
    assert (out / "traces" / "part.parquet").read_bytes() == b"theirs"


def test_facts_are_of_all_relations():
    facts = demo_world().facts
    assert {fact.relation_id for fact in facts[:60]} == {fact.relation_id for fact in facts}


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
    for layer in range(3):
        torch.testing.assert_close(moments.matrices[layer], expected.matrices[layer], rtol=1e-5, atol=1e-6)
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
    other = cc.Moments.collect(model, tokenizer, ["Some text."], tokens="all")
    for spoil in (lambda: other.save(path), lambda: path.write_bytes(b"half a file")):
        spoil()
        found = demo_moments(progress=False)
        found.check(demo_model.demo_model(progress=False)[0], range(3))
        assert found.tokens != other.tokens


@pytest.mark.demo
def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example, sequence = re.findall(r"```python\n(.*?)```", EXAMPLE, re.DOTALL)
    names = {}
    exec(example, names)
    assert len(names["edits"]) == 4 * 2 + 4 + 4
    assert all(edit.status == "done" for edit in names["edits"])
    fact = names["requests"][0].fact
    assert f"{fact.text} {fact.target_new}" in capsys.readouterr().out  # which the first edit made it say
    assert cc.Delta.load(tmp_path / "delta.safetensors").layers == (0,)
    assert cc.Editor.from_pretrained(str(tmp_path / "edited-model")).session.sizes.depth == 8
    weights = {name: tensor.clone() for name, tensor in names["model"].state_dict().items()}
    exec(sequence, names)
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 ['done', 'done'] {'1': ")
    assert [edit.fact_id for edit in names["scored"].edits] == [fact.id for fact in demo_world().facts[:2]]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in names["model"].state_dict().items())
