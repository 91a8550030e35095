"""The published settings of editing, value by value, and files of one's own."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from causalcone.engine.edit.methods.closed_forms.alphaedit import AlphaEditHparams
from causalcone.engine.edit.methods.closed_forms.emmet import EmmetHparams
from causalcone.engine.edit.methods.closed_forms.encore import EncoreHparams
from causalcone.engine.edit.methods.hparams import FinetuneHparams, MemitHparams, RomeHparams
from causalcone.engine.edit.methods.registry import methods
from causalcone.engine.edit.requests.requests import PROBLEMS
from causalcone.engine.errors import ExperimentError
from causalcone.runners.edits.presets import (
    edit_layers,
    load_hparams,
    load_preset,
    preset_names,
    preset_of,
    preset_text,
    tuned_preset,
)
from causalcone.runners.edits.settings import EditPlan

# What appendix C of Hase et al. 2023 says about GPT-J: kl_factor of ROME and MEMIT, norm constraint of FT-1 and FT-5.
GPTJ = {
    "error_injection": (1.0, 0.9, 1e-4, 2e-5),
    "tracing_reversal": (0.0625, 0.0625, 1e-5, 2e-5),
    "fact_erasure": (0.0625, 0.0625, 1e-5, 1e-5),
    "fact_amplification": (0.0625, 0.0625, 1e-5, 1e-5),
    "fact_forcing": (0.0625, 0.0625, 1e-4, 1e-4),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_gptj(problem: str) -> None:
    rome_kl, memit_kl, one, five = GPTJ[problem]
    forcing = problem == "fact_forcing"
    rome = RomeHparams(
        steps=25 if forcing else 20, lr=0.5, stop_loss=None, kl_factor=rome_kl, weight_decay=0.5, clamp=4
    )
    memit = MemitHparams(25, 0.5, None, memit_kl, weight_decay=0.5, clamp=0.75, covariance_weight=15_000)
    assert load_hparams("gptj", "rome", problem) == rome
    assert load_hparams("gptj", "memit", problem, window=5) == memit
    for window, norm in ((1, one), (5, five)):
        tuned = FinetuneHparams(50 if forcing else 25, 5e-4, stop_loss=1e-2, norm_constraint=norm, noise_samples=10)
        assert load_hparams("gptj", "finetune", problem, window) == tuned


@pytest.mark.parametrize(("problem", "one", "five"), [("error_injection", 1e-3, 1e-4), ("fact_forcing", 5e-4, 5e-5)])
def test_gpt2_xl(problem: str, one: float, five: float) -> None:
    forcing = problem == "fact_forcing"
    steps = 25 if forcing else 20
    memit = MemitHparams(steps, 0.5, None, 0.0625, weight_decay=0.5, clamp=0.75, covariance_weight=20_000)
    assert load_hparams("gpt2-xl", "rome", problem) == RomeHparams(steps, 0.5, None, 0.0625, 0.5, 4)
    assert load_hparams("gpt2-xl", "memit", problem) == memit
    for window, norm in ((1, one), (5, five)):
        tuned = FinetuneHparams(50 if forcing else 25, 5e-4, 1e-2, norm_constraint=norm, noise_samples=10)
        assert load_hparams("gpt2-xl", "finetune", problem, window) == tuned


@pytest.mark.parametrize("problem", PROBLEMS)
def test_meng(problem: str) -> None:
    assert load_hparams("meng", "rome", problem) == RomeHparams(20, 0.5, 0.05, 0.0625, 0.5, 4)
    assert load_hparams("meng", "memit", problem) == MemitHparams(20, 0.5, 0.05, 0.0625, 0.5, 0.75, 20_000)
    for window in (1, 5):
        assert load_hparams("meng", "finetune", problem, window) == FinetuneHparams(25, 5e-4, 1e-2, 5e-4, 10)


def test_layers_count_from_zero() -> None:
    assert edit_layers("gptj") == (0, 4, 8, 12, 16, 20, 23, 27)
    assert edit_layers("gpt2-xl") == (0, 4, 8, 12, 16, 17, 20, 24, 28, 32, 36, 40, 44, 47)
    assert edit_layers("meng") == (17,)


def test_what_else_a_preset_says() -> None:
    said = {name: load_preset(name) for name in ("gptj", "gpt2-xl", "meng")}
    assert [preset.sigma for preset in said.values()] == [0.094, 0.1, "3sd"]
    assert [preset.tracing_window for preset in said.values()] == [5, 10, 10]
    assert [preset.aggregate for preset in said.values()] == ["first", "first", "mean"]
    assert [preset.problem_names() for preset in said.values()] == [PROBLEMS, (PROBLEMS[0], PROBLEMS[4]), PROBLEMS]


def test_every_preset_of_the_package_is_sound() -> None:
    for name in preset_names():
        for problem in load_preset(name).problem_names():
            for method in methods():
                assert isinstance(load_hparams(name, method, problem), methods()[method].hparams)


ELSEWHERE = {
    "llama-2-7b": (
        MemitHparams(weight_decay=1e-3, clamp=4.0),
        AlphaEditHparams(lr=0.1),
        EncoreHparams(norm_weight=10.0, patience=3),
        EmmetHparams(covariance_weight=1e5),
    ),
    "llama-3-8b": (
        MemitHparams(lr=0.1),
        AlphaEditHparams(lr=0.1),
        EncoreHparams(norm_weight=20.0, patience=2),
        EmmetHparams(covariance_weight=1e5),
    ),
    "llama-3.1-8b": (
        MemitHparams(lr=0.1),
        AlphaEditHparams(lr=0.1),
        EncoreHparams(norm_weight=20.0, patience=2),
        EmmetHparams(covariance_weight=1e5),
    ),
    "llama-3.2-3b": (
        MemitHparams(weight_decay=1e-3, clamp=4.0),
        AlphaEditHparams(),
        EncoreHparams(),
        EmmetHparams(weight_decay=1e-3, clamp=4.0, covariance_weight=1e5),
    ),
    "qwen2.5-7b": (
        MemitHparams(weight_decay=1e-3, clamp=4.0),
        AlphaEditHparams(weight_decay=1e-3, clamp=4.0, ridge=1.0),
        EncoreHparams(),
        EmmetHparams(),
    ),
    "mistral-7b": (
        MemitHparams(weight_decay=1e-3, clamp=4.0),
        AlphaEditHparams(),
        EncoreHparams(),
        EmmetHparams(),
    ),
    "gpt2-xl": (
        MemitHparams(20, stop_loss=None, covariance_weight=2e4),
        AlphaEditHparams(20),
        EncoreHparams(20, covariance_weight=2e4, norm_weight=10.0, patience=4),
        EmmetHparams(20, covariance_weight=1e4),
    ),
    "gptj": (
        MemitHparams(stop_loss=None, kl_factor=0.9),
        AlphaEditHparams(),
        EncoreHparams(),
        EmmetHparams(covariance_weight=1e5),
    ),
}
"""What toolkits publish of MEMIT, AlphaEdit, ENCORE and EMMET; defaults are GPT-J's."""


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_toolkits_publish(name: str) -> None:
    found = [load_hparams(name, method, "error_injection") for method in ("memit-seq", "alphaedit", "encore", "emmet")]
    assert found == [*ELSEWHERE[name]]
    assert load_hparams(name, "memit-merge", "error_injection") == ELSEWHERE[name][0]
    rome = load_hparams(name, "r-rome", "error_injection")
    published = {"gpt2-xl": (20, 0.5), "gptj": (20, 0.5)}.get(name, (25, 1e-3))
    assert isinstance(rome, RomeHparams)
    assert (rome.steps, rome.weight_decay, rome.clamp, rome.keys) == (*published, 4.0, "mean")


def windows(preset: str, *methods: str) -> list[tuple[int, ...]]:
    """The layers that methods edit by a preset alone."""
    depth = 48 if preset == "gpt2-xl" else 32
    plan = EditPlan.of(methods, "error_injection", preset=preset, layers="preset")
    return [tuple(sorted(setting.edited(plan.layers, depth))) for setting in plan.settings]


def test_methods_edit_the_windows_that_are_published() -> None:
    several = ("rome", "r-rome", "memit", "memit_joint", "memit-seq", "alphaedit", "encore", "emmet", "finetune")
    llama = [(5,), (5,), *[(4, 5, 6, 7, 8)] * 5, (5,), (21,)]
    for name in ("llama-2-7b", "llama-3-8b", "llama-3.1-8b", "llama-3.2-3b", "mistral-7b"):
        assert windows(name, *several) == llama
    assert windows("qwen2.5-7b", *several) == [*llama[:-1], (27,)]
    own = ("r-rome", "p-rome", "memit-seq", "memit-merge", "alphaedit", "encore", "emmet")
    assert windows("gpt2-xl", *own) == [(17,), (17,), *[(13, 14, 15, 16, 17)] * 4, (17,)]
    assert windows("llama-3-8b", "ft-m", "locft") == [(21,), (22,)]
    assert windows("gptj", *own) == [(5,), (5,), *[(3, 4, 5, 6, 7, 8)] * 4, (5,)]
    assert EditPlan.of(["memit"], "error_injection", preset="gptj", layers="preset").layers == edit_layers("gptj")


def test_what_is_asked_for_wins_over_the_window() -> None:
    plan = EditPlan.of(["alphaedit:3"], "error_injection", preset="gptj", layers="preset")
    assert plan.settings[0].edited(plan.layers, 28) == {5, 6, 7}
    plan = EditPlan.of(["alphaedit"], "error_injection", preset="gptj", layers=(10,))
    assert plan.settings[0].edited(plan.layers, 28) == {8, 9, 10, 11, 12}
    plan = EditPlan.of(["alphaedit"], "error_injection", preset="gptj", layers="preset", window=2)
    assert plan.settings[0].edited(plan.layers, 28) == {5, 6}


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "llama-3.1-8b", "qwen2.5-7b", "mistral-7b", "gptj"])
def test_guessed_layers_are_those_of_most_presets(name: str) -> None:
    """Those of ROME and of windows."""
    depth = 32 if name.startswith(("llama", "mistral")) else 28
    plan = EditPlan.of(["r-rome", "alphaedit", "finetune"], "error_injection").guessed(depth)
    layers = [setting.layers for setting in plan.settings]
    assert layers[:2] == [(5,), (6,)]
    assert layers[2] == (21 if depth == 32 else 19,)
    known = EditPlan.of(["r-rome", "alphaedit"], "error_injection", preset=name, layers="preset")
    assert [known.layers_of(setting, depth) for setting in known.settings] == layers[:2]


def test_a_guess_is_a_layer_of_the_model() -> None:
    for depth in (1, 2, 3, 6):
        for setting in EditPlan.of(["rome", "memit", "finetune"], "error_injection").guessed(depth).settings:
            assert setting.edited("all", depth) <= {*range(depth)}


@pytest.mark.parametrize(
    ("model", "preset"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("models/Llama-3.1-8B/", "llama-3.1-8b"),
        ("meta-llama/Llama-3.2-3B", "llama-3.2-3b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("EleutherAI/gpt-j-6b", "gptj"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("demo", "demo"),
        ("Qwen/Qwen2.5-72B", None),
        ("meta-llama/Llama-2-70b-hf", None),
        ("gpt2", None),
    ],
)
def test_a_model_is_known_by_its_name(model: str, preset: str | None) -> None:
    assert preset_of(model) == preset


def test_a_preset_with_windows_can_be_tuned_on(tmp_path: Path) -> None:
    table = tuned_preset("llama-3-8b", 32, "3sd", "mean", [])
    published = load_preset("llama-3-8b")
    again = load_preset(write(tmp_path, preset_text(table, ["tuned"])))
    assert (again.edit_layers, again.windows) == (published.edit_layers, published.windows)
    assert tomllib.loads(preset_text(table, []))["tuned"]["windows"]["memit"] == [5, 6, 7, 8, 9]


def test_a_window_between_takes_the_nearest_settings() -> None:
    norms = {
        window: dataclasses.asdict(load_hparams("gptj", "finetune", "error_injection", window))["norm_constraint"]
        for window in (1, 2, 3, 4, 5, 10)
    }
    assert norms == {1: 1e-4, 2: 1e-4, 3: 1e-4, 4: 2e-5, 5: 2e-5, 10: 2e-5}


@pytest.mark.parametrize(
    ("method", "table"), [("rome", "rome"), ("memit", "memit"), ("memit_joint", "memit"), ("finetune", "finetune.1")]
)
def test_every_hyperparameter_can_be_set(tmp_path: Path, method: str, table: str) -> None:
    names = [field.name for field in dataclasses.fields(load_hparams("gptj", method, "fact_erasure"))]
    values = {name: "mean" if name == "keys" else 2 + number for number, name in enumerate(names)}
    lines = [f"{table}.{name} = {json.dumps(value)}" for name, value in values.items()]
    path = write(tmp_path, OWN.partition("rome.steps")[0] + "\n".join(lines))
    assert dataclasses.asdict(load_hparams(path, method, "fact_erasure")) == values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt5", "rome", "fact_forcing"), "no preset 'gpt5'; choose from gptj, gpt2-xl, meng"),
        (("gptj", "mend", "fact_forcing"), "unknown method 'mend'; choose from rome, memit, memit_joint, finetune"),
        (("gptj", "rome", "forcing"), "'gptj' has no problem 'forcing'; it has error_injection, tracing_reversal"),
        (("gpt2-xl", "rome", "fact_erasure"), "no problem 'fact_erasure'; it has error_injection, fact_forcing$"),
        (("gptj", "rome", "model_fields"), "has no problem 'model_fields'"),
        (("gptj", "finetune", "fact_forcing", 0), "window is 0; give at least one layer"),
        (("nowhere.toml", "rome", "fact_forcing"), "nowhere.toml does not exist"),
        (("nowhere.toml:a", "rome", "fact_forcing"), "nowhere.toml does not exist"),
    ],
)
def test_unknown_names(arguments: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        load_hparams(*arguments)


OWN = """
[small]
edit_layers = [1, 8]
sigma = "2.5sd"
tracing_window = 3
aggregate = "mean"
defaults.rome.lr = 1
defaults.finetune.stop_loss = "never"
[small.problems.fact_erasure]
rome.steps = 7
finetune.3.lr = 0.25
"""


def write(folder: Path, text: str) -> str:
    (folder / "own.toml").write_text(text, encoding="utf-8")
    return str(folder / "own.toml")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, OWN)
    preset = load_preset(path)
    assert (preset.edit_layers, preset.sigma, preset.tracing_window) == ((0, 7), "2.5sd", 3)
    assert load_hparams(path, "rome", "fact_erasure") == RomeHparams(steps=7, lr=1.0)
    assert load_hparams(path, "memit", "fact_erasure") == MemitHparams()
    assert load_hparams(path, "finetune", "fact_erasure", 1) == FinetuneHparams(lr=0.25, stop_loss=None)
    assert load_preset(f"{path}:small") == preset


def test_a_file_of_several_presets(tmp_path: Path) -> None:
    path = write(tmp_path, OWN + OWN.replace("small", "large").replace("8]", "9]"))
    assert edit_layers(f"{path}:large") == (0, 8)
    with pytest.raises(ExperimentError, match="holds not one preset, but small, large; name one as"):
        load_preset(path)
    with pytest.raises(ExperimentError, match="holds no preset 'tiny', but small, large"):
        load_preset(f"{path}:tiny")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "rome.steps",
            "rome.steeps",
            r"own.toml, preset 'small': problems.fact_erasure.rome cannot have 'steeps', only",
        ),
        ("rome.lr", "remo.lr", "defaults cannot have 'remo', only rome, memit, finetune"),
        ("fact_erasure", "erasure", "problems cannot have 'erasure', only error_injection, tracing_reversal"),
        ("aggregate", "'{x} and}'", "cannot have '{x} and}', only edit_layers, sigma"),
        ("finetune.3", "finetune.0", "problems.fact_erasure.finetune has '0', where a window is due"),
        ("finetune.3.lr = 0.25", "finetune = 2", "fact_erasure.finetune must be a table"),
        ("finetune.3.lr", "finetune.3.clamp", "finetune.3 cannot have 'clamp', only steps"),
        ("rome.steps = 7", "rome.steps = 0", "fact_erasure.rome.steps must be at least 1"),
        ("rome.steps = 7", "rome.steps = 7.5", "rome.steps must be a whole number"),
        ("rome.lr = 1", "rome.lr = true", "rome.lr must be a number"),
        ("rome.lr = 1", "rome.lr = -1", "rome.lr must be at least 0"),
        ("rome.lr = 1", "rome.lr = nan", "rome.lr must be a finite number"),
        ('stop_loss = "never"', 'stop_loss = "soon"', "finetune.stop_loss must be a number"),
        ("[1, 8]", "[0, 8]", r"edit_layers\.0 must be at least 1"),
        ("[1, 8]", "[]", "edit_layers is empty"),
        ("[1, 8]", "8", "edit_layers must be a list"),
        ('"2.5sd"', '"two sd"', 'sigma must be a number that is not negative, or a string like "3sd"'),
        ('"2.5sd"', "-1.0", "sigma must be a number that is not negative"),
        ('"mean"', '"median"', "aggregate must be 'first' or 'mean'"),
        ("tracing_window = 3", "", "tracing_window is missing"),
        ("aggregate", "windows.memit = [4, 6]\naggregate", "windows memit has layers that do not follow each other"),
        ("aggregate", "windows.mend = [4]\naggregate", "unknown method 'mend'; choose from rome"),
        ("aggregate", "windows.memit = []\naggregate", "windows.memit is empty"),
        ("[small]", "[small", "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in OWN
    path = write(
        tmp_path,
        OWN.replace(old, new).replace("[small.problems", "[other.problems" * ("other" in new) or "[small.problems"),
    )
    with pytest.raises(ExperimentError, match=message):
        load_preset(f"{path}:small")


def test_files_without_presets(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="preset 'sigma': must be a table"):
        load_preset(write(tmp_path, "sigma = 3"))
    with pytest.raises(ExperimentError, match="holds not one preset, but none"):
        load_preset(write(tmp_path, ""))
    (tmp_path / "own.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ExperimentError, match="is not UTF-8 text"):
        load_preset(str(tmp_path / "own.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ExperimentError, match="is a folder; give a file"):
        load_preset(str(tmp_path / "folder.toml"))
