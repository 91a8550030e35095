"""``causalcone edit``: what it takes from presets and options, facts, moments and contexts."""

import dataclasses

import pytest
from helpers.edit_command import FAST, PRESET_SETTINGS, arguments, assert_same, read, run_json, write_inputs
from helpers.editing_cases import FULL
from helpers.models import FACTS

import causalcone as cc
from causalcone.analysis import read_edits, scores
from causalcone.runners.edits.presets import load_hparams

DEPTH = 4


@pytest.fixture(scope="module")
def user(folder):
    """What a user has."""
    return write_inputs(folder)


# --- presets and overrides ---

PRESET = f"""
[own]
{PRESET_SETTINGS}defaults.rome.steps = 2
defaults.memit.covariance_weight = 7.0
[own.problems.error_injection]
rome.kl_factor = 0.9
finetune.1.norm_constraint = 1e-3
finetune.5.norm_constraint = 1e-5
[own.problems.fact_forcing]
finetune.1.steps = 2
"""


@pytest.fixture
def preset(tmp_path):
    (tmp_path / "mine.toml").write_text(PRESET)
    return str(tmp_path / "mine.toml")


def test_a_preset_fills_in_what_is_not_said(user, preset, tmp_path, run):
    out, several = tmp_path / "out", ["--method", "memit:2", "--method", "finetune", "--window", "4"]
    code, _, error = run(*arguments(user, out, *several, "--set", "memit.steps=1", "--quiet", preset=preset, limit=1))
    assert (code, error) == (0, "")
    kept = run_json(out)
    assert (kept["layers"], kept["aggregate"], kept["sigma"]) == ([0, 2], "mean", None)
    hparams = [each["hparams"] for each in kept["methods"]]
    own = [load_hparams(preset, method, "error_injection", w) for method, w in (("rome", 1), ("finetune", 4))]
    assert [hparams[0], hparams[2]] == [vars(each) for each in own]
    assert (hparams[0]["steps"], hparams[0]["kl_factor"], hparams[2]["norm_constraint"]) == (2, 0.9, 1e-5)
    assert (hparams[1]["steps"], hparams[1]["covariance_weight"]) == (1, 7.0)
    assert [each["window"] for each in kept["methods"]] == [1, 2, 4]


def test_what_is_said_wins_over_the_preset(user, preset, tmp_path, run):
    out, own = tmp_path / "out", {"problem": "fact_forcing", "method": "finetune", "layers": "1", "sigma": "0.3"}
    flags = ["--aggregate", "first", "--set", "norm_constraint=0.02", "--quiet"]
    assert run(*arguments(user, out, *flags, preset=preset, limit=2, moments=None, **own))[0] == 0
    kept = run_json(out)
    assert (kept["layers"], kept["aggregate"], kept["sigma"], kept["moments"]) == ([1], "first", 0.3, None)
    (method,) = kept["methods"]
    assert method["hparams"] == vars(cc.FinetuneHparams(steps=2, norm_constraint=0.02))


def test_the_preset_of_the_models_name(user, tmp_path, run):
    """A folder called so; without --preset it is told that there is one. One prompt takes the preset's only layer."""
    named, out = tmp_path / "Llama-2-7b-tiny", tmp_path / "out"
    named.symlink_to(user / "model")
    prompt = ["--prompt", "Bo plays the", "--subject", "Bo", "--answer", "golf", "--new", "tennis"]
    given = {"model": named, "facts": None, "method": None, "preset": "auto"}
    changes = ["--set", "steps=2", "--quiet", "--layer", "1"]
    code, _, error = run(*arguments(user, out, *prompt, *changes, **given))
    assert (code, error) == (0, "causalcone: --preset auto is llama-2-7b, by the model's name\n")
    kept = run_json(out)
    assert (kept["preset"], kept["layers"], kept["methods"][0]["hparams"]["weight_decay"]) == ("llama-2-7b", [1], 1e-3)
    code, _, error = run(*arguments(user, tmp_path / "none", *prompt, *changes, **given | {"preset": None}))
    assert (code, error) == (0, f"causalcone: there are published settings for {named}: --preset llama-2-7b\n")
    code, _, error = run(*arguments(user, tmp_path / "deep", *prompt, "--method", "memit", *changes[:-2], **given))
    assert (code, "layers 0 to 3" in error) == (2, True)


def test_layers_of_an_unknown_model_are_a_guess(user, tmp_path, run):
    out, several = tmp_path / "out", ["--method", "memit:2", "--method", "finetune", *FAST]
    code, _, error = run(*arguments(user, out, *several, preset="auto", limit=1))
    assert code == 0
    assert "layers are a guess, by their relative depth in other models (rome at layer 1, memit:2 at layer 1" in error
    assert "hyperparameters are the defaults, published for GPT-J; causalcone tune finds better ones" in error
    kept, edits = run_json(out), read_edits(out / "edits")
    assert (kept["preset"], kept["layers"]) == (None, [1, 3])
    assert dict(edits.select("method", "layer").iter_rows()) == {"rome": 1, "memit": 1, "finetune": 3}
    code, _, error = run(*arguments(user, tmp_path / "chosen", *FAST, preset="auto", limit=1, layers="2"))
    assert (code, "a guess" in error, "hyperparameters are the defaults" in error) == (0, False, True)
    assert read_edits(tmp_path / "chosen" / "edits")["layer"].to_list() == [2]


# --- facts, moments and contexts ---


def test_the_noise_level_is_that_of_all_facts(user, tmp_path, run):
    out, own = tmp_path / "out", {"problem": "fact_forcing", "method": "finetune", "layers": "1", "limit": 2}
    assert run(*arguments(user, out, *FAST, **own))[0] == 0
    level = cc.Tracer.from_pretrained(str(user / "model")).noise_level(FULL)
    assert run_json(out)["sigma"] == pytest.approx(level)
    assert read_edits(out / "edits")["fact_id"].n_unique() == 2


def test_facts_that_the_model_does_not_know_are_left_out_and_listed(user, tmp_path, run):
    editor = cc.Editor.from_pretrained(str(user / "model"))
    said = editor.session.tokenizer.decode(
        editor.session.model.generate(
            **editor.session.tokenizer(FULL[0].text, return_tensors="pt"), max_new_tokens=1, do_sample=False
        )[0, -1:]
    )
    facts = tmp_path / "facts.jsonl"
    cc.save_facts([dataclasses.replace(FULL[0], target_true=said), *FULL[1:3]], facts)
    given = arguments(user, tmp_path / "out", *FAST, facts=facts, layers="2")
    given.remove("--no-filter")
    code, _, error = run(*given)
    assert code == 0
    assert "not posed for 2 of 3 facts" in error
    assert read_edits(tmp_path / "out" / "edits")["fact_id"].to_list() == ["start"]
    kept = run_json(tmp_path / "out")
    assert kept["facts_filtered"] == 2
    assert [reason[:13] for reason in kept["results"]["filtered"]] == ["fact 'middle'", "fact 'end': t"]

    cc.save_facts(FULL[1:3], facts)
    given[given.index(tmp_path / "out")] = tmp_path / "none"
    code, _, error = run(*given)
    assert (code, "--no-filter" in error, (tmp_path / "none").exists()) == (2, True, False)


@pytest.mark.slow
def test_facts_without_prompts_are_edited_and_not_scored(user, tmp_path, run):
    out, facts = tmp_path / "out", tmp_path / "facts.jsonl"
    bare = dataclasses.replace(FACTS[1], target_new="Latin")
    cc.save_facts([FULL[0], bare], facts)
    code, printed, error = run(*arguments(user, out, "--set", "steps=2", facts=facts))
    assert code == 0
    assert "of 2 facts, 1 have no paraphrase prompts and 1 have no neighborhood prompts" in error
    table = scores(*read(out)[:2]).filter(fact_id="middle")
    assert table["rewrite"].null_count() == 0
    assert table["paraphrase"].null_count() == table["neighborhood"].null_count() == DEPTH
    assert "mean scores of 2 facts" in printed

    cc.save_facts([bare], facts)
    code, printed, _ = run(*arguments(user, out, "--set", "steps=2", "--plot", "--overwrite", facts=facts))
    assert (code, "paraphrase" in printed) == (0, False)
    assert (out / "plots" / "scores.png").exists()


def test_moments_can_be_collected_on_the_way(user, tmp_path, run):
    first, second = tmp_path / "first", tmp_path / "second"
    method = {"method": "memit:2", "layers": "2"}
    assert run(*arguments(user, first, *FAST, **method))[0] == 0
    assert run(*arguments(user, second, *FAST, moments=None, texts=user / "texts.txt", **method))[0] == 0
    assert_same(read(second), read(first))
    kept = cc.Moments.load(second / "moments.safetensors")
    assert (kept.layers, kept.source) == ((1, 2), str(user / "texts.txt"))
    again = arguments(user, second, *FAST, "--overwrite", moments=second / "moments.safetensors", **method)
    assert run(*again)[0] == 0
    assert cc.Moments.load(second / "moments.safetensors").layers == (1, 2), "it was given"
    assert run(*arguments(user, second, *FAST, "--overwrite", **method))[0] == 0
    assert not (second / "moments.safetensors").exists(), "of the run before"


def test_without_moments_they_are_of_text_that_the_model_writes(user, tmp_path, run, monkeypatch):
    monkeypatch.setenv("CAUSALCONE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert run(*arguments(user, out, *FAST, moments=None, layers="1", limit=2))[0] == 0
    assert run_json(out)["moments_given"] == "text sampled from the model"
    kept = cc.Moments.load(out / "moments.safetensors")
    assert (kept.layers, kept.source) == ((1,), "text sampled from the model")


def test_contexts_of_another_run(user, tmp_path, run):
    first, second = tmp_path / "first", tmp_path / "second"
    one = {"layers": "1", "limit": 2}
    assert run(*arguments(user, first, *FAST, contexts=None, seed=3, **one))[0] == 0
    assert run(*arguments(user, second, *FAST, contexts=first / "run.json", **one))[0] == 0
    assert_same(read(second), read(first))
    assert len(run_json(first)["contexts"]["rome"]) == 20
