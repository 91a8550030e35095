"""The commands of the localization methods: what they write is what the tracer computes, and what they refuse."""

import dataclasses
import json
import shutil

import polars as pl
import pytest
from helpers.command_line import basic
from helpers.compare import assert_table_close
from helpers.models import FACTS

import causalcone as cc
from causalcone.analysis import read_gradients, read_traces

TEXT = ["In the city of Rome they speak Latin", "Ann Lee plays the sport of golf", "One of the famous players"]
OTHER = dataclasses.replace(FACTS[0], counterfactual_subject="Bo Lee")


@pytest.fixture
def tracer(folder):
    return cc.Tracer.from_pretrained(str(folder / "model"))


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXT) + "\n")
    return path


def configuration(out):
    return json.loads((out / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--sever", "mlp"], {"sever": "mlp"}),
        (["--sever", "both", "--compat", "published"], {"sever": "both", "compat": "published"}),
        (["--joint", "--tokens", "subject"], {"joint": True, "tokens": "subject"}),
        (
            ["--noise", "uniform", "--sigma", "0.5", "--replace-noise"],
            {"noise": cc.Noise("uniform", True), "sigma": 0.5},
        ),
        (["--extra-tokens", "2", "--seed", "4"], {"extra_tokens": 2, "seed": 4}),
        (["--state", "head.3:1", "--state", "mlp:3"], {"states": ("hidden:1", "head.3:1", "mlp:3")}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_trace_with_its_options(flags, options, folder, tmp_path, tracer, run):
    out = tmp_path / "out"
    assert run("trace", *basic(folder, out=out), *flags, "--plot", 1)[0] == 0
    expected = tracer.trace(FACTS, **{"states": ("hidden:1",), "samples": 2, **options})
    assert_table_close(read_traces(out / "traces"), read_traces(expected), 1e-5)
    drawn = {path.name for path in (out / "plots").iterdir()}
    averages = {"average_indirect_effect.png", "000-start.png"}
    assert drawn == ({"joint_effect.png"} if "joint" in options else averages)


@pytest.mark.parametrize(("noise", "flags"), [("multivariate", []), ("t", ["--dof", "5"])])
def test_noise_like_running_text(noise, flags, folder, texts, tmp_path, tracer, run):
    out = tmp_path / "out"
    code, _, _ = run("trace", *basic(folder, out=out, noise=noise), "--noise-texts", texts, *flags, "--quiet")
    assert code == 0
    like_text = tracer.embedding_noise(TEXT, dof=5 if flags else None)
    expected = tracer.trace(FACTS, states=("hidden:1",), samples=2, noise=like_text)
    assert_table_close(read_traces(out / "traces"), read_traces(expected), 1e-5)
    kept = configuration(out)
    assert (kept["noise"], kept["sigma"], kept["noise_texts"]) == (noise, None, str(texts))
    assert len(kept["noise_texts_sha256"]) == 64


def test_counterfactual_prompts(folder, tmp_path, tracer, run):
    facts, out = tmp_path / "facts.jsonl", tmp_path / "out"
    cc.save_facts([OTHER, FACTS[2]], facts)
    arguments = ["trace", *basic(folder, facts=facts, out=out, noise="counterfactual", samples=None), "--quiet"]
    code, _, error = run(*arguments)
    assert (code, "'end' has no counterfactual_subject" in error, out.exists()) == (2, True, False)
    assert run(*arguments, "--skip-bad-facts")[0] == 0
    expected = tracer.trace([OTHER], states=("hidden:1",), noise="counterfactual")
    assert_table_close(read_traces(out / "traces"), read_traces(expected), 1e-5)
    (reason,) = configuration(out)["skipped"]
    assert "'end' has no counterfactual_subject" in reason


def test_severed_tracing_is_of_hidden_states_unless_told_otherwise(folder, tmp_path, run):
    out = tmp_path / "out"
    assert run("trace", *basic(folder, out=out, state=None, sever="attn", limit=1), "--quiet")[0] == 0
    assert configuration(out)["states"] == ["hidden:1"]
    assert read_traces(out / "traces")["method"].unique().to_list() == ["sever_attn"]


def test_tokens_without_a_role_have_maps_but_no_averages(folder, tmp_path, run):
    facts, out = tmp_path / "facts.jsonl", tmp_path / "out"
    cc.save_facts([FACTS[1]], facts)
    code, _, error = run("trace", *basic(folder, facts=facts, out=out, tokens="0"), "--plot", 1)
    assert (code, "no figure of averages" in error) == (0, True)
    assert [path.name for path in (out / "plots").iterdir()] == ["000-middle.png"]
    assert configuration(out)["status"] == "complete"


def test_plan_takes_the_same_options(folder, run):
    plain, severed = (run("plan", *basic(folder), *flags)[1] for flags in ([], ["--sever", "mlp"]))
    assert "FLOP" in severed
    assert plain.splitlines()[:5] != severed.splitlines()[:5]


def test_zero_writes_what_the_tracer_computes(folder, tmp_path, tracer, run):
    out = tmp_path / "out"
    options = {"state": "mlp:1", "samples": None, "target": "argmax", "tokens": "subject_onward"}
    code, printed, _ = run("zero", *basic(folder, out=out, **options), "--state", "heads:1", "--plot")
    assert code == 0
    expected = tracer.zero(FACTS, ("mlp:1", "heads:1"), target="argmax", tokens="subject_onward")
    assert_table_close(read_traces(out / "traces"), read_traces(expected), 1e-5)
    traces = read_traces(out / "traces").filter(kind="mlp", layer=2)
    lost = ((traces["p_clean"] - traces["p_patched"]) / traces["p_clean"]).clip(0, 1).mean()
    assert f"{lost:.3f}" in printed
    assert "10 of 16 heads" in printed
    assert (out / "plots" / "zeroing.png").stat().st_size > 10_000
    kept = configuration(out)
    assert (kept["command"], kept["tokens"], kept["status"]) == ("zero", "subject_onward", "complete")


def test_zero_by_default(folder, tmp_path, tracer, run):
    out = tmp_path / "out"
    assert run("zero", *basic(folder, out=out, state=None, samples=None, limit=2), "--quiet")[0] == 0
    assert_table_close(read_traces(out / "traces"), read_traces(tracer.zero(FACTS[:2])), 1e-5)
    assert not (out / "plots").exists()


def test_gradients_writes_what_the_tracer_computes(folder, tmp_path, tracer, run):
    out = tmp_path / "out"
    options = {"state": None, "kind": "mlp", "steps": 3, "baseline": "corrupted", "seed": 2, "target": "label"}
    code, printed, _ = run("gradients", *basic(folder, out=out, limit=2, **options), "--plot", 1)
    assert code == 0
    sigma = tracer.noise_level(FACTS)
    corrupted = {"baseline": "corrupted", "samples": 2, "sigma": sigma, "seed": 2}
    expected = tracer.integrated_gradients(FACTS[:2], ("mlp",), steps=3, target="label", **corrupted)
    found = read_gradients(out / "gradients")
    assert_table_close(found, read_gradients(expected), 1e-5)
    assert f"{found['gap'].abs().max():.3g}" in printed
    assert "Use --baseline corrupted" not in printed
    assert [path.name for path in (out / "plots").iterdir()] == ["gradients-000-start.png"]
    kept = configuration(out)
    assert (kept["sigma"], kept["kinds"]) == (pytest.approx(sigma), ["mlp"])


def test_gradients_from_zero_say_why_hidden_states_have_a_gap(folder, tmp_path, run):
    out = tmp_path / "out"
    code, printed, _ = run("gradients", *basic(folder, out=out, limit=1, state=None, samples=None, steps=2))
    assert (code, "Use --baseline corrupted" in printed) == (0, True)
    assert read_gradients(out / "gradients")["kind"].unique().sort().to_list() == ["attn", "hidden", "mlp"]
    assert configuration(out)["sigma"] is None


REFUSED = {
    "severed MLPs": ("trace", ["--sever", "mlp", "--state", "mlp:5"], "hidden states only"),
    "what to sever": ("trace", ["--sever", "heads"], "mlp, attn, both"),
    "noise": ("trace", ["--noise", "pink"], "pink"),
    "shapeless noise": ("trace", ["--noise", "multivariate"], "--noise-texts"),
    "texts alone": ("trace", ["--noise-texts", "TEXTS"], "multivariate or t"),
    "t without dof": ("trace", ["--noise", "t", "--noise-texts", "TEXTS"], "--dof"),
    "dof alone": ("trace", ["--dof", "5"], "dof"),
    "too few dof": ("trace", ["--noise", "t", "--noise-texts", "TEXTS", "--dof", "2"], "more than 2"),
    "sigma of its own": ("trace", ["--noise", "multivariate", "--noise-texts", "TEXTS", "--sigma", "1"], "sigma"),
    "sigma of a prompt": ("trace", ["--noise", "counterfactual", "--sigma", "1"], "sigma"),
    "replacing by a prompt": ("trace", ["--noise", "counterfactual", "--replace-noise"], "replace"),
    "more of a prompt": ("trace", ["--noise", "counterfactual", "--extra-tokens", "1"], "extra"),
    "fewer tokens": ("trace", ["--extra-tokens", "-1"], "-1"),
    "compat": ("trace", ["--compat", "loose"], "published"),
    "no texts": ("trace", ["--noise", "multivariate", "--noise-texts", "nowhere.txt"], "nowhere.txt"),
    "plan": ("plan", ["--sever", "mlp", "--state", "attn:1"], "hidden states only"),
    "zeroed state": ("zero", ["--state", "resid:1"], "resid"),
    "zeroed tokens": ("zero", ["--tokens", "subjects"], "subjects"),
    "zeroed target": ("zero", ["--target", "best"], "best"),
    "kind": ("gradients", ["--kind", "heads"], "heads"),
    "kind twice": ("gradients", ["--kind", "mlp", "--kind", "mlp"], "each once"),
    "steps": ("gradients", ["--steps", "0"], "steps"),
    "baseline": ("gradients", ["--baseline", "mean"], "mean"),
    "noise without a corrupted run": ("gradients", ["--sigma", "0.5"], "--baseline corrupted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_before_the_model_is_read(case, folder, texts, tmp_path, monkeypatch, run):
    command, flags, reason = REFUSED[case]
    monkeypatch.setattr(cc.Tracer, "from_pretrained", lambda *_, **__: pytest.fail("the model was read"))
    flags = [str(texts) if flag == "TEXTS" else flag for flag in flags]
    out = [] if command == "plan" else ["--out", tmp_path / "out"]
    code, _, error = run(command, *basic(folder, state=None, samples=None), *out, *flags)
    assert code == 2
    assert reason in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "flags"), [("trace", ["--state", "head.4:1"]), ("zero", ["--state", "head.4:1"])], ids=["trace", "zero"]
)
def test_heads_that_the_model_lacks(command, flags, folder, tmp_path, run):
    code, _, error = run(command, *basic(folder, state=None, samples=None, out=tmp_path / "out"), *flags)
    assert (code, "has 4 heads" in error, (tmp_path / "out").exists()) == (2, True, False)


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_noise_texts_without_text(content, folder, tmp_path, run):
    (tmp_path / "empty.txt").write_text(content)
    flags = ["--noise", "multivariate", "--noise-texts", tmp_path / "empty.txt"]
    code, _, error = run("trace", *basic(folder, out=tmp_path / "out"), *flags)
    assert (code, "holds no text" in error) == (2, True)


@pytest.mark.parametrize("command", ["zero", "gradients"])
def test_too_little_memory_and_bad_facts_leave_no_folder(command, folder, tmp_path, run):
    out, facts = tmp_path / "out", tmp_path / "facts.jsonl"
    code, _, error = run(command, *basic(folder, out=out, state=None, samples=None, memory="1KiB"))
    assert (code, "MiB" in error, out.exists()) == (2, True, False)
    cc.save_facts([cc.Fact("long", "{} is" + " so" * 70, "Rome", "x")], facts)
    arguments = [command, *basic(folder, out=out, state=None, samples=None, facts=facts)]
    for flags, named in (([], "'long'"), (["--skip-bad-facts"], "none of the facts")):
        code, _, error = run(*arguments, *flags)
        assert (code, named in error, out.exists()) == (2, True, False)


def test_skipped_facts_and_records_are_kept_with_their_reasons(folder, tmp_path, run):
    facts, out = tmp_path / "facts.jsonl", tmp_path / "out"
    cc.save_facts([FACTS[0], cc.Fact("long", "{} is" + " so" * 70, "Rome", "x"), FACTS[1]], facts)
    facts.write_text(facts.read_text() + '{"id": "half", "prompt": "{} is"}\n')
    code, _, error = run("trace", *basic(folder, facts=facts, out=out), "--skip-bad-facts", "--quiet")
    assert code == 0
    record, fact = configuration(out)["skipped"]
    assert "half" in record
    assert "'long'" in fact
    assert "positions" in fact
    assert record in error
    assert fact in error


def test_a_folder_that_cannot_be_cleared(folder, tmp_path, monkeypatch, run):
    out = tmp_path / "out"
    arguments = ["trace", *basic(folder, out=out, limit=1), "--quiet"]
    assert run(*arguments)[0] == 0

    def busy(path, *_):
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    code, _, error = run(*arguments, "--overwrite")
    assert code == 2
    assert "Device or resource busy" in error
    assert str(out / "traces") in error
    monkeypatch.undo()
    assert read_traces(out / "traces").height > 0


def test_runs_of_different_commands_replace_each_other_only_when_asked(folder, tmp_path, run):
    out = tmp_path / "out"
    assert run("trace", *basic(folder, out=out, limit=1), "--quiet")[0] == 0
    zero = ["zero", *basic(folder, out=out, state=None, samples=None, limit=1), "--quiet"]
    assert run(*zero)[0] == 2
    assert run(*zero, "--overwrite")[0] == 0
    assert read_traces(out / "traces").filter(pl.col("method") != "zero").is_empty()
