"""``causalcone tune``: what it tries, chooses and writes, what an interruption leaves, what is refused."""

import dataclasses
import json
import shutil
import tomllib

import polars as pl
import pytest
import torch
from filelock import FileLock
from helpers.compare import assert_table_close
from helpers.edit_command import STARTING_PRESET, arguments, read, run_json, write_inputs
from helpers.editing_cases import FULL
from transformers import AutoModelForCausalLM

import causalcone as cc
from causalcone.analysis import mean_scores, read_edits, scores
from causalcone.engine.errors import ExperimentError
from causalcone.runners.edits.presets import load_hparams, load_preset
from causalcone.runners.sweep.config import load_sweep
from causalcone.runners.sweep.stages import stages_of

KINDS = ("paraphrase", "neighborhood")


@pytest.fixture(scope="module")
def user(folder):
    """What a user has."""
    return write_inputs(folder)


@pytest.fixture
def preset(tmp_path):
    (tmp_path / "mine.toml").write_text(STARTING_PRESET)
    return str(tmp_path / "mine.toml")


def tuning(user, out, *flags, **changes):
    """The arguments of a small tuning; options are changed, or left out where they are None."""
    changed = {"method": "finetune:1", "layer": 1, "grid": "finetune.norm_constraint=1e-2,1e-3", **changes}
    return ["tune", *arguments(user, out, "--set", "steps=2", *flags, **changed)[1:]]


# --- what is chosen and written ---


def test_all_settings_are_tried_and_one_is_chosen(user, tmp_path, run):
    out = tmp_path / "out"
    more = ["--method", "rome", "--problem", "error_injection", "--problem", "fact_amplification"]
    code, printed, error = run(*tuning(user, out, *more, "--give-up", "1", preset=None))
    assert (code, error) == (0, "")
    table = pl.read_parquet(out / "tuning.parquet")
    assert table.group_by("problem", "method", maintain_order=True).len().rows() == [
        (problem, method, count)
        for problem in ("error_injection", "fact_amplification")
        for method, count in (("finetune", 2), ("rome", 3))
    ]
    assert table["chosen"].sum() == 4
    for row in table.iter_rows(named=True):
        folder = out / row["folder"]
        own = mean_scores(scores(*read(folder)[:2]))
        means = dict(own.select("score", "mean").iter_rows())
        assert [row[name] for name in ("rewrite", *KINDS)] == [means[name] for name in ("rewrite", *KINDS)]
        assert (row["facts"], row["edits"], row["failed"], row["layer"]) == (6, 6, 0, 1)
        assert run_json(folder)["status"] == "complete"
        assert f"{row['rewrite']:.3f}" in printed
        (kept,) = run_json(folder)["methods"]
        for name in ("kl_factor", "norm_constraint"):
            assert row[name] == kept["hparams"].get(name)
    assert read_edits(out / "grid/error_injection/finetune-1/0/edits")["layer"].unique().to_list() == [1]

    ranked = table.sort("rewrite", "kl_factor", descending=True)  # ROME's settings may do equally well in two steps
    best = ranked.unique(["problem", "method"], keep="first", maintain_order=True)
    expected = {(row["problem"], row["method"]): row["setting"] for row in best.iter_rows(named=True)}
    picked = {(row["problem"], row["method"]): row["setting"] for row in table.filter("chosen").iter_rows(named=True)}
    assert picked == expected
    record = json.loads((out / "tuning.json").read_text())
    assert (record["status"], record["most"], record["give_up"]) == ("complete", 0.99, 1.0)
    assert record["tried"] == table.to_dicts()
    for each in record["chosen"]:
        written = load_hparams(str(out / "preset.toml"), each["method"], each["problem"], each["window"])
        assert vars(written) == each["hparams"]
    assert "Error injection: mean scores of 6 facts by setting" in printed
    assert "neighbourhood" in printed
    text = (out / "preset.toml").read_text()
    assert f"the model {user / 'model'}, facts of {user / 'full.jsonl'}, layer 2 (counted from 1)" in text
    assert "finetune:1: norm_constraint=0.01 of 2 settings on 6 facts: rewrite" in text
    assert load_preset(str(out / "preset.toml")).edit_layers == (0, 1, 2, 3)


def test_keys_are_tried_as_numbers_are(user, tmp_path, run):
    """And a preset keeps the words; R-ROME stays what it is, whatever that says of ROME."""
    out = tmp_path / "out"
    tried = ["--grid", "rome.keys=published,prompt", "--set", "steps=2", "--give-up", "1", "--quiet"]
    assert run("tune", *arguments(user, out, *tried, layer=1, limit=2)[1:])[0] == 0
    table = pl.read_parquet(out / "tuning.parquet")
    assert table["keys"].to_list() == ["published", "prompt"]
    assert table["setting"].to_list() == ["keys=published", "keys=prompt"]
    assert table["suspect"].dtype == pl.Int64
    kept = [run_json(out / folder)["methods"][0]["hparams"].get("keys") for folder in table["folder"]]
    assert kept == [None, "prompt"], "a tuning that was begun without words goes on"
    preset = out / "preset.toml"
    chosen = table.filter("chosen")["keys"].item()
    assert load_hparams(str(preset), "rome", "error_injection") == cc.RomeHparams(steps=2, keys=chosen)
    assert load_hparams(str(preset), "r-rome", "error_injection") == cc.RomeHparams(steps=2, keys="mean")
    preset.write_text(preset.read_text().replace(f'keys = "{chosen}"', 'keys = "all"'))
    with pytest.raises(ExperimentError, match="'published', 'mean' or 'prompt'"):
        load_hparams(str(preset), "rome", "error_injection")


def test_edit_and_sweeps_take_the_preset(user, preset, tmp_path, run):
    out, edited = tmp_path / "out", tmp_path / "edited"
    assert run(*tuning(user, out, "--quiet", preset=preset, limit=2))[:2] == (0, "")
    own = str(out / "preset.toml")
    assert run(*arguments(user, edited, "--quiet", method="finetune:1", preset=own, layers=None))[0] == 0
    kept = run_json(edited)
    (chosen,) = json.loads((out / "tuning.json").read_text())["chosen"]
    assert (kept["layers"], kept["aggregate"]) == ([0, 2], "mean")
    assert kept["methods"][0]["hparams"] == chosen["hparams"]
    assert chosen["hparams"]["stop_loss"] is None
    (tmp_path / "sweep.toml").write_text(
        f'model = "m"\nfacts = "f"\n[edit]\nmethods = ["finetune:1"]\npreset = "{own}"\nlayers = "preset"\n'
    )
    plan = stages_of(load_sweep(str(tmp_path / "sweep.toml")))["edit"].plans["error_injection"]
    assert dataclasses.asdict(plan.settings[0].hparams) == chosen["hparams"]


def test_the_scores_are_those_of_edit(user, tmp_path, run):
    """With moments that are collected on the way, and noise of all facts of the file."""
    out, edited = tmp_path / "out", tmp_path / "edited"
    shared = {"problem": "fact_forcing", "limit": 2}
    flags = ["--quiet", "--texts", user / "texts.txt"]
    asked = tuning(user, out, *flags, method="memit:2", grid="memit.covariance_weight=50", moments=None, **shared)
    assert run(*asked)[0] == 0
    same = ["--quiet", "--set", "steps=2", "--set", "covariance_weight=50"]
    moments = out / "moments.safetensors"
    assert run(*arguments(user, edited, *same, method="memit:2", layers="1", moments=moments, **shared))[0] == 0
    place = out / "grid/fact_forcing/memit-2/0"
    for found, expected in zip(read(place), read(edited), strict=True):
        assert_table_close(found, expected, 1e-4)
    assert run_json(place)["sigma"] == run_json(edited)["sigma"]
    assert not (out / "moments.safetensors.partial").exists()


def test_what_rules_could_not_be_kept_is_said(user, tmp_path, run):
    out = tmp_path / "out"
    code, _, error = run(*tuning(user, out, "--quiet", "--most", "0", limit=1))
    assert code == 0
    assert "finetune:1 for error_injection: every setting has a rewrite score above 0; the lowest is taken" in error
    assert "every setting has a rewrite score above 0" in (out / "preset.toml").read_text()
    (chosen,) = json.loads((out / "tuning.json").read_text())["chosen"]
    assert "the lowest is taken" in chosen["note"]


def test_nothing_is_chosen_where_all_edits_fail(user, tmp_path, run):
    out = tmp_path / "out"
    flags = ["--quiet", "--set", "lr=1e38", "--set", "clamp=1e38"]
    code, _, error = run(*tuning(user, out, *flags, method="rome", grid="weight_decay=0,1", limit=1))
    assert code == 2
    assert "rome for error_injection: no setting has a rewrite score" in error
    assert "2 edits failed: " in error
    assert not (out / "preset.toml").exists()


# --- interruptions ---


def test_an_interrupted_tuning_goes_on_where_it_was(user, tmp_path, monkeypatch, run):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*tuning(user, whole, "--quiet", grid="norm_constraint=1e-2,1e-3,1e-4"))[0] == 0
    asked = tuning(user, out, grid="norm_constraint=1e-2,1e-3,1e-4")
    evaluate, calls = cc.Editor.evaluate, []

    def counted(self, edits, **options):
        calls.append(edits[0].delta.norm)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(self, edits, **options)

    monkeypatch.setattr(cc.Editor, "evaluate", counted)
    code, printed, _ = run(*asked)
    assert (code, "the same command goes on" in printed) == (130, True)
    points = out / "grid/error_injection/finetune-1"
    assert json.loads((out / "tuning.json").read_text())["status"] == "stopped"
    assert [run_json(points / str(number))["status"] for number in (0, 1)] == ["complete", "stopped"]
    assert not (points / "2").exists()
    assert not (out / "preset.toml").exists()
    first = (points / "0" / "run.json").stat().st_mtime_ns

    code, printed, error = run(*asked)
    assert (code, error, len(calls)) == (0, "", 4)
    assert "setting 2 of 3: norm_constraint=0.001" in printed
    assert "setting 1 of 3" not in printed
    assert (points / "0" / "run.json").stat().st_mtime_ns == first
    table = pl.read_parquet(whole / "tuning.parquet")
    assert pl.read_parquet(out / "tuning.parquet").equals(table)
    assert tomllib.loads((out / "preset.toml").read_text()) == tomllib.loads((whole / "preset.toml").read_text())


def test_a_complete_tuning_is_chosen_from_again_without_the_model(user, tmp_path, monkeypatch, run):
    out = tmp_path / "out"
    assert run(*tuning(user, out, "--quiet", limit=2))[0] == 0
    rewrite = pl.read_parquet(out / "tuning.parquet").sort("rewrite")
    monkeypatch.setattr(cc.Tracer, "from_pretrained", lambda *_, **__: pytest.fail("the model was read"))
    most = (rewrite["rewrite"][0] + rewrite["rewrite"][1]) / 2
    code, printed, _ = run(*tuning(user, out, "--most", most, limit=2))
    assert (code, "chosen" in printed) == (0, True)
    (setting,) = pl.read_parquet(out / "tuning.parquet").filter("chosen")["setting"]
    assert setting == rewrite["setting"][0]


# --- what is refused ---


def test_another_configuration_is_refused_with_the_difference(user, tmp_path, run):
    out = tmp_path / "out"
    assert run(*tuning(user, out, "--quiet", limit=2))[0] == 0
    before = (out / "tuning.json").read_text()
    for changes, difference in (
        ({"layer": 2}, "layer: 1 before, 2 now"),
        ({"grid": "norm_constraint=1e-2,2e-3"}, "finetune:1.1.norm_constraint: 0.001 before, 0.002 now"),
        ({"seed": 4}, "seed: 0 before, 4 now"),
    ):
        code, _, error = run(*tuning(user, out, "--quiet", **{"limit": 2, **changes}))
        assert (code, difference in error, "--overwrite" in error) == (2, True, True)
        assert (out / "tuning.json").read_text() == before
    other = tuning(user, out, "--quiet", "--overwrite", limit=2, layer=2)
    assert run(*other)[0] == 0
    assert pl.read_parquet(out / "tuning.parquet")["layer"].to_list() == [2, 2]


def test_facts_that_changed_meanwhile_are_refused(user, tmp_path, run):
    out, facts = tmp_path / "out", tmp_path / "facts.jsonl"
    cc.save_facts(FULL[:2], facts)
    assert run(*tuning(user, out, "--quiet", facts=facts))[0] == 0
    (out / "grid/error_injection/finetune-1/1/run.json").unlink()
    cc.save_facts([FULL[0], dataclasses.replace(FULL[1], target_new="golf")], facts)
    code, _, error = run(*tuning(user, out, "--quiet", facts=facts))
    assert (code, "facts_fingerprint: " in error) == (2, True)


def test_another_model_at_the_same_place_is_refused(user, tmp_path, run):
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(user / "model", model)
    assert run(*tuning(user, out, "--quiet", limit=2, model=model))[0] == 0
    (out / "grid/error_injection/finetune-1/1/run.json").unlink()
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.transformer.wte.weight += 1
    changed.save_pretrained(model)
    code, _, error = run(*tuning(user, out, "--quiet", limit=2, model=model))
    assert (code, "model_fingerprint: " in error) == (2, True)


def test_a_second_process_is_refused(user, tmp_path, run):
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / "tuning.lock"):
        code, _, error = run(*tuning(user, out, "--quiet", limit=2))
    assert (code, "another process is at work in" in error) == (2, True)
    assert [each.name for each in out.iterdir()] == ["tuning.lock"]


@pytest.mark.parametrize("name", ["run.json", "preset.toml", "grid"])
def test_a_folder_of_another_origin_is_refused(name, user, tmp_path, run):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    code, _, error = run(*tuning(user, out, "--overwrite"))
    assert (code, str(out) in error) == (2, True)
    assert [each.name for each in out.iterdir()] == [name]


BAD_FOR_THE_MODEL = {
    "layer": ({"layer": 4}, "0 to 3"),
    "moments": ({"method": "rome", "grid": "kl_factor=1", "moments": "nowhere.safetensors"}, "nowhere.safetensors"),
    "no preset": ({"preset": "nowhere.toml"}, "nowhere.toml"),
    "unknown name": ({"grid": "clamp=1"}, "no chosen method has that hyperparameter"),
}


@pytest.mark.parametrize("case", BAD_FOR_THE_MODEL)
def test_what_is_refused_leaves_nothing_behind(case, user, tmp_path, run):
    changes, reason = BAD_FOR_THE_MODEL[case]
    code, _, error = run(*tuning(user, tmp_path / "out", **changes))
    assert (code, reason in error, "Traceback" in error) == (2, True, False)
    assert not (tmp_path / "out").exists()


def test_help_has_examples(run):
    code, printed, _ = run("tune", "--help")
    assert (code, "causalcone tune --model" in printed) == (0, True)
