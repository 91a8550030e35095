"""What ``causalcone edit`` refuses, by what it says, and that it leaves nothing behind then."""

import dataclasses

import pytest
import torch
from helpers.edit_command import FAST, arguments, run_json, write_inputs
from helpers.editing_cases import FULL
from helpers.models import FACTS, gpt2

import causalcone as cc
from causalcone.analysis import read_edits


@pytest.fixture(scope="module")
def user(folder):
    """What a user has."""
    return write_inputs(folder)


BAD_OPTIONS = {
    "method": ({"method": "mend"}, [], "unknown method 'mend'"),
    "window": ({"method": "memit:0"}, [], "memit:0"),
    "window of ROME": ({"method": "rome:3"}, [], "one layer"),
    "window of nothing": ({}, ["--window", "3"], "--window 3"),
    "method twice": ({}, ["--method", "rome"], "given twice"),
    "problem": ({"problem": "fact_lifting"}, [], "fact_lifting"),
    "preset": ({"preset": "gptk"}, [], "gptk"),
    "problem of a preset": ({"preset": "gpt2-xl", "problem": "fact_erasure"}, [], "no problem 'fact_erasure'"),
    "layers": ({"layers": "first"}, [], "first"),
    "no setting": ({}, ["--set", "steps"], "NAME=VALUE"),
    "unknown setting": ({}, ["--set", "norm_constraint=1"], "no chosen method has that"),
    "setting of no method": ({}, ["--set", "mend.lr=1"], "unknown method 'mend'"),
    "setting of another method": ({}, ["--set", "memit.lr=1"], "no chosen method has that"),
    "value": ({}, ["--set", "lr=fast"], "give a number"),
    "part of a step": ({}, ["--set", "steps=2.5"], "whole number"),
    "no step": ({}, ["--set", "steps=0"], "at least one"),
    "aggregate": ({}, ["--aggregate", "median"], "median"),
    "two kinds of moments": ({}, ["--texts", "demo"], "one of the two"),
    "no texts": ({"moments": None}, ["--texts", "nowhere.txt"], "nowhere.txt"),
    "no contexts": ({"contexts": "nowhere.json"}, [], "nowhere.json"),
    "no references": ({}, ["--references", "nowhere.json"], "nowhere.json"),
    "facts": ({"facts": "nowhere.jsonl"}, [], "nowhere.jsonl"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_what_makes_no_sense_is_refused_before_the_model_is_read(case, user, tmp_path, monkeypatch, run):
    changes, flags, reason = BAD_OPTIONS[case]
    monkeypatch.setattr(cc.Tracer, "from_pretrained", lambda *_, **__: pytest.fail("the model was read"))
    refused(run(*arguments(user, tmp_path / "out", *flags, **changes)), reason, tmp_path / "out")


def refused(ended, reason, out):
    code, _, error = ended
    assert code == 2
    assert reason in error
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    "content", ["", "[", '["a"]', '{"rome": ["a"]}', '{"rome": "a", "memit": ["b"]}', '{"rome": [], "memit": ["b"]}']
)
def test_contexts_that_are_none(content, user, tmp_path, run):
    (tmp_path / "contexts.json").write_text(content)
    ended = run(*arguments(user, tmp_path / "out", contexts=tmp_path / "contexts.json"))
    refused(ended, f"{tmp_path / 'contexts.json'} holds no contexts", tmp_path / "out")


BAD_FOR_THE_MODEL = {
    "layer": ({"layers": "4"}, [], "0 to 3"),
    "layers of a preset": ({"preset": "gptj"}, [], "0 to 3"),
    "memory": ({"memory": "1KiB"}, [], "MiB"),
    "dtype": ({"dtype": "int8"}, [], "int8"),
    "no file of moments": ({"moments": "nowhere.safetensors"}, [], "nowhere.safetensors"),
    "no such moment": ({"moments": "LAYER"}, [], "layer"),
    "moments of another model": ({"moments": "OTHER"}, [], "another model"),
    "singular moments": ({"ridge": "-1"}, [], "ridge"),
    "noise": ({"problem": "fact_forcing", "sigma": "0"}, [], "sigma"),
    "compat": ({}, ["--compat", "loose"], "published"),
}


@pytest.fixture
def other_moments(user, tokenizer, tmp_path):
    texts = (user / "texts.txt").read_text().splitlines()
    cc.Moments.collect(gpt2(dtype=torch.float32, seed=1), tokenizer, texts).save(tmp_path / "other.safetensors")
    model = cc.Tracer.from_pretrained(str(user / "model")).session.model
    cc.Moments.collect(model, tokenizer, texts, (2,)).save(tmp_path / "layer.safetensors")
    return {"OTHER": tmp_path / "other.safetensors", "LAYER": tmp_path / "layer.safetensors"}


@pytest.mark.parametrize("case", BAD_FOR_THE_MODEL)
def test_what_does_not_go_with_the_model(case, user, other_moments, tmp_path, run):
    changes, flags, reason = BAD_FOR_THE_MODEL[case]
    changes = {name: other_moments.get(value, value) for name, value in changes.items()}
    refused(run(*arguments(user, tmp_path / "out", *flags, **changes)), reason, tmp_path / "out")


def test_bad_facts_are_refused_or_skipped(user, tmp_path, run):
    out, facts = tmp_path / "out", tmp_path / "facts.jsonl"
    plain = dataclasses.replace(FACTS[2], target_new=None)
    long = dataclasses.replace(FULL[1], neighborhood_prompts=("They say" + " so" * 70,))
    for bad, reason in ((plain, "'end' has no target_new"), (long, "'middle': prompt and target need")):
        cc.save_facts([FULL[0], bad], facts)
        refused(run(*arguments(user, out, facts=facts)), reason, out)
    cc.save_facts([plain, FULL[0], long], facts)
    assert run(*arguments(user, out, *FAST, "--skip-bad-facts", facts=facts, layers="1"))[0] == 0
    assert read_edits(out / "edits")["fact_id"].to_list() == ["start"]
    assert [reason[:14] for reason in run_json(out)["skipped"]] == ["fact 'end' has", "fact 'middle':"]
