"""The command line, run in this process: what it writes, what it refuses, and what is left when it ends early."""

import json
import logging
import os
import sys
import warnings

import pyarrow.parquet as pq
import pytest
import torch
from helpers.command_line import basic
from helpers.compare import assert_table_close
from helpers.models import FACTS, gpt2

import causalcone as cc
from causalcone.analysis import read_traces
from causalcone.runners.commands.app import main
from causalcone.runners.results import folder as results


def test_trace_writes_what_the_tracer_computes(folder, tmp_path, tokenizer, run):
    out = tmp_path / "out"
    code, printed, _ = run("trace", *basic(folder, out=out, sigma="2sd", seed=3), "--state", "mlp:3", "--plot", 2)
    assert code == 0
    tracer = cc.Tracer.from_pretrained(str(folder / "model"))
    expected = tracer.trace(FACTS, states=("hidden:1", "mlp:3"), samples=2, sigma="2sd", seed=3)
    assert_table_close(read_traces(out / "traces"), read_traces(expected), 1e-5)
    assert "6 facts" in printed
    assert "last subject" in printed.replace("\n", " ") or "last" in printed
    figures = sorted(path.name for path in (out / "plots").iterdir())
    assert figures == ["000-start.png", "001-middle.png", "average_indirect_effect.png"]

    configuration = json.loads((out / "run.json").read_text())
    assert configuration["status"] == "complete"
    assert configuration["states"] == ["hidden:1", "mlp:3"]
    assert configuration["sigma"] == pytest.approx(tracer.noise_level(FACTS, "2sd"))
    part = next((out / "traces").glob("*.parquet"))
    metadata = json.loads(pq.read_schema(part).metadata[b"causalcone"])
    assert metadata["seed"] == 3
    assert metadata["versions"]["torch"] == torch.__version__


def test_effects_on_the_mean_per_token_are_shown(folder, tmp_path, run):
    """Tables are the same; what is shown and drawn is of them."""
    shown = {}
    for score in ("product", "mean"):
        for command in ("trace", "zero"):
            without = {"samples": None, "sigma": None} if command == "zero" else {}
            arguments = basic(folder, out=tmp_path / f"{command}-{score}", **without)
            code, printed, _ = run(command, *arguments, "--answer-score", score)
            assert code == 0
            shown[command, score] = printed.split(" rows in ")[0]
    for command in ("trace", "zero"):
        one, other = (read_traces(tmp_path / f"{command}-{score}" / "traces") for score in ("product", "mean"))
        assert_table_close(one, other)
        assert one["answer_tokens"].max() > 1
        assert shown[command, "product"] != shown[command, "mean"]
    code, _, error = run("trace", *basic(folder, out=tmp_path / "none"), "--answer-score", "sum")
    assert (code, "--answer-score is 'sum'; choose from product, mean" in error) == (2, True)
    assert not (tmp_path / "none").exists()


def test_limit_keeps_the_noise_level_of_all_facts(folder, tmp_path, run):
    out = tmp_path / "out"
    assert run("trace", *basic(folder, out=out, limit=2), "--quiet")[0] == 0
    tracer = cc.Tracer.from_pretrained(str(folder / "model"))
    configuration = json.loads((out / "run.json").read_text())
    assert configuration["sigma"] == pytest.approx(tracer.noise_level(FACTS, "3sd"))
    assert read_traces(out / "traces")["fact_id"].n_unique() == 2


def test_tokens_and_dtype(folder, tmp_path, run):
    out = tmp_path / "out"
    assert run("trace", *basic(folder, out=out, tokens="0,-1", dtype="float64"), "--quiet")[0] == 0
    traces = read_traces(out / "traces")
    assert traces.group_by("fact_id").len()["len"].max() == 2 * 4
    assert json.loads((out / "run.json").read_text())["dtype"] == "float64"


def test_kernels_and_precision(folder, tmp_path, run):
    out = tmp_path / "out"
    assert run("trace", *basic(folder, out=out, kernels="torch"), "--tf32", "--quiet")[0] == 0
    kept = json.loads((out / "run.json").read_text())
    assert kept["kernels"] == {"attention": "torch", "rows": "torch"}
    assert kept["tf32"] is True


def test_plan_computes_nothing(folder, monkeypatch, run):
    monkeypatch.setattr("causalcone.engine.run.runner.run_pass", lambda *_: pytest.fail("a pass was computed"))
    code, printed, _ = run("plan", *basic(folder))
    assert code == 0
    for word in ("passes", "rows", "FLOP", "published", "MiB", "seconds"):
        assert word in printed


def write(path, text):
    path.write_text(text)
    return path


BAD_FILES = {
    "missing": lambda path: path,
    "empty": lambda path: write(path, ""),
    "not JSON": lambda path: write(path, "subject, prompt"),
    "another shape": lambda path: write(path, '{"a": [1, 2]}'),
    "no subject": lambda path: write(path, '{"id": "7", "prompt": "{} is", "target_true": "x"}\n'),
    "subject elsewhere": lambda path: write(
        path, '[{"known_id": 7, "prompt": "Rome is in", "subject": "Paris", "attribute": "Italy"}]'
    ),
    "empty target": lambda path: write(path, '{"id": "7", "prompt": "{} is", "subject": "Rome", "target_true": " "}\n'),
    "too long": lambda path: write(
        path, json.dumps({"id": "7", "prompt": "{} is" + " so" * 70, "subject": "Rome", "target_true": "x"}) + "\n"
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_fact_files(kind, folder, tmp_path, run):
    path = BAD_FILES[kind](tmp_path / "bad.json")
    code, _, error = run("trace", *basic(folder, facts=path, out=tmp_path / "out"))
    assert code == 2
    assert str(path) in error or "'7'" in error or "known_id 7" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("state", "resid:1", "resid"),
        ("state", "mlp:0", "0"),
        ("samples", 0, "samples"),
        ("sigma", "-1", "sigma"),
        ("sigma", "lots", "lots"),
        ("dtype", "int8", "int8"),
        ("memory", "lots", "lots"),
        ("memory", "1KiB", "MiB"),
        ("kernels", "cuda", "torch, triton, flash"),
        ("tokens", "subjects", "subjects"),
        ("target", "best", "best"),
        ("seed", -1, "seed"),
    ],
)
def test_bad_options(option, value, named, folder, tmp_path, run):
    code, _, error = run("trace", *basic(folder, out=tmp_path / "out", **{option: value}))
    assert code == 2
    assert named in error
    assert not (tmp_path / "out").exists()


def test_bad_models(folder, tmp_path, tokenizer, run):
    def error_with(model):
        code, _, error = run("trace", *basic(folder, model=model, out=tmp_path / "out"))
        assert code == 2
        return error

    assert str(tmp_path / "nowhere") in error_with(tmp_path / "nowhere")

    weightless = tmp_path / "weightless"
    gpt2().config.save_pretrained(weightless)
    tokenizer.save_pretrained(weightless)
    assert str(weightless) in error_with(weightless)

    damaged = gpt2(dtype=torch.float32)
    with torch.no_grad():
        damaged.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    damaged.save_pretrained(tmp_path / "damaged")
    tokenizer.save_pretrained(tmp_path / "damaged")
    assert "transformer.h.1.mlp.c_proj.weight" in error_with(tmp_path / "damaged")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "no_such_model"}')
    tokenizer.save_pretrained(tmp_path / "other")
    assert str(tmp_path / "other") in error_with(tmp_path / "other")


def test_a_folder_is_not_overwritten_unasked(folder, tmp_path, run):
    out = tmp_path / "out"
    assert run("trace", *basic(folder, out=out), "--quiet")[0] == 0
    (out / "notes.txt").write_text("mine")
    before = read_traces(out / "traces")

    code, _, error = run("trace", *basic(folder, out=out, seed=5), "--quiet")
    assert code == 2
    assert "--overwrite" in error
    assert read_traces(out / "traces").equals(before)

    assert run("trace", *basic(folder, out=out, seed=5), "--quiet", "--overwrite")[0] == 0
    assert not read_traces(out / "traces").equals(before)
    assert (out / "notes.txt").read_text() == "mine"


def test_out_must_be_a_folder_that_can_be_written(folder, tmp_path, run):
    occupied = write(tmp_path / "file", "mine")
    code, _, error = run("trace", *basic(folder, out=occupied))
    assert (code, "is a file" in error) == (2, True)
    assert occupied.read_text() == "mine"
    code, _, error = run("trace", *basic(folder, out=occupied / "inside"))
    assert (code, str(occupied / "inside") in error) == (2, True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_refused(folder, tmp_path, run):
    (tmp_path / "locked").mkdir(mode=0o555)
    code, _, error = run("trace", *basic(folder, out=tmp_path / "locked" / "out"))
    assert code == 2
    assert "locked" in error


def test_bad_facts_are_skipped_on_request(folder, tmp_path, run):
    facts = tmp_path / "facts.jsonl"
    cc.save_facts([FACTS[0], cc.Fact("long", "{} is" + " so" * 70, "Rome", "x"), FACTS[1]], facts)
    assert run("trace", *basic(folder, facts=facts, out=tmp_path / "refused"))[0] == 2
    code, _, error = run("trace", *basic(folder, facts=facts, out=tmp_path / "out"), "--skip-bad-facts", "--quiet")
    assert code == 0
    assert "'long'" in error
    assert set(read_traces(tmp_path / "out" / "traces")["fact_id"]) == {"start", "middle"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError("the disk is on fire")])
def test_what_was_finished_stays_readable(failure, folder, tmp_path, monkeypatch, run):
    from causalcone.engine.run import runner as job

    whole, calls = job.run_pass, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 3:  # the model check and two facts
            raise failure
        return whole(*arguments)

    monkeypatch.setattr(job, "run_pass", failing)
    monkeypatch.setattr("causalcone.engine.run.scheduler.MAX_ROWS_CPU", 1)  # one fact, or less, a pass
    arguments = ["trace", *basic(folder, out=tmp_path / "out"), "--quiet"]
    if failure is KeyboardInterrupt:
        assert run(*arguments)[0] == 130
    else:
        monkeypatch.setattr(sys, "argv", ["causalcone", *map(str, arguments)])
        with pytest.raises(RuntimeError, match="fire"):
            main()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "stopped"


def test_parts_can_be_read_while_the_table_grows(tmp_path, monkeypatch, model, tokenizer):
    monkeypatch.setattr(results, "PART_ROWS", 1)
    folder = results.ResultFolder(tmp_path / "out", {"command": "test"})
    batches = list(cc.Tracer(model, tokenizer).stream(FACTS[:3], states=("hidden:1",), samples=2, sigma=0.5))
    with folder.table("traces", batches[0].schema) as table:
        for number, batch in enumerate(batches, start=1):
            table.write(batch)
            assert read_traces(tmp_path / "out" / "traces")["fact_id"].n_unique() == number
    assert {path.suffix for path in (tmp_path / "out" / "traces").iterdir()} == {".parquet"}


def test_help_has_examples(run):
    for command in ("trace", "plan", "zero", "gradients"):
        code, printed, _ = run(command, "--help")
        assert code == 0
        assert f"causalcone {command} --model" in printed


def test_log_records_are_shown_as_warnings_are(tmp_path, monkeypatch, run):
    """A line each, once."""

    def status_of(place):
        for _ in range(2):
            logging.getLogger("causalcone.runners.sweep").warning("the folder %s is noted", place)
            warnings.warn("a warning", stacklevel=2)
        raise cc.CausalconeError("the end")

    monkeypatch.setattr("causalcone.runners.sweep.status.status_of", status_of)
    code, printed, error = run("status", "study")
    expected = ["the folder study is noted", "a warning", "the end"]
    assert (code, printed, error.splitlines()) == (2, "", [f"causalcone: {line}" for line in expected])
