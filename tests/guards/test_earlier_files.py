"""Files and folders of results that were written before are read, used and written alike by today's code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.guards import (
    ARTIFACTS,
    arrow_schemas,
    assert_same_tables,
    carried_out,
    differences,
    digest,
    digests,
    kept_run,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import causalcone as cc
from causalcone import analysis

MOMENT_LAYERS = (0, 2)
"""Of the collection that was interrupted."""

COMMANDS = {
    "trace": "trace --model model --facts facts.jsonl --state hidden:1 --state mlp:3 --samples 2 --sigma 0.4 "
    "--dtype float64 --limit 2 --quiet --out",
    "edit": "edit --model model --facts facts.jsonl --method rome --method finetune:1 --layers 0,2 --moments "
    "moments.safetensors --contexts contexts.json --no-filter --set steps=20 --dtype float64 --limit 2 --quiet --out",
}
"""What wrote the folders ``trace`` and ``edit``, without the folder's name."""

WITH_PRESET = (
    "edit --model model --facts facts.jsonl --method finetune:1 --preset preset.toml --layers 1 --no-filter "
    "--dtype float64 --limit 2 --quiet --out"
)


# --- what is measured; the same functions wrote what is expected ---


def loaded(folder: Path = ARTIFACTS) -> tuple[Any, Any]:
    """The model in float64 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(folder / "model")


def texts() -> list[str]:
    return (ARTIFACTS / "texts.txt").read_text(encoding="utf-8").splitlines()


def numbers_of_moments(moments: cc.Moments) -> dict[str, Any]:
    """Traces, sums and norms of the matrices, and what is known of them."""
    by_layer = {}
    for layer in moments.layers:
        matrix = moments.matrix(layer)
        solved = moments.solve(layer, torch.ones(moments.width(layer), 1, dtype=torch.float64), ridge=0.01)
        values = (matrix.trace(), matrix.sum(), matrix.norm(), solved.sum())
        by_layer[str(layer)] = [moments.tokens[layer], moments.width(layer), *(value.item() for value in values)]
    return {"layers": list(moments.layers), "source": moments.source, "by layer": by_layer}


def numbers_of_delta(file: Path) -> dict[str, Any]:
    """What a change of weights is, and what the changed model says of a prompt."""
    model, tokenizer = loaded()
    delta = cc.Delta.load(file)
    prompt = tokenizer(cc.load_facts(ARTIFACTS / "facts.jsonl")[0].text, return_tensors="pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), cc.applied(model, delta):
        logits = model(**prompt).logits[0, -1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shapes = {str(layer): list(change.shape) for layer, change in delta.changes.items()}
    kinds = [type(change).__name__ for change in delta.changes.values()]
    said = logits.log_softmax(0)[[0, 7, 101, 202]].tolist()
    return {"layers": list(delta.layers), "shapes": shapes, "kinds": kinds, "norm": delta.norm, "said": said}


# --- files of second moments, changes, contexts, presets ---


def test_moments_are_read_and_are_those_of_a_collection_now(expected):
    """The file holds the numbers that it held, is of this model, and collecting them again gives the same ones."""
    model, tokenizer = loaded()
    kept = cc.Moments.load(ARTIFACTS / "moments.safetensors")
    assert not differences(numbers_of_moments(kept), expected["moments"])
    kept.check(model, kept.layers)
    again = cc.Moments.collect(model, tokenizer, texts(), source=kept.source, dtype="float64")
    assert not differences(numbers_of_moments(again), expected["moments"])
    assert kept.identity is not None
    assert again.identity == replace(kept.identity, name=str(ARTIFACTS / "model"))


def test_a_half_done_collection_goes_on(user, expected):
    """It does not count again what is counted, and ends with the moments of a collection in one go."""
    model, tokenizer = loaded()
    options = {"layers": MOMENT_LAYERS, "tokens": "all", "source": "lines", "dtype": "float64"}
    seen: list[int] = []
    progress = lambda done, wanted: seen.append(done)  # noqa: E731
    resumed = cc.Moments.collect(
        model, tokenizer, texts() * 3, **options, resume=user / "half.safetensors.partial", progress=progress
    )
    fresh = cc.Moments.collect(model, tokenizer, texts() * 3, **options)
    assert len(seen) == 1, "a pass was repeated, or nothing was left to do"
    assert not differences(numbers_of_moments(resumed), numbers_of_moments(fresh))
    assert not differences(numbers_of_moments(resumed), expected["half-collected moments"])


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_deltas_are_read_and_applied(kind, expected, tmp_path):
    """A file gives the change that it held; the changed model says what it said; saving writes the same file."""
    file = ARTIFACTS / f"{kind}.safetensors"
    assert not differences(numbers_of_delta(file), expected[kind])
    cc.Delta.load(file).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    cc.Delta.load(file).save(tmp_path / "noted", {"fact": "start"})
    with safe_open(tmp_path / "noted", framework="pt") as noted:
        assert noted.metadata()["fact"] == "start"
    assert not differences(numbers_of_delta(tmp_path / "noted"), expected[kind])


def test_contexts_are_read_and_drawn_again_alike():
    """The file gives contexts, and the model and the seed still give these."""
    kept = cc.Contexts(**json.loads((ARTIFACTS / "contexts.json").read_text(encoding="utf-8")))
    model, tokenizer = loaded()
    assert cc.Editor(model, tokenizer, seed=3).contexts == kept


def test_a_tuned_preset_is_read_and_used(user, expected):
    """Its hyperparameters are those that were chosen, and edits made with it are those that were made."""
    from causalcone.runners.presets import load_hparams

    hparams = vars(load_hparams("preset.toml", "finetune", "error_injection", 1))
    assert not differences(hparams, expected["preset"]["hparams"])
    carried_out(*WITH_PRESET.split(), "edited")
    assert not differences(digests(user / "edited"), expected["preset"]["edits"])


# --- folders of results ---


@pytest.mark.parametrize("command", COMMANDS)
def test_folders_of_results_are_written_alike(command, user, expected):
    """The command writes the tables, to 1e-6, and the record that it wrote before."""
    assert not differences(digests(user / command), expected[command], 1e-12)
    carried_out(*COMMANDS[command].split(), "now")
    assert_same_tables(user / "now", user / command)
    assert not differences(arrow_schemas(user / "now"), arrow_schemas(user / command))
    assert not differences(kept_run(user / "now"), kept_run(user / command))
    files = [
        sorted(path.relative_to(user / each).as_posix() for path in (user / each).rglob("*"))
        for each in ("now", command)
    ]
    assert files[0] == files[1]


def test_folders_of_results_are_analysed(expected):
    """A folder of traces and one of edits, read by the functions of analysis, say what they said."""
    assert not differences(analysed_folders(ARTIFACTS), expected["analysed folders"])


def analysed_folders(folder: Path) -> dict[str, Any]:
    edits = folder / "edit"
    scores = analysis.scores(edits / "edits", edits / "probes", edits / "metrics")
    effects = analysis.average_indirect_effect(folder / "trace" / "traces")
    return {"effects": digest(effects), "scores": digest(scores), "means": digest(analysis.mean_scores(scores))}
