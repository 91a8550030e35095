"""What goes wrong in editing: a single edit, which leaves the others alone, or what is asked."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.edited_models import low_rank
from helpers.editing_cases import (
    CONTEXTS,
    END,
    ERASURE,
    FINETUNE,
    FORCING,
    FULL,
    INJECTION,
    MEMIT,
    METHODS,
    ONE_TOKEN,
    ROME,
    START,
    editor,
    error,
    random_moments,
    request,
    weight,
)
from helpers.families import FAMILIES
from helpers.models import gpt2

import causalcone as cc
from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.methods.edits import edit_of
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.errors import ExperimentError, FactError, ModelError

BROKEN = request(replace(ONE_TOKEN, id="broken"), "fact_forcing", sigma=1e200)
"""Noise that no model survives."""

AT_ONE = Window(1, 1, (1,))


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_that_fails_leaves_the_others_alone(model, moments, method):
    """Its reason is said, and theirs are the edits that are made without it."""
    ed = editor(model, moments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = METHODS[method](ed, [INJECTION, BROKEN, ERASURE, FORCING], (0, 1))
    expected = METHODS[method](ed, [INJECTION, ERASURE, FORCING], (0, 1))
    broken = [edit for edit in found if edit.request is BROKEN]
    assert [(edit.status, edit.delta, edit.delta_norm, edit.steps) for edit in broken] == [
        ("failed", None, None, 0)
    ] * 2
    assert all("nan" in edit.reason for edit in broken)
    others = [edit for edit in found if edit.request is not BROKEN]
    for one, other in zip(others, expected, strict=True):
        assert (one.edit_id, one.steps, one.status) == (other.edit_id, other.steps, "done")
        assert one.loss == pytest.approx(other.loss, rel=1e-12)
        for layer in other.delta.layers:
            assert error(weight(one.delta, layer), weight(other.delta, layer), 1e-5) < 1e-9


def test_a_change_that_is_not_finite(model, moments, monkeypatch):
    """Only the edit that it is fails."""
    solve = cc.Moments.solve

    def solved(self, layer, keys, ridge=None):
        right = solve(self, layer, keys, ridge)
        return right * np.nan if layer == 2 else right

    monkeypatch.setattr(cc.Moments, "solve", solved)
    for method in ("rome", "memit"):
        make = METHODS[method]
        done, bad = make(editor(model, moments), [FORCING], (0, 2))
        assert (done.status, bad.status, bad.delta) == ("done", "failed", None)
        assert "not finite" in bad.reason
    monkeypatch.undo()
    for method in ("rome", "memit"):
        (expected,) = METHODS[method](editor(model, moments), [FORCING], (0,))
        assert expected.status == "done"


def test_an_edit_that_breaks_the_model(model, moments):
    """It counts as failed when it is scored, here by what float32 does not hold; the others have their scores."""
    ed = editor(model, moments, dtype="float32")
    (good,) = METHODS["rome"](ed, [FORCING])
    bad = edit_of(INJECTION, "rome", AT_ONE, steps=1, loss=0.5, delta=Delta({1: low_rank(model, 1, size=1e50)}))
    assert bad.status == "done"
    with np.errstate(all="ignore"):
        scores = ed.evaluate([bad, good], accuracy=True)
    first, second = scores.edits
    assert (first.status, first.delta) == ("failed", None)
    assert "not finite" in first.reason
    assert second.status == "done"
    rows = scores.probes.to_pylist()
    assert all(row["p_post"] is None and row["p_pre"] > 0 for row in rows if row["edit_id"] == bad.edit_id)
    alone = ed.score([good]).to_pylist()
    for row, own in zip((row for row in rows if row["edit_id"] == good.edit_id), alone, strict=True):
        assert row["p_post"] == pytest.approx(own["p_post"], rel=1e-4)


def test_a_model_that_gives_no_probabilities(model):
    """Under noise that it does not survive there is nothing to be compared with; other facts have their scores."""
    bad, good = (
        edit_of(each, "rome", AT_ONE, steps=1, loss=0.5, delta=Delta({1: low_rank(model)}))
        for each in (BROKEN, FORCING)
    )
    with np.errstate(all="ignore"):
        scores = editor(model).evaluate([bad, good], accuracy=True)
    first, second = scores.edits
    assert (first.status, first.delta, second.status) == ("failed", None, "done")
    assert "the unedited model gives probabilities that are not finite" in first.reason
    values = [row["p_pre"] for row in scores.probes.to_pylist() if row["edit_id"] == bad.edit_id]
    assert None in values
    assert all(value is None or 0 <= value <= 1 for value in values)
    assert set(scores.metrics["edit_id"].to_pylist()) == {good.edit_id}
    rows = [row for row in scores.probes.to_pylist() if row["edit_id"] == good.edit_id]
    for row, own in zip(rows, editor(model).score([good]).to_pylist(), strict=True):
        assert row["p_post"] == pytest.approx(own["p_post"], rel=1e-9)


def test_without_moments(model, tokenizer):
    ed = cc.Editor(model, tokenizer, contexts=CONTEXTS)
    for method in ("rome", "memit"):
        with pytest.raises(ExperimentError, match=r"second moments.*Moments.collect"):
            METHODS[method](ed, [INJECTION])
    with pytest.raises(ExperimentError, match="second moments"):
        ed.memit_joint([INJECTION], (1,))
    assert METHODS["finetune"](ed, [INJECTION])[0].status == "done"


def test_moments_of_another_model(model, collected):
    other = gpt2(seed=1)
    for method in ("rome", "memit"):
        with pytest.raises(ExperimentError, match="moments are of another model"):
            METHODS[method](editor(other, collected), [INJECTION])
        with pytest.raises(ExperimentError, match="moments are of another model"):
            METHODS[method](editor(FAMILIES["llama"](), collected), [INJECTION])
        with pytest.raises(ExperimentError, match=r"another model.*the keys of layer"):
            METHODS[method](editor(gpt2(4, 16, 2), random_moments(model)), [INJECTION])


def test_moments_that_lack_a_layer(model, moments):
    few = cc.Moments({1: moments.matrices[1], 2: moments.matrices[2]}, {1: 10**6, 2: 10**6})
    ed = editor(model, few)
    assert METHODS["rome"](ed, [INJECTION], (1, 2))[1].status == "done"
    assert ed.memit([INJECTION], ((1, 2),), hparams=MEMIT)[0].status == "done"
    with pytest.raises(ExperimentError, match="no moment of layer 0"):
        METHODS["rome"](ed, [INJECTION], (1, 0))
    with pytest.raises(ExperimentError, match="no moment of layer 3"):
        METHODS["memit"](ed, [INJECTION], (2,))
    with pytest.raises(ExperimentError, match="no moment of layer 3"):
        ed.memit_joint([INJECTION], (2, 3))


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ((4,), "no layer 4; the model has layers 0 to 3"),
        ((-1,), "no layer -1"),
        ((1, 1), "each only once"),
        ((), "at least one"),
        ("most", "'most'"),
        ((1.5,), "1.5 is not a whole number"),
        (("1",), "'1'"),
        ((None,), "None"),
    ],
    ids=["beyond", "negative", "twice", "none", "word", "fraction", "text", "nothing"],
)
def test_layers_that_are_none(model, moments, layers, match):
    for make in METHODS.values():
        with pytest.raises(ExperimentError, match=match):
            make(editor(model, moments), [INJECTION], layers)


@pytest.mark.parametrize(
    "layers",
    [((3, 1),), ((1, 1),), ((1, 4),), ((),), ((1, 2), (1, 2))],
    ids=["order", "twice", "beyond", "none", "same"],
)
def test_windows_that_are_none(model, moments, layers):
    for method in ("memit", "finetune"):
        with pytest.raises(ExperimentError, match=r"layer|window"):
            METHODS[method](editor(model, moments), [INJECTION], layers)
    if len(layers) == 1:
        with pytest.raises(ExperimentError, match=r"layer|window"):
            editor(model, moments).memit_joint([INJECTION], layers[0])


@pytest.mark.parametrize("window", [0, -2])
def test_windows_of_no_layers(model, moments, window):
    for make in (editor(model, moments).memit, editor(model, moments).finetune):
        with pytest.raises(ExperimentError, match=f"window is {window}"):
            make([INJECTION], (1,), window)


def test_unknown_methods_problems_and_hyperparameters(model, tokenizer, moments):
    ed = editor(model, moments)
    for ask in (ed.batches, ed.run):
        with pytest.raises(ExperimentError, match="'mend'; choose from rome, memit, memit_joint, finetune"):
            list(ask([INJECTION], "mend", (1,)))
    with pytest.raises(ExperimentError, match="rome edits one layer, not a window of 3"):
        ed.batches([INJECTION], "rome", (1,), 3)
    with pytest.raises(ExperimentError, match="problem is 'fact_injection'"):
        ed.requests(FULL, "fact_injection")
    with pytest.raises(ExperimentError, match="problem is "):
        Request(START, "fact_injection", (5,))
    for make, wrong, named in (
        (ed.rome, MEMIT, "MemitHparams; give RomeHparams"),
        (ed.memit, FINETUNE, "FinetuneHparams; give MemitHparams"),
        (ed.finetune, ROME, "RomeHparams; give FinetuneHparams"),
    ):
        with pytest.raises(ExperimentError, match=named):
            make([INJECTION], (1,), hparams=wrong)
    for wrong in ({"steps": 0}, {"lr": -1.0}, {"stop_loss": float("nan")}):
        for kind in (cc.RomeHparams, cc.MemitHparams, cc.FinetuneHparams):
            with pytest.raises(ExperimentError, match=next(iter(wrong))):
                kind(**wrong)


def test_hyperparameters_of_a_joint_edit(model, moments):
    with pytest.raises(ExperimentError, match="RomeHparams; give MemitHparams"):
        editor(model, moments).memit_joint([INJECTION], (1,), ROME)


@pytest.mark.parametrize("contexts", [(), [""], ["They", " "], "They say", [3]], ids=str)
def test_contexts_that_are_none(model, tokenizer, contexts):
    with pytest.raises(ExperimentError, match="contexts are"):
        cc.Editor(model, tokenizer, contexts=contexts)


@pytest.mark.parametrize("sigma", [-0.1, "threesd", float("nan"), float("inf")])
def test_levels_of_noise_that_are_none(model, tokenizer, sigma):
    with pytest.raises(ExperimentError, match="sigma"):
        cc.Editor(model, tokenizer, sigma=sigma)


@pytest.mark.parametrize("method", METHODS)
def test_prompts_that_are_too_long(model, moments, method):
    """Which is seen before anything is computed."""
    long = request(replace(END, id="long", prompt="so " * 40 + "{}"))
    with pytest.raises(FactError, match=r"'long': .* the model has 64"):
        METHODS[method](editor(model, moments), [INJECTION, long])


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_contexts_that_are_too_long(model, moments, method):
    with pytest.raises(FactError, match=r"'start': .* the model has 64"):
        METHODS[method](editor(model, moments, ["so " * 40]), [INJECTION])


def test_evaluation_prompts_that_are_too_long(model, moments):
    long = request(replace(END, id="long", paraphrase_prompts=("so " * 60,)))
    ed = editor(model, moments)
    (edit,) = METHODS["rome"](ed, [long])
    with pytest.raises(FactError, match=r"'long': .* the model has 64"):
        ed.score([edit])


def test_a_model_that_would_be_read_wrongly(model, moments, monkeypatch):
    """It is compared with its own forward before anything is edited or scored."""
    own = copy.deepcopy(model)
    ed = editor(own, moments)
    (edit,) = METHODS["finetune"](editor(model, moments), [INJECTION])
    forward = own.forward
    monkeypatch.setattr(own.lm_head, "forward", lambda x: 1.1 * torch.nn.functional.linear(x, own.lm_head.weight))
    for make in METHODS.values():
        with pytest.raises(ModelError):
            make(ed, [INJECTION])
    with pytest.raises(ModelError):
        ed.score([edit])
    assert own.forward == forward
