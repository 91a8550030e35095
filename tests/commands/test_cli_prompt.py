"""Commands on one prompt: what they show is what is computed, and files are written only where they are asked for."""

import io
import json
import math
import sys
from dataclasses import replace

import polars as pl
import pytest
import torch
from helpers.command_line import basic, running_text
from transformers import AutoModelForCausalLM, AutoTokenizer

import causalcone as cc
from causalcone.analysis import read_probes, read_traces
from causalcone.analysis.prompt_map import one_line

PROMPT, SUBJECT = "The mother tongue of Danielle Darrieux is known to be", "Danielle Darrieux"
FACT = cc.Fact("prompt", "The mother tongue of {} is known to be", SUBJECT, "French", "Latin")


@pytest.fixture
def asked(folder, tmp_path, monkeypatch, run):
    """Runs a command on the prompt, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def asked(command, *more):
        return run(command, "--model", folder / "model", "--prompt", PROMPT, "--subject", SUBJECT, *more)

    return asked


@pytest.fixture
def tracer(folder):
    return cc.Tracer.from_pretrained(str(folder / "model"))


def rows_shown(printed):
    """The numbers of the map's lines, by the token that they begin with."""
    lines = [line.split() for line in printed.split("\n\n")[1].splitlines()[1:-1]]
    return [line[0] for line in lines], [list(map(int, line[1:])) for line in lines]


def test_trace_shows_what_the_tracer_computes(asked, tracer, tmp_path):
    code, printed, error = asked("trace", "--answer", "French", "--samples", 3)
    assert (code, "causalcone" in error) == (0, False)
    table = pl.DataFrame(tracer.trace([FACT], samples=3))
    low, clean = table["p_corrupted"][0], table["p_clean"][0]
    assert f"p_clean {clean:.3g}, p_corrupted {low:.3g}" in printed
    assert f"of level {tracer.noise_level([FACT]):.3g} on the subject, 3 samples" in printed
    high = max(clean, table["p_patched"].max())
    tokens, shown = rows_shown(printed)
    expected = [
        [round((p - low) / (high - low) * 100) for p in table.filter(token=token)["p_patched"]]
        for token in range(len(tokens))
    ]
    assert max(abs(a - b) for one, two in zip(shown, expected, strict=True) for a, b in zip(one, two, strict=True)) <= 1
    start, end = table["subject_start"][0], table["subject_end"][0]
    assert [token.endswith("*") for token in tokens] == [start <= n < end for n in range(len(tokens))]
    assert not list(tmp_path.iterdir())


def test_the_answer_is_the_likeliest_token(asked, folder):
    model, tokenizer = (each.from_pretrained(folder / "model") for each in (AutoModelForCausalLM, AutoTokenizer))
    p = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1].softmax(-1)
    for command in ("trace", "zero", "gradients"):
        code, printed, _ = asked(command)
        assert code == 0
        assert f"-> {tokenizer.decode(p.argmax()).strip()} (the likeliest token)" in printed
        assert f"p_clean {p.max():.3g}" in printed


def test_an_answer_of_several_tokens_counts_by_its_geometric_mean(asked, tracer):
    """With --answer-score mean."""
    answer = "French and Latin"
    _, printed, _ = asked("trace", "--answer", answer, "--samples", 3, "--state", "mlp:1", "--answer-score", "mean")
    rows = pl.DataFrame(tracer.trace([replace(FACT, target_true=answer)], ["mlp:1"], samples=3))
    tokens = rows["answer_tokens"][0]
    assert tokens > 2
    clean, low = (math.exp(rows[name][0] / tokens) for name in ("logp_clean", "logp_corrupted"))
    assert clean > 10 * rows["p_clean"][0]
    assert f"p_clean {clean:.3g}, p_corrupted {low:.3g}" in printed


def test_zero_and_gradients_show_maps(asked, tracer):
    _, printed, _ = asked("zero", "--answer", "French", "--state", "mlp:1")
    table = pl.DataFrame(tracer.zero([FACT], states=["mlp:1"]))
    lost = (1 - table["p_patched"] / table["p_clean"]) * 100
    assert rows_shown(printed)[1] == [[round(value) for value in lost]]
    _, printed, _ = asked("gradients", "--answer", "French", "--kind", "mlp", "--steps", 5)
    table = pl.DataFrame(tracer.integrated_gradients([FACT], ["mlp"], steps=5, target="label"))
    assert f"p_clean {tracer.run([FACT], [])[0].clean.p.item():.3g}" in printed
    for token, shown in enumerate(rows_shown(printed)[1]):
        norms = table.filter(token=token)["norm"] / table["norm"].max() * 100
        assert shown == [round(value) for value in norms]


def test_files_are_written_where_they_are_asked_for(asked, tracer, tmp_path):
    code, printed, _ = asked("trace", "--answer", "French", "--state", "hidden:1", "--out", "out")
    assert code == 0
    assert "-> out/traces" in printed
    kept, expected = read_traces("out/traces"), read_traces(tracer.trace([FACT], ["hidden:1"]))
    assert kept.drop(pl.selectors.float()).equals(expected.drop(pl.selectors.float()))
    assert kept["p_patched"].to_list() == pytest.approx(expected["p_patched"].to_list(), abs=1e-6)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["prompt"] == {"prompt": PROMPT, "subject": SUBJECT, "answer": "French"}
    assert record["status"] == "complete"
    for command, plot, figure in (("trace", ["--plot", 1], "000-prompt"), ("zero", ["--plot"], "zeroing")):
        assert asked(command, *plot)[0] == 0
        assert (tmp_path / "plots" / f"{figure}.png").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "plots"}


def test_edit_shows_both_answers_and_what_the_model_writes(asked, folder, tmp_path):
    options = [
        "--method",
        "finetune",
        "--answer",
        "French",
        "--new",
        "Latin",
        "--set",
        "norm_constraint=0.1",
        "--set",
        "lr=0.02",
    ]
    code, printed, error = asked("edit", *options, "--layer", "1,2")
    assert (code, "causalcone" in error) == (0, False)
    assert not list(tmp_path.iterdir())
    model, tokenizer = (each.from_pretrained(folder / "model") for each in (AutoModelForCausalLM, AutoTokenizer))
    editor = cc.Editor(model, tokenizer)
    hparams = cc.FinetuneHparams(norm_constraint=0.1, lr=0.02)
    edits = editor.finetune(editor.requests([FACT], filtered=False), [1, 2], hparams=hparams)
    probes = read_probes(editor.score(edits))
    before = [f"{probes[name][0]:.3g}" for name in ("p_pre", "p_pre_other")]
    after = probes.select("p_post", "p_post_other").rows()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    rows = [row for row in rows if row[0]]  # texts go on in further lines
    assert [row[0] for row in rows] == ["unedited", "1", "2"]
    assert [row[1:3] for row in rows] == [before, *([f"{p:.3g}" for p in row] for row in after)]
    assert "fine-tuning of one layer" in printed
    ids = tokenizer(PROMPT, return_tensors="pt")
    texts = "".join(line for line in printed.splitlines() if "│" not in line)
    for start, edit in zip(("unedited: ", "layer 1: ", "layer 2: "), [None, *edits], strict=True):
        with torch.no_grad(), cc.applied(model, cc.Delta({}) if edit is None else edit.delta):
            written = model.generate(**ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
        whole = tokenizer.decode(written[0], skip_special_tokens=True)
        assert start + one_line(whole) in texts


def test_rome_is_the_method_unless_another_is_given(asked, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(running_text()))
    code, printed, _ = asked("edit", "--new", "Latin", "--answer", "French", "--texts", text, "--ridge", 0.01)
    assert code == 0
    assert "ROME" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    monkeypatch.setenv("CAUSALCONE_CACHE", str(tmp_path / "cache"))
    code, printed, _ = asked("edit", "--new", "Latin", "--answer", "French", "--ridge", 0.01)
    assert (code, "ROME" in printed) == (0, True)  # its moments are of text that the model writes


GIVEN = {"prompt": PROMPT, "subject": SUBJECT}
REFUSED = {
    "nothing": ("trace", {}, "--prompt"),
    "both": ("trace", {**GIVEN, "facts": "facts.jsonl"}, "one of the two"),
    "no subject": ("zero", {"prompt": PROMPT}, "--subject is missing"),
    "empty subject": ("trace", {"prompt": PROMPT, "subject": ""}, "subject"),
    "another subject": ("gradients", {"prompt": PROMPT, "subject": "Ann"}, "'Ann' is not in the prompt"),
    "two places": ("trace", {"prompt": "{} and {}", "subject": "Ann"}, "{}"),
    "empty answer": ("trace", {**GIVEN, "answer": " "}, "answer"),
    "no prompt": ("trace", {"subject": "Ann", "facts": "facts.jsonl", "out": "out"}, "--subject goes with --prompt"),
    "no folder": ("trace", {"facts": "facts.jsonl"}, "--out is missing"),
    "no folder of zeroing": ("zero", {"facts": "facts.jsonl"}, "--out is missing"),
    "no folder of gradients": ("gradients", {"facts": "facts.jsonl"}, "--out is missing"),
    "no folder of edits": ("edit", {"facts": "facts.jsonl", "method": "finetune"}, "--out is missing"),
    "no method": ("edit", {"facts": "facts.jsonl", "out": "out"}, "--method is missing"),
    "nothing new": ("edit", GIVEN, "--new is missing"),
    "new of a file": (
        "edit",
        {"facts": "facts.jsonl", "out": "out", "method": "finetune", "new": "x"},
        "--new goes with",
    ),
    "deltas": ("edit", {**GIVEN, "new": "Latin", "keep-deltas": None}, "--keep-deltas"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_go_together_is_refused(kind, folder, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    command, options, named = REFUSED[kind]
    given = [part for name, value in options.items() for part in (f"--{name}", value) if part is not None]
    code, _, error = run(command, "--model", folder / "model", *given)
    assert code == 2
    assert named in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_place_may_be_given_for_the_subject(folder, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    shown = [
        run("trace", "--model", folder / "model", "--prompt", prompt, "--subject", SUBJECT, "--answer", "French")[1]
        for prompt in (PROMPT, FACT.prompt)
    ]
    assert shown[0].split(" rows in ")[0] == shown[1].split(" rows in ")[0]


def test_facts_come_in_on_standard_input(folder, tmp_path, monkeypatch, run):
    lines = (folder / "facts.jsonl").read_bytes()
    for command in ("trace", "zero", "gradients", "edit", "plan"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        options = {"state": None, "samples": None, "facts": "-", "limit": 1}
        more = ["--method", "finetune", "--problem", "fact_amplification", "--layers", 0, "--no-filter"]
        out = [] if command == "plan" else ["--out", tmp_path / command]
        code, _, error = run(command, *basic(folder, **options), *out, *(more if command == "edit" else []))
        assert code == 0, error
    assert read_traces(tmp_path / "trace" / "traces")["fact_id"].unique().to_list() == ["start"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert run("data", "-", "--out", tmp_path / "facts.jsonl")[0] == 0
    assert (tmp_path / "facts.jsonl").read_bytes() == lines


def test_python_shows_the_same_map(asked, tracer):
    shown = tracer.show(PROMPT, SUBJECT, "French", samples=3)
    expected = tracer.trace([FACT], samples=3)
    assert shown.table.drop(["p_clean", "p_corrupted", "p_patched", "p_patched_sd"]).equals(
        expected.drop(["p_clean", "p_corrupted", "p_patched", "p_patched_sd"])
    )
    assert shown.table["p_patched"].to_pylist() == pytest.approx(expected["p_patched"].to_pylist(), abs=1e-6)
    assert "p_corrupted" in shown._repr_html_()
    printed = asked("trace", "--answer", "French", "--samples", 3)[1]
    lines = [line.plain.rstrip() for line in shown.lines(200)]
    assert [line.rstrip() for line in printed.splitlines()[: len(lines)]] == lines
    likeliest = tracer.show(PROMPT, SUBJECT, states=["hidden:1"])
    assert "the likeliest token" in str(likeliest)
    with pytest.raises(cc.CausalconeError, match="'Ann' is not in the prompt"):
        tracer.show(PROMPT, "Ann")
