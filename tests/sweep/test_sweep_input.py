"""What sweeps are given: facts that they filter, list and leave out; configurations and folders that they refuse."""

import dataclasses
import json

import polars as pl
import pytest
from helpers.editing_cases import FULL
from helpers.sweeps import configured, stopped_after, swept, tables

import causalcone as cc
from causalcone.engine.errors import CausalconeError, ExperimentError, FactError
from causalcone.runners.results import store as stores
from causalcone.runners.results.folder import ResultError
from causalcone.runners.sweep import worker as work
from causalcone.runners.sweep.inputs.facts_table import FACTS, fact_table
from causalcone.runners.sweep.inputs.resources import NOISE_FILE
from causalcone.runners.sweep.inputs.units import Selection
from causalcone.runners.sweep.stages import stages_of
from causalcone.runners.sweep.status import status_of
from causalcone.runners.sweep.worker import Worker

# --- facts ---


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


def test_the_level_of_noise_is_that_of_the_facts_that_go_on(file, folder, tmp_path):
    out = tmp_path / "out"
    swept(file, out, "noise.sigma=3sd", "edit=none", "gradients=none", "sever=none", "zero=none", "limit=4")
    level = cc.Tracer.from_pretrained(str(folder / "model")).noise_level(FULL[:4])
    assert json.loads((out / "noise.json").read_text())["sigma"] == pytest.approx(level)


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


def test_a_prompt_that_is_too_long_after_a_context_is_left_out(file, folder, tmp_path):
    """Alone it fits, and so does what is not edited in contexts; the other fact of its unit is edited."""
    cc.save_facts([FULL[0], dataclasses.replace(FULL[1], prompt="so " * 12 + "{} is")], tmp_path / "facts.jsonl")
    (tmp_path / "contexts.json").write_text(json.dumps({"rome": ["They say " * 12], "memit": ["They say " * 12]}))
    changes = (f"facts={tmp_path / 'facts.jsonl'}", f"contexts={tmp_path / 'contexts.json'}", "edit.layers=[0]")
    only = ('edit.problems=["error_injection"]', 'edit.methods=["rome", "finetune:1"]', "gradients=none", "sever=none")
    assert swept(file, tmp_path / "out", *changes, *only).status == "complete"
    edits = tables(tmp_path / "out")["edits"]
    assert edits.select("method", "fact_id").rows() == [
        ("finetune", "start"),
        ("finetune", "middle"),
        ("rome", "start"),
    ]
    (row,) = pl.concat(map(pl.read_parquet, (tmp_path / "out" / "left_out").glob("*.parquet"))).to_dicts()
    assert (row["fact_id"], "positions" in row["reason"]) == ("middle", True)


# --- what is refused ---


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


def test_overwriting_drops_a_sweep_alone_and_only_for_one_that_can_begin(file, tmp_path):
    out, changes = tmp_path / "out", ("edit=none", "gradients=none", "sever=none", "zero=none")
    swept(file, out, *changes, "limit=2")
    (out / "notes.md").write_text("mine")
    before = {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and not path.name.startswith("sweep.")
    }
    with pytest.raises(CausalconeError, match="nowhere"):
        swept(file, out, *changes, "facts=nowhere.jsonl", overwrite=True)
    assert {path: path.read_bytes() for path in before} == before
    swept(file, out, *changes, "limit=1", overwrite=True)
    assert (out / "notes.md").read_text() == "mine"
    assert tables(out)["traces"]["fact_id"].unique().to_list() == [FULL[0].id]


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
