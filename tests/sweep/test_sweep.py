"""Sweeps: what they write is what tracer and editor compute; they go on where they ended, and lose nothing."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from helpers.editing_cases import FULL
from helpers.sweeps import assert_same_tables, configured, swept, tables

import causalcone as cc
from causalcone.analysis import scores
from causalcone.engine.edit.scoring.tables import edit_batch
from causalcone.engine.errors import ExperimentError, FactError
from causalcone.runners.results import store as stores
from causalcone.runners.results.folder import ResultError
from causalcone.runners.sweep import worker as work
from causalcone.runners.sweep.executor import LocalExecutor
from causalcone.runners.sweep.inputs.facts_table import FACTS, fact_table
from causalcone.runners.sweep.inputs.resources import NOISE_FILE
from causalcone.runners.sweep.inputs.units import Selection
from causalcone.runners.sweep.stages import stages_of
from causalcone.runners.sweep.status import status_of
from causalcone.runners.sweep.worker import Worker

PROBLEMS = ("error_injection", "fact_forcing")
UNITS = 35
TEXTS = (
    *(
        "trace=none",
        "sever=none",
        "zero=none",
        "gradients=none",
        "units.edits=1",
        "edit.answers=true",
        "edit.layers=[0]",
    ),
    *('edit.problems=["error_injection"]', 'edit.methods=["rome"]', "edit.answers=true", "edit.layers=[0]"),
)
"""Changes that leave a few edits, whose models answer freely."""


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    """A sweep that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finished = swept(file, out)
    assert (finished.status, finished.failed) == ("complete", [])
    return out


# --- what is computed ---


def test_traces_are_those_of_the_tracer(whole, folder):
    tracer = cc.Tracer.from_pretrained(str(folder / "model"))
    found = tables(whole)["traces"]
    noise = {"samples": 2, "sigma": 0.4}
    expected = [
        tracer.trace(FULL, (("hidden", 1), ("mlp", 3)), **noise),
        tracer.trace(FULL, (("hidden", 1),), sever="mlp", tokens="subject_last", **noise),
        tracer.zero(FULL, (("mlp", 3),)),
    ]
    for method, table in zip(("restore", "sever_mlp", "zero"), expected, strict=True):
        assert_same_tables({"t": found.filter(method=method)}, {"t": pl.DataFrame(table)}, 1e-6)
    gradients = tracer.integrated_gradients(FULL[:3], ("mlp",), steps=2)
    assert_same_tables({"g": tables(whole)["gradients"]}, {"g": pl.DataFrame(gradients)}, 1e-6)


def test_edits_and_probes_are_those_of_the_editor(whole, folder):
    moments, contexts = (
        cc.Moments.load(folder / "moments.safetensors"),
        json.loads((folder / "contexts.json").read_text()),
    )
    editor = cc.Editor.from_pretrained(str(folder / "model"), moments, contexts=cc.Contexts(**contexts), sigma=0.4)
    expected = {"edits": [], "probes": [], "metrics": []}
    hparams = {"rome": cc.RomeHparams, "memit": cc.MemitHparams, "finetune": cc.FinetuneHparams}
    for problem in PROBLEMS:
        requests = editor.requests(FULL, problem, filtered=False)
        for method, window in (("finetune", 1), ("memit", 2), ("rome", 1)):
            for batch in editor.batches(requests, method, (0, 2), window, hparams[method](steps=2)):
                scored = editor.evaluate(batch, essence=True, accuracy=True)
                expected["edits"].append(pl.DataFrame(edit_batch(scored.edits)))
                expected["probes"].append(pl.DataFrame(scored.probes))
                expected["metrics"].append(pl.DataFrame(scored.metrics))
    found = tables(whole)
    wanted = {name: pl.concat(each) for name, each in expected.items()}
    assert_same_tables({name: found[name] for name in expected}, wanted, 2e-4)  # float32, batched otherwise
    assert scores(whole / "edits", whole / "probes", whole / "metrics")["overall_essence"].null_count() == 0


def test_the_facts_have_what_the_model_says_of_them(whole, folder):
    table = pl.read_parquet(whole / "facts.parquet")
    assert table["fact_id"].to_list() == [fact.id for fact in FULL]
    assert table["said"].null_count() == len(FULL)  # nobody asked
    clean = tables(whole)["traces"].filter(method="restore").unique("fact_id", maintain_order=True)
    assert table["p_true"].to_list() == pytest.approx(clean["p_clean"].to_list(), abs=1e-6)
    assert json.loads(table["fact"][0]) == json.loads(json.dumps(FULL[0].record))
    assert table["joiner"].to_list() == ["space"] * len(FULL)


def test_run_json_has_all_that_decides_the_results(whole, file):
    kept = json.loads((whole / "run.json").read_text())
    assert (kept["command"], kept["status"], kept["failed"]) == ("sweep", "complete", 0)
    assert kept["configuration"] == configured(file).result_config
    assert kept["hash"] == configured(file).hash
    assert kept["model"]["depth"] == 4
    assert set(kept["fingerprints"]) == {"facts", "model"}
    assert "torch" in kept["versions"]
    part = next((whole / "edits").rglob("*.parquet"))
    notes = json.loads(pq.read_schema(part).metadata[b"causalcone"])
    assert (notes["configuration"], notes["items"]) == (kept["hash"], 4)


def test_a_fact_that_is_left_out_has_its_own_reason(file, tmp_path):
    """The first is refused for what the model says under noise, the second before the model is asked."""
    changes = ('edit.problems=["tracing_reversal"]', 'edit.methods=["finetune:1"]', "noise.sigma=1e-9")
    sweep, place = configured(file, *changes), str(tmp_path / "out")
    store = stores.Store.open(place)
    store.write_table(FACTS, fact_table([FULL[0], dataclasses.replace(FULL[1], target_new=" ")]), {})
    store.write_json(NOISE_FILE, {"sigma": 1e-9})
    (work,) = stages_of(sweep)["edit"].units(Selection((0, 1), (0, 1)), 4)
    (unit,) = work.units
    Worker(sweep, place).run(unit)
    first, second = store.read_table(unit.left_out).to_pylist()
    assert (first["fact_id"], second["fact_id"]) == (FULL[0].id, FULL[1].id)
    assert "with noise of level 1e-09" in first["reason"]
    assert "target_new ' ' is empty" in second["reason"]


@pytest.mark.parametrize("read", ["polars", "pandas"])
def test_other_readers_find_the_data_sets(whole, read):
    rows = tables(whole)["probes"].height
    if read == "polars":
        assert pl.scan_parquet(whole / "probes/**/*.parquet").collect().height == rows
    else:
        import pandas as pd

        assert len(pd.read_parquet(whole / "probes")) == rows


def test_a_filter_that_asks_the_model(file, folder, tmp_path):
    """Facts whose answer the model does not say stay in the table, with what it says, and are not traced."""
    tracer = cc.Tracer.from_pretrained(str(folder / "model"))
    session = tracer.session
    ids = session.tokenizer(FULL[1].text, return_tensors="pt")
    said = session.tokenizer.decode(session.model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1:])
    known = dataclasses.replace(FULL[1], target_true=said)
    cc.save_facts([FULL[0], known, FULL[2]], tmp_path / "facts.jsonl")
    changes = (f"facts={tmp_path / 'facts.jsonl'}", "filter.completes=true", "edit=none", "gradients=none")
    finished = swept(file, tmp_path / "out", *changes)
    assert finished.status == "complete"
    table = pl.read_parquet(tmp_path / "out" / "facts.parquet")
    assert table["completes"].to_list() == [False, True, False]
    assert table["said"][1].startswith(said)
    assert tables(tmp_path / "out")["traces"]["fact_id"].unique().to_list() == [known.id]
    with pytest.raises(FactError, match="completes none of 1 fact"):
        swept(file, tmp_path / "none", *changes[1:], "limit=1")


def test_a_filter_of_the_likeliest_token(file, folder, tmp_path):
    session = cc.Tracer.from_pretrained(str(folder / "model")).session
    ids = session.tokenizer(FULL[1].text, return_tensors="pt")
    said = session.tokenizer.decode(session.model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1:])
    right, longer = (dataclasses.replace(FULL[1], id=text, target_true=text) for text in (said.strip(), said + "ish"))
    cc.save_facts([FULL[0], right, longer], tmp_path / "facts.jsonl")
    changes = (f"facts={tmp_path / 'facts.jsonl'}", "filter.argmax=true", "edit=none", "gradients=none", "sever=none")
    assert swept(file, tmp_path / "out", *changes).status == "complete"
    assert pl.read_parquet(tmp_path / "out" / "facts.parquet")["argmax"].to_list() == [False, True, False]
    assert tables(tmp_path / "out")["traces"]["fact_id"].unique().to_list() == [right.id]


def test_the_likeliest_answers_are_those_of_the_models_own_forward(folder, study):
    session = cc.Tracer.from_pretrained(str(folder / "model")).session
    table = pl.read_parquet(study / "facts.parquet")
    for prompt, subject, answers in table.select("prompt", "subject", "likeliest").iter_rows():
        ids = session.tokenizer(prompt.replace("{}", subject), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            p, tokens = session.model(ids).logits[0, -1].double().softmax(-1).topk(5)
        assert [answer["p"] for answer in answers] == pytest.approx(p.tolist(), abs=1e-6)
        assert [answer["token"] for answer in answers] == [session.tokenizer.decode([token]) for token in tokens]


def test_the_level_of_noise_is_that_of_the_facts_that_go_on(file, folder, tmp_path):
    out = tmp_path / "out"
    swept(file, out, "noise.sigma=3sd", "edit=none", "gradients=none", "sever=none", "zero=none", "limit=4")
    level = cc.Tracer.from_pretrained(str(folder / "model")).noise_level(FULL[:4])
    assert json.loads((out / "noise.json").read_text())["sigma"] == pytest.approx(level)


# --- going on ---


def stopped_after(monkeypatch, count, error):
    """Makes workers fail in the unit after so many."""
    run, done = Worker.run, []

    def running(self, unit):
        if len(done) == count:
            raise error
        done.append(unit)
        return run(self, unit)

    monkeypatch.setattr(Worker, "run", running)
    return done


@pytest.mark.parametrize("count", [5, *(pytest.param(count, marks=pytest.mark.slow) for count in (0, 2, 8, 14, 30))])
def test_what_was_interrupted_goes_on(file, whole, tmp_path, monkeypatch, count):
    out = tmp_path / "out"
    done = stopped_after(monkeypatch, count, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        swept(file, out)
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    monkeypatch.undo()
    finished = swept(file, out)
    assert finished.computed + len(done) == UNITS
    assert_same_tables(tables(out), tables(whole), 1e-9)
    assert swept(file, out).computed == 0


@pytest.mark.slow
def test_texts_go_on_with_the_edits_that_they_are_of(file, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    assert swept(file, whole, *TEXTS).status == "complete"
    stopped_after(monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        swept(file, tmp_path / "out", *TEXTS)
    monkeypatch.undo()
    assert swept(file, tmp_path / "out", *TEXTS).status == "complete"
    found, expected = tables(tmp_path / "out"), tables(whole)
    assert found["texts"].equals(expected["texts"])
    assert set(found["texts"]["edit_id"]) == set(found["edits"]["edit_id"])
    assert_same_tables(found, expected, 1e-9)


@pytest.mark.slow
def test_a_signal_ends_it_after_the_unit_that_is_running(file, whole, tmp_path, monkeypatch):
    run, out, done, before = Worker.run, tmp_path / "out", [], signal.getsignal(signal.SIGTERM)

    def running(self, unit):
        if len(done) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(unit)
        return run(self, unit)

    monkeypatch.setattr(Worker, "run", running)
    finished = swept(file, out)
    assert (finished.signal, finished.status, finished.computed) == (signal.SIGTERM, "stopped", 8)
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert swept(file, out).status == "complete"
    assert_same_tables(tables(out), tables(whole), 1e-9)


@pytest.mark.slow
def test_damaged_and_missing_parts_are_computed_again(file, whole, tmp_path):
    out = tmp_path / "out"
    swept(file, out)
    parts = sorted(path for path in out.rglob("part-*.parquet"))
    for place, damage in ((0, 0), (len(parts) // 2, 100), (-1, None)):
        content = parts[place].read_bytes()
        if damage is None:
            parts[place].unlink()
        else:
            parts[place].write_bytes(content[: len(content) - 8 if damage else 0])
    assert swept(file, out).computed == 3
    assert_same_tables(tables(out), tables(whole), 1e-9)


def test_another_configuration_is_refused_with_the_difference(file, whole):
    with pytest.raises(ResultError, match=r"noise\.samples: 2 before, 3 now"):
        swept(file, whole, "noise.samples=3")
    with pytest.raises(ResultError, match=r"(?s)edit\.layers.*trace: .* before, None now"):
        swept(file, whole, "trace=none", "edit.layers=all")
    assert swept(file, whole, "memory=2GiB").computed == 0  # which decides no result


def test_other_facts_or_another_model_are_refused(file, folder, tmp_path, monkeypatch):
    out, facts = tmp_path / "out", tmp_path / "facts.jsonl"
    changes = (f"facts={facts}", "edit=none", "gradients=none", "sever=none")
    cc.save_facts(FULL[:2], facts)
    swept(file, out, *changes)
    cc.save_facts([FULL[0], dataclasses.replace(FULL[1], target_true="Latin")], facts)
    with pytest.raises(ResultError, match="the facts of the sweep"):
        swept(file, out, *changes)
    cc.save_facts(FULL[:2], facts)
    monkeypatch.setattr(work, "model_fingerprint", lambda architecture: "other")
    with pytest.raises(ResultError, match="the model of the sweep"):
        swept(file, out, *changes)
    assert swept(file, out, *changes, overwrite=True).computed > 0


def test_files_of_another_origin_are_left_alone(file, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ResultError, match=r"files of another origin \(thesis.tex"):
            swept(file, tmp_path, **options)
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text(json.dumps({"command": "trace"}))
    with pytest.raises(ResultError, match="results of 'causalcone trace'"):
        swept(file, other)


def test_a_second_process_is_refused(file, tmp_path):
    out = tmp_path / "out"
    with stores.Store.open(out).locked(), pytest.raises(ResultError, match="another process is at work"):
        swept(file, out)


# --- what cannot be computed ---


@pytest.mark.slow
def test_failed_units_are_recorded_and_retried(file, whole, tmp_path, monkeypatch):
    out, run = tmp_path / "out", Worker.run

    def running(self, unit):
        if unit.name == "edit/error_injection/rome-1/00001":
            raise RuntimeError("the device is on fire\nhere")
        return run(self, unit)

    monkeypatch.setattr(Worker, "run", running)
    finished = swept(file, out)
    assert finished.status == "incomplete"
    assert [(each.unit.name, each.reason) for each in finished.failed] == [
        ("edit/error_injection/rome-1/00001", "RuntimeError: the device is on fire")
    ]
    assert json.loads((out / "run.json").read_text())["status"] == "incomplete"
    assert "raise RuntimeError" in (out / "sweep.log").read_text()
    found = status_of(str(out))
    assert found.failures == {"RuntimeError: the device is on fire": 1}
    (kept,) = pl.read_parquet(out / "failures" / "*.parquet").rows(named=True)
    assert (kept["unit"], kept["stage"], kept["items"]) == ("edit/error_injection/rome-1/00001", "edit", 4)
    assert [(each.failed, each.done) for each in found.stages if each.work.title == "error injection"] == [(4, 32)]
    monkeypatch.undo()
    again = swept(file, out)
    assert (again.status, again.computed, len(again.failed)) == ("incomplete", 0, 1)
    assert swept(file, out, retry_failed=True).status == "complete"
    assert status_of(str(out)).failures == {}
    assert_same_tables(tables(out), tables(whole), 1e-9)


@pytest.mark.slow
def test_preparations_that_fail_end_it(file, tmp_path, folder):
    broken = cc.Moments.load(folder / "moments.safetensors", (0, 1))
    broken.save(tmp_path / "moments.safetensors")
    with pytest.raises(ExperimentError, match=r"moments: .* has no moment of layer 2"):
        swept(file, tmp_path / "out", f"moments.file={tmp_path / 'moments.safetensors'}")
    assert tables(tmp_path / "out") == {}
    assert (
        swept(file, tmp_path / "out", f"moments.file={folder / 'moments.safetensors'}", overwrite=True).computed
        == UNITS
    )


def test_bad_facts_are_listed_before_anything_runs(file, tmp_path, monkeypatch):
    facts, out = tmp_path / "facts.jsonl", tmp_path / "out"
    bare, long = dataclasses.replace(FULL[3], target_new=None), dataclasses.replace(FULL[4], prompt="so " * 80 + "{}")
    cc.save_facts([FULL[0], bare, long, FULL[1]], facts)
    changes = (f"facts={facts}", "gradients=none", 'edit.methods=["finetune:1"]')
    ran = stopped_after(monkeypatch, 10**9, None)
    with pytest.raises(FactError, match=r"(?s)2 of 4 facts cannot be used:.*'only' has no target_new.*'one token'.*64"):
        swept(file, out, *changes)
    assert ran == []
    assert swept(file, out, *changes, "skip_bad_facts=true").status == "complete"
    assert set(tables(out)["edits"]["fact_id"]) == {"start", "middle"}
    assert "2 facts left out" not in str(status_of(str(out)).lines())
    assert sum(status_of(str(out)).left_out.values()) == 2


def test_facts_that_a_problem_is_not_posed_for_are_listed(file, tmp_path):
    """Tracing Reversal needs a noised answer that differs; with next to no noise there is none."""
    out = tmp_path / "out"
    changes = ('edit.problems=["tracing_reversal"]', "noise.sigma=1e-12", "trace=none", "sever=none", "gradients=none")
    assert swept(file, out, *changes, 'edit.methods=["finetune:1"]').status == "complete"
    rows = pl.concat(map(pl.read_parquet, sorted((out / "left_out").glob("*.parquet"))))
    assert rows["fact_id"].to_list() == [fact.id for fact in FULL]
    assert all("which is its answer without noise too" in reason for reason in rows["reason"])
    assert tables(out)["edits"].height == 0


@pytest.mark.slow
def test_a_disk_that_is_full(file, whole, tmp_path, monkeypatch):
    """Ends it at once, with what is finished; it goes on when there is room."""
    replacing, out, names = stores.replacing, tmp_path / "out", []

    def no_room(path, beside):
        if "probes" in path.parts:
            names.append(path)
            if len(names) > 3:
                raise OSError(28, "No space left on device")
        return replacing(path, beside)

    monkeypatch.setattr(stores, "replacing", no_room)
    with pytest.raises(ResultError, match=r"cannot write probes/.*: No space left on device; what is finished is kept"):
        swept(file, out)
    monkeypatch.undo()
    assert swept(file, out).status == "complete"
    assert_same_tables(tables(out), tables(whole), 1e-9)


# --- status and the command line ---


def test_status_of_a_sweep_under_way(file, tmp_path, monkeypatch, run):
    out = tmp_path / "out"
    stopped_after(monkeypatch, 8, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        swept(file, out)
    found = status_of(str(out))
    assert found.status == "stopped"
    assert [(each.work.title, each.done) for each in found.stages][:2] == [
        ("what the model knows", 6),
        ("level of noise", 1),
    ]
    assert sum(each.done for each in found.stages) < sum(each.work.items for each in found.stages)
    code, printed, _ = run("status", out)
    assert code == 0
    assert "causal tracing" in printed
    code, _, error = run("status", tmp_path)
    assert (code, "holds no sweep" in error) == (2, True)


@pytest.mark.slow
def test_the_command(file, whole, tmp_path, run):
    out = tmp_path / "out"
    code, printed, error = run("sweep", file, "--out", out)
    assert (code, error) == (0, "")
    assert "error injection: 36/36 edits" in printed
    assert "complete after" in printed
    assert_same_tables(tables(out), tables(whole), 1e-9)
    code, printed, _ = run("sweep", file, "--out", out, "--quiet")
    assert (code, printed) == (0, "")
    code, _, error = run("sweep", file)
    assert (code, "--out" in error) == (2, True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("trac.states=[]", "cannot have 'trac', only model, facts"),
        ("trace.state=[]", "trace cannot have 'state', only tokens, target, facts, states"),
        ("trace.states=[]", "trace.states is empty"),
        ('trace.states=["mpl:3"]', "trace.states: "),
        ("noise.samples=0", "noise.samples must be at least 1"),
        ("noise.sigma=loud", "noise.sigma must be a number"),
        ('edit.problems=["fact_injection"]', "must be 'error_injection', 'tracing_reversal'"),
        ('edit.methods=["mend"]', "choose from rome, memit"),
        ("edit.layers=preset", "no edit.preset is given"),
        ("edit.layers=most", "edit.layers"),
        ('edit.set=["speed=3"]', "no chosen method has that hyperparameter"),
        ("dtype=float8", "dtype must be 'float64', 'float32'"),
        ("moments.texts=texts.txt", "moments: file and texts are both given"),
        ("units.facts=many", "units.facts must be a whole number"),
        ("memory=lots", "memory: "),
        ("noise", "is not a setting"),
    ],
)
def test_configurations_that_make_no_sense(file, change, match, run, tmp_path):
    code, _, error = run("sweep", file, "--out", tmp_path / "out", "--set", change)
    assert code == 2
    assert match in error
    assert not (tmp_path / "out").exists()


def test_layers_that_the_model_does_not_have(file, tmp_path):
    with pytest.raises(ExperimentError, match=r"edit.layers: there is no layer 9; the model has layers 0 to 3"):
        swept(file, tmp_path / "out", "edit.layers=[0,9]")


def test_sweeps_that_are_not_there(run):
    code, _, error = run("sweep", "hase2024", "--out", "x")
    assert (code, "choose from demo, hase2023-gpt2xl" in error) == (2, True)
    code, _, error = run("sweep", "nowhere.toml", "--out", "x")
    assert (code, "nowhere.toml does not exist" in error) == (2, True)


def test_units_are_cut_alike_whatever_is_done(file, whole):
    """Their names and facts depend on nothing but the configuration and the filter."""
    titles = [each.work.title for each in status_of(str(whole)).stages]
    assert titles[-2:] == ["error injection", "fact forcing"]
    names = [unit.name for each in status_of(str(whole)).stages for unit in each.work.units]
    assert len(set(names)) == len(names) == UNITS
    assert isinstance(LocalExecutor(Worker(configured(file), str(whole))).model_info().depth, int)
    assert not list(Path(whole / ".partial").iterdir())
