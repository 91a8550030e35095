"""What sweeps write is what tracer and editor compute; they go on where they ended, and lose nothing."""

import json
import os
import signal
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from helpers.editing_cases import FULL
from helpers.sweeps import assert_same_tables, configured, stopped_after, swept, tables

import causalcone as cc
from causalcone.analysis import scores
from causalcone.engine.edit.scoring.tables import edit_batch
from causalcone.engine.errors import ExperimentError
from causalcone.runners.results import store as stores
from causalcone.runners.results.folder import ResultError
from causalcone.runners.sweep.executor import LocalExecutor
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


@pytest.mark.parametrize("read", ["polars", "pandas"])
def test_other_readers_find_the_data_sets(whole, read):
    rows = tables(whole)["probes"].height
    if read == "polars":
        assert pl.scan_parquet(whole / "probes/**/*.parquet").collect().height == rows
    else:
        import pandas as pd

        assert len(pd.read_parquet(whole / "probes")) == rows


def test_the_likeliest_answers_are_those_of_the_models_own_forward(folder, study):
    session = cc.Tracer.from_pretrained(str(folder / "model")).session
    table = pl.read_parquet(study / "facts.parquet")
    for prompt, subject, answers in table.select("prompt", "subject", "likeliest").iter_rows():
        ids = session.tokenizer(prompt.replace("{}", subject), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            p, tokens = session.model(ids).logits[0, -1].double().softmax(-1).topk(5)
        assert [answer["p"] for answer in answers] == pytest.approx(p.tolist(), abs=1e-6)
        assert [answer["token"] for answer in answers] == [session.tokenizer.decode([token]) for token in tokens]


def test_units_are_cut_alike_whatever_is_done(file, whole):
    """Their names and facts depend on nothing but the configuration and the filter."""
    titles = [each.work.title for each in status_of(str(whole)).stages]
    assert titles[-2:] == ["error injection", "fact forcing"]
    names = [unit.name for each in status_of(str(whole)).stages for unit in each.work.units]
    assert len(set(names)) == len(names) == UNITS
    assert isinstance(LocalExecutor(Worker(configured(file), str(whole))).model_info().depth, int)
    assert not list(Path(whole / ".partial").iterdir())


# --- going on ---


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
