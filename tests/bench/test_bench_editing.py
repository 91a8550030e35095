"""The benchmark of editing at toy size: what it counts, compares and reports. No time is judged."""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from helpers.counted_flops import counted
from helpers.edited_models import dense, low_rank
from helpers.models import FACTS, gpt2
from oracles.editing import Change

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.methods.hparams import RomeHparams
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.runners.demo.model import train_tokenizer
from causalcone.runners.demo.world import World

BENCH = Path(__file__).parents[2] / "bench"
METHODS = ("rome", "memit", "finetune", "finetune5")
RESULT = {
    *(
        "name",
        "method",
        "window",
        "detail",
        "dtype",
        "facts",
        "layers",
        "edits",
        "seconds",
        "edits_per_second",
        "flops",
    ),
    *("matmul", "efficiency", "peak_bytes", "weight_bytes", "largest_relative_effect", "ratio_to_naive_same_dtype"),
    "naive",
}
EDITED = tuple(
    replace(
        fact,
        target_new="French tennis" if fact.target_true == "golf" else "golf",
        paraphrase_prompts=(f"So {fact.text}",),
        neighborhood_prompts=("Bo plays the sport of", "Rome is"),
    )
    for fact in FACTS
)
"""Some begin with their subject, some end in it; one has a new target of several tokens."""


@pytest.fixture(scope="module")
def methods(bench):
    """The methods in a few steps."""
    known = bench("editing_methods").METHODS
    assert tuple(known) == METHODS
    return {key: replace(method, hparams=replace(method.hparams, steps=3)) for key, method in known.items()}


@pytest.fixture(scope="module")
def setup(bench, model, tokenizer):
    model.requires_grad_(False)
    contexts = Contexts(("They say", "One of the famous city"), ("Is it", "Bo", "The tongue is known"))
    moments = bench("editing_workload").second_moments(model, range(4))
    return bench("editing_methods").Setup(model, tokenizer, EDITED, (0, 2, 3), contexts, moments)


def ready(setup):
    """An editor that has checked the model and has the factors of its moments, and what it is to edit."""
    editor = setup.editor()
    for layer in setup.moments:
        editor.moments.solve(layer, torch.ones(len(setup.moments[layer]), 1, dtype=torch.float64))
    requests = setup.requests(editor)
    editor.score(editor.finetune(requests[:1], 0))
    return editor, requests


@pytest.mark.slow
@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("layers", [(0, 2, 3), (1,), (3,)])
def test_flops_are_those_executed(methods, setup, key, layers):
    editor, requests = ready(setup)
    batches = []
    executed = counted(lambda: batches.extend(methods[key].batches(editor, requests, layers)))
    assert sum(map(len, batches)) == len(EDITED) * len(layers)
    assert sum(methods[key].flops(setup, batch) for batch in batches) == executed


@pytest.mark.parametrize("layers", [(0, 2, 3), (1,)])
def test_flops_of_scoring_are_those_executed(bench, setup, layers):
    editor, requests = ready(setup)
    edits = editor.rome(requests, layers)
    executed = counted(lambda: editor.score(edits))
    assert bench("editing_flops").Flops(setup.encoder).scoring(edits) == executed


def test_flops_of_edits_made_in_several_batches(methods, setup):
    editor, requests = ready(setup)
    finetune = methods["finetune5"]
    whole = sum(finetune.flops(setup, batch) for batch in finetune.batches(editor, requests, (0, 3)))
    one_by_one = [edit for batch in finetune.batches(editor, requests, (0, 3)) for edit in batch]
    assert sum(finetune.flops(setup, [edit]) for edit in one_by_one) > whole


@pytest.mark.slow
@pytest.mark.parametrize("key", METHODS)
def test_engine_and_naive_way_make_the_same_edits(bench, methods, setup, key):
    measure = bench("editing_studies").measure
    result, edits = measure(methods[key], setup, {"fraction": 1.0}, (64,))
    assert [(edit.fact_id, edit.layer) for edit in edits] == [(fact.id, at) for fact in EDITED for at in (0, 2, 3)]
    assert all((edit.delta is not None) == (key == "rome") for edit in edits)
    check_result({"name": "", **result})
    difference = result["naive"]["engine_difference"]
    assert difference["edits"] == result["naive"]["edits_timed"] == 18
    # where nothing leads to the target, which is in the last layer, there is nothing to compare
    last = {"rome": 1, "memit": 2}.get(key, 0)
    ends = sum(fact.prompt.endswith("{}") for fact in EDITED)
    assert difference["changes_of_weights"] == 18 - last * (len(EDITED) - ends)
    assert difference["largest_of_weights"] < 1e-6
    assert difference["largest"] < 1e-8
    assert result["largest_relative_effect"] > 1e-3


def test_scores_of_engine_and_naive_way_are_the_same(bench, setup):
    studies = bench("editing_studies")
    editor, requests = ready(setup)
    edits = editor.rome(requests, setup.layers)
    result = studies.measure_scoring(setup, edits, {"fraction": 0.0, "least": 6}, (64,))
    check_result({"name": "", **result})
    naive = result["naive"]
    assert (naive["edits"], naive["edits_timed"], naive["engine_difference"]["edits"]) == (18, 6, 6)
    assert result["prompts"] == 18 * 4
    assert naive["engine_difference"]["largest_of_weights"] is None
    assert naive["engine_difference"]["largest"] < 1e-9


def test_differences_are_seen(bench, model, tokenizer):
    """By hand, of a change of weights and of probabilities."""
    studies = bench("editing_studies")
    ours = Delta({0: low_rank(model, rank=1), 2: dense(model)})
    theirs = {
        0: Change(2 * ours.changes[0].left @ ours.changes[0].right.T),
        2: Change(ours.changes[2].weight, 3 * ours.changes[2].bias),
    }
    bias = ours.changes[2].bias.norm().item()
    apart = math.hypot(ours.changes[0].norm, 2 * bias)
    size = math.hypot(2 * ours.changes[0].norm, ours.changes[2].weight.norm().item(), 3 * bias)
    assert studies.relative_difference(ours, theirs) == pytest.approx(apart / size)

    columns = ("prompt_kind", "prompt_index", "p_pre", "p_post", "p_post_other")
    rows = (("rewrite", 0, 0.2, 0.5, 0.1), ("paraphrase", 0, 0.2, 0.2, 0.3))
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows])
    probe = bench("naive_scoring").Probe
    difference = studies.Difference()
    difference.add_probes(table, [probe("paraphrase", 0, 0, 0.2, 0, 0.4), probe("rewrite", 0, 0, 0.5, 0, 0.08)])
    assert (difference.p_post, difference.p_post_relative) == (pytest.approx(0.1), pytest.approx(0.25))
    assert difference.effect == pytest.approx(1.5)


def test_an_edit_that_fails_is_told(bench, methods, setup, monkeypatch):
    broken = replace(setup, model=gpt2(), facts=EDITED[:1])
    broken.model.requires_grad_(False)
    monkeypatch.setattr(RomeHparams, "__post_init__", lambda self: None)  # it would refuse what makes the loss infinite
    rome = replace(methods["rome"], hparams=replace(methods["rome"].hparams, kl_factor=math.inf))
    with pytest.raises(RuntimeError, match="the edit start/error_injection/rome-1/0 failed"):
        bench("editing_studies").measure(rome, broken, {"fraction": 0.1}, (64,))


def run(script, out, *options):
    """What the script wrote and printed."""
    command = [sys.executable, BENCH / script, "--threads", "1", "--out", out, *options]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    return json.loads(path.read_text()), done.stdout, path.name


def check_report(report, text):
    about = {"title", "date", "machine", "versions", "tf32", "prompts", "given", "naive", "efficiency", "note", "shape"}
    assert about <= report.keys()
    assert {"python", "torch", "transformers", "causalcone", "commit"} <= report["versions"].keys()
    for key in ("title", "date", "given", "naive", "efficiency", "note"):
        assert report[key] in text
    for result in report["results"]:
        check_result(result)
        assert len([line for line in text.splitlines() if line.startswith(f"| {result['name']} |")]) == 2


def check_result(result):
    assert result.keys() >= RESULT
    assert ("hparams" in result) == (result["method"] != "scoring")
    naive, rate = result["naive"], result["matmul"]["flops_per_second"]
    assert result["edits"] == naive["edits"] == result["facts"] * len(result["layers"])
    assert result["seconds"] > 0
    assert result["edits_per_second"] == pytest.approx(result["edits"] / result["seconds"])
    assert result["efficiency"] == pytest.approx(result["flops"] / result["seconds"] / rate)
    assert result["ratio_to_naive_same_dtype"] == pytest.approx(naive["seconds"] / result["seconds"])
    assert naive["seconds"] == pytest.approx(naive["seconds_timed"] * naive["edits"] / naive["edits_timed"])
    assert naive["scaled"] == (naive["edits_timed"] < naive["edits"])
    assert naive["engine_difference"]["edits"] == naive["edits_timed"]


@pytest.mark.slow
def test_the_script(tmp_path):
    few = ("--model", "tiny", "--facts", "2", "--layers", "0,1", "--naive-least", "2")
    report, text, file = run("editing.py", tmp_path, *few, "--methods", "scoring,finetune5,rome")
    assert file.startswith("editing-tiny-")
    check_report(report, text)
    assert [result["method"] for result in report["results"]] == ["rome", "finetune", "scoring"]
    assert [result["window"] for result in report["results"]] == [1, 5, 1]
    assert report["results"][-1]["prompts"] == 2 * 2 * 13
    for result in report["results"]:
        assert result["dtype"] == "float32"
        assert result["naive"]["edits_timed"] == 2
        assert result["naive"]["engine_difference"]["largest"] < 1e-5
        if result["method"] != "scoring":
            assert result["hparams"]["stop_loss"] is None
            assert result["hparams"]["steps"] == (20 if result["method"] == "rome" else 25)


@pytest.mark.slow
def test_scoring_alone_makes_its_edits_first(bench, tmp_path, monkeypatch, capsys):
    few = ("--model", "tiny", "--facts", "1", "--layers", "0", "--methods", "scoring", "--naive-seconds", "0")
    monkeypatch.setattr(sys, "argv", ["editing.py", *few, "--threads", "1", "--out", str(tmp_path)])
    bench("editing").main()
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    check_report(report, capsys.readouterr().out)
    (result,) = report["results"]
    assert result["name"] == "scoring of ROME's edits, float32"
    assert result["largest_relative_effect"] > 0.1


def test_arguments(bench, monkeypatch, capsys):
    editing = bench("editing")

    def parsed(*options):
        monkeypatch.setattr(sys, "argv", ["editing.py", *options])
        return editing.parse()

    assert parsed().layers is None
    assert parsed("--layers", "4,0").layers == (4, 0)
    assert parsed("--dtypes", "bfloat16,float32").dtypes == ["float32", "bfloat16"]
    for options in (("--layers", "0,0"), ("--layers", "x"), ("--methods", "magic"), ("--facts", "0")):
        with pytest.raises(SystemExit):
            parsed(*options)
        assert options[0] in capsys.readouterr().err
    tiny = parsed("--model", "tiny", "--facts", "1", "--layers", "4")
    with pytest.raises(SystemExit, match="there is no layer 4"):
        editing.MODELS["tiny"](tiny)
    few = parsed("--model", "tiny", "--facts", "1")
    assert editing.MODELS["tiny"](few)[0].layers == (0, 2)


def test_the_demo_model_is_edited_in_its_own_contexts(bench, monkeypatch):
    editing, world = bench("editing"), World.generate(40)
    tokenizer = train_tokenizer(world)
    model = gpt2(2, 16, 2, dtype=torch.float32, vocab_size=len(tokenizer), positions=128)
    monkeypatch.setattr(editing, "demo_model", lambda: (model, tokenizer))
    monkeypatch.setattr(editing, "demo_world", lambda: world)
    setup, source = editing.demo(argparse.Namespace(facts=3, layers=(1,), memory=None))
    assert [fact.id for fact in setup.facts] == [fact.id for fact in world.facts[:3]]
    assert source == "the first 3 of the demo world"
    assert (len(setup.contexts.rome), len(setup.contexts.memit)) == (20, 5)
    assert set(setup.moments) == {0, 1}
    table = setup.editor().score(setup.editor().rome(setup.requests(setup.editor()), (1,)))
    assert set(table["prompt_kind"].to_pylist()) == {"rewrite", "paraphrase", "neighborhood"}


@pytest.mark.slow
def test_gpu_script_on_the_cpu(tmp_path):
    few = ("--toy", "--device", "cpu", "--parts", "editing", "--edit-facts", "2", "--naive-edits", "1")
    report, text, file = run("gpu.py", tmp_path, *few)
    assert file.startswith("gpu-editing-cpu-toy-")
    check_report(report, text)
    titles = ("ROME", "scoring ROME's edits", "FT-1", "MEMIT, window 5")
    assert [result["name"] for result in report["results"]] == [
        f"{title}, {dtype}" for dtype in ("bfloat16", "float32") for title in titles
    ]
    for result in report["results"]:
        assert result["seconds_per_edit"] == pytest.approx(1 / result["edits_per_second"])
        assert result["naive"]["edits_timed"] == 1
    assert report["results"][len(titles)]["naive"]["engine_difference"]["largest_of_weights"] < 1e-4


@pytest.mark.slow
@pytest.mark.gpu(real=True)
def test_gpu_script(tmp_path):
    few = ("--toy", "--parts", "editing", "--edit-facts", "2", "--naive-edits", "1")
    report, text, _ = run("gpu.py", tmp_path, *few)
    check_report(report, text)
    assert report["machine"]["device"] != "cpu"


def test_sections_are_put_into_the_page(bench, tmp_path, monkeypatch):
    """Of a report that grows, after each result."""
    report = bench("report")
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n")
    monkeypatch.setattr(report.record, "__defaults__", (page,))
    about = {"date": "2026-01-01", "title": "Editing"}
    growing = report.Growing(about, ["a", "b"], tmp_path, "editing", "editing", lambda all_: f"{len(all_['results'])}")
    for name in "ab":
        growing.add({"name": name})
    assert page.read_text() == "# Results\n\n<!-- begin editing -->\n2\n<!-- end editing -->\n"
