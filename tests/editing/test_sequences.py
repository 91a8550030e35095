"""Edits in sequence: batch after batch on the change so far, kept in files, gone on with, and scored as they stand."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.closed_form_cases import CASES, REQUESTS, parts
from helpers.edited_models import bits
from helpers.editing_cases import (
    CONTEXTS,
    FINETUNE,
    FORCING,
    FULL,
    INJECTION,
    ONE_TOKEN,
    ROME,
    assert_finetuned,
    assert_rome,
    editor,
    error,
    random_moments,
    request,
    task,
    weight,
)
from helpers.models import gpt2, tokenizer as byte_level
from helpers.unchanged import state
from oracles import finetune as oracle_finetune, rome as oracle_rome

import causalcone as cc
from causalcone.engine.edit.deltas.delta import Delta, Dense, LowRank
from causalcone.engine.errors import ExperimentError

BROKEN = request(replace(ONE_TOKEN, id="broken"), "fact_forcing", sigma=1e200)
"""Noise that no model survives."""
METHODS = {name: (case.listed, case.hparams) for name, case in CASES.items()}
METHODS.update({"rome": ([1], ROME), "r-rome": ([1], ROME), "finetune": ([(0, 1)], FINETUNE)})
"""By name: layers and hyperparameters."""


def sequence(ed, method, requests=REQUESTS, size=2, **options):
    layers, hparams = METHODS[method]
    return ed.sequence(requests, method, layers, hparams=hparams, batch=size, **options)


def same(one, other):
    """Whether two deltas have the same bits."""
    pairs = zip(one.parts()[0].items(), other.parts()[0].items(), strict=True)
    return one.parts()[1] == other.parts()[1] and all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def dense(delta, layer):
    """Weights and bias that a delta adds to a layer, side by side."""
    change, bias = delta.changes[layer], getattr(delta.changes[layer], "bias", None)
    return torch.cat([change.rows(slice(None)), torch.zeros(change.shape[0], 1) if bias is None else bias[:, None]], 1)


@pytest.mark.parametrize("method", ["rome", "r-rome", "finetune"])
def test_methods_of_one_edit_go_one_by_one(model, method):
    """In a batch too, each on the model that the ones before left, where it is the plain edit."""
    moments, (layers, hparams), requests = random_moments(model), METHODS[method], REQUESTS[:3]
    ed = editor(model, moments)
    before = Delta({})
    for batch, asked in zip(sequence(ed, method, requests), parts(requests, 2), strict=True):
        assert [edit.request for edit in batch.edits] == list(asked)
        added = Delta({})
        for found, each in zip(batch.edits, asked, strict=True):
            with cc.applied(model, before + added):
                (edit,) = next(ed.batches([each], method, layers, hparams=hparams))
                assert_plain_edit(model, edit, moments, method)
            assert (found.method, found.steps, found.delta) == (method, edit.steps, None)
            assert found.loss == pytest.approx(edit.loss, rel=1e-9)
            assert found.delta_norm == pytest.approx(edit.delta_norm, rel=1e-9)
            added += edit.delta
        for layer in added.layers:
            assert error(dense(batch.delta, layer), dense(added, layer)) < 1e-9
        before += added


def assert_plain_edit(model, edit, moments, method):
    if method == "finetune":
        assert_finetuned(edit, oracle_finetune.finetune(model, byte_level(), task(edit.request), (0, 1), FINETUNE))
        return
    hparams = replace(ROME, keys="mean" if method == "r-rome" else "published")
    expected = oracle_rome.rome(model, byte_level(), task(edit.request), CONTEXTS, 1, moments.matrix(1), hparams)
    assert_rome(edit, expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_change_so_far_is_the_sum(model, method):
    made = sequence(editor(model), method)
    total = Delta({})
    assert (made.done, made.delta.layers) == (0, ())
    for number, batch in enumerate(made, 1):
        assert (batch.number, made.done) == (number - 1, number)
        total += batch.delta
        for layer in total.layers:
            assert error(dense(made.delta, layer), dense(total, layer)) < 1e-12
    assert (made.done, made.of_batch(3)) == (3, [])
    assert next(made, None) is None
    assert made.done == 3


def test_a_change_is_low_rank_until_a_dense_one_is_smaller():
    """Of rank six at most, where the weight is of eight rows and 32 columns."""
    model = gpt2(2, 8, 2)
    requests = [request(replace(fact, id=f"{fact.id} {n}")) for n in range(2) for fact in (*FULL[:3], FULL[4])]
    made = editor(model).sequence(requests, "memit-seq", [[0]], hparams=CASES["memit-seq"].hparams, batch=2)
    kinds, ranks, total = [], [], 0.0
    for batch in made:
        total = total + weight(batch.delta, 0)
        change = made.delta.changes[0]
        kinds.append(type(change))
        ranks.append(batch.delta.changes[0].left.shape[1])
        assert error(weight(made.delta, 0), total) < 1e-12
    assert (kinds, ranks) == ([LowRank] * 3 + [Dense], [2] * 4)


@pytest.mark.parametrize("method", METHODS)
def test_a_request_that_fails_stops_no_other(model, method):
    """The batch is that of the others, and the sequence goes on as without it."""
    found = list(sequence(editor(model), method, [INJECTION, BROKEN, FORCING, *REQUESTS[1:3]], 3))
    expected = sequence(editor(model), method, [INJECTION, FORCING, *REQUESTS[1:3]], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = found
    assert [edit.status for edit in first.edits] == ["done", "failed", "done"]
    assert "nan" in first.edits[1].reason
    for batch, right in zip((first, second), expected, strict=True):
        for layer in right.delta.layers:
            assert error(dense(batch.delta, layer), dense(right.delta, layer)) < 1e-8


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_nothing_but_failures(model, method):
    made = sequence(editor(model), method, [BROKEN, INJECTION], 1)
    first, second = made
    assert ([edit.status for edit in first.edits], first.delta.layers, dict(first.keys)) == (["failed"], (), {})
    (alone,) = sequence(editor(model), method, [INJECTION], 1)
    assert same(second.delta, alone.delta)


@pytest.mark.parametrize("method", ["memit-seq", "alphaedit", "finetune"])
def test_nothing_is_changed(used_model, method):
    made = sequence(editor(used_model), method, REQUESTS[:2], 1)
    before = state(used_model)
    for batch in made:
        assert batch.delta.norm > 0
        assert state(used_model) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_other_dtypes(model, dtype):
    """The change so far is in float32 or better, and moves the pass."""
    before = bits(model)
    made = sequence(editor(model, dtype=dtype), "memit-seq", REQUESTS[:3], 1)
    (first, *_) = batches = list(made)
    assert all(edit.status == "done" for batch in batches for edit in batch.edits)
    assert first.delta.changes[0].left.dtype == torch.float32
    assert bits(model) == before


# --- going on ---


@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_files(model, method, tmp_path):
    """With the bits of the batches that are made without a stop."""
    whole = sequence(editor(model), method)
    for batch in whole:
        batch.save(tmp_path / f"{batch.number}.safetensors")
    for done in (1, 2, 3):
        again = sequence(editor(model), method)
        for number in range(done):
            restored = again.restore(tmp_path / f"{number}.safetensors")
            assert (restored.number, again.done, list(restored.edits)) == (number, number + 1, [])
        for batch in again:
            batch.save(tmp_path / "again.safetensors")
            kept, new = ((tmp_path / f"{name}.safetensors").read_bytes() for name in (batch.number, "again"))
            assert new == kept
        assert same(again.delta, whole.delta)


def test_files_of_other_batches(model, tmp_path):
    """Of other facts, of other sizes, of another number; nothing of them is taken over."""
    made = sequence(editor(model), "memit-seq")
    first, second, third = (tmp_path / f"{n}.safetensors" for n in range(3))
    for batch, path in zip(made, (first, second, third), strict=True):
        batch.save(path)
    remedy = "go on with the same facts, method and batch size, or choose another folder"
    others = sequence(editor(model), "memit-seq", REQUESTS[1:])
    with pytest.raises(ExperimentError, match=rf"is batch 0, of 'start/.*; batch 0 of this sequence .*; {remedy}"):
        others.restore(first)
    with pytest.raises(ExperimentError, match=remedy):
        sequence(editor(model), "memit").restore(first)
    larger = sequence(editor(model), "memit-seq", size=3)
    with pytest.raises(ExperimentError, match=remedy):
        larger.restore(first)
    again = sequence(editor(model), "memit-seq")
    with pytest.raises(ExperimentError, match=r"is batch 1, .*; batch 0 of this sequence"):
        again.restore(second)
    with pytest.raises(ExperimentError, match=r"no batch of edits file .*nowhere"):
        again.restore(tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(first.read_bytes()[:-1] + b"!")
    with pytest.raises(ExperimentError, match=r"remove it and all later ones, and go on from there"):
        again.restore(damaged)
    Delta({1: LowRank(torch.ones(32, 1), torch.ones(128, 1))}).save(tmp_path / "delta")
    with pytest.raises(ExperimentError, match=r"holds no batch of edits"):
        again.restore(tmp_path / "delta")
    assert (again.done, again.delta.layers, again.history.bytes) == (0, (), 0)
    for path in (first, second, third):
        again.restore(path)
    assert same(again.delta, made.delta)
    with pytest.raises(ExperimentError, match=r"of this sequence is of none"):
        again.restore(third)


# --- what cannot be asked for ---


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_sizes_that_are_none(model, size):
    with pytest.raises(ExperimentError, match=r"the batch is .*; give a whole number of edits, at least one"):
        sequence(editor(model), "memit-seq", size=size)


@pytest.mark.parametrize(
    ("method", "requests", "layers", "match"),
    [
        ("memit-seq", REQUESTS, [(0, 1), (1, 2)], "5 requests in 2 windows of layers; give .* one window"),
        ("memit-seq", REQUESTS, "all", "5 requests in 4 windows"),
        ("memit-seq", [], [(0, 1)], "0 requests in 1 windows of layers; give at least one request"),
        ("rome", REQUESTS, [1, 2], "5 requests in 2 windows"),
        ("rome", REQUESTS, [(1, 2)], r"the layer \(1, 2\) is not a whole number"),
        ("emmet", REQUESTS, [(1, 2)], r"the layer \(1, 2\) is not a whole number"),
        ("memit-seq", INJECTION, [(0, 1)], "give a list, as Editor.requests makes it"),
        ("mend", REQUESTS, [1], "unknown method 'mend'"),
    ],
)
def test_sequences_that_are_none(model, method, requests, layers, match):
    with pytest.raises(ExperimentError, match=match):
        editor(model).sequence(requests, method, layers)


@pytest.mark.parametrize("method", ["rome", "p-rome", "finetune"])
def test_methods_without_keys_to_preserve(model, method):
    with pytest.raises(ExperimentError, match=rf"{method} cannot preserve the keys .* such as memit-seq"):
        editor(model).sequence(REQUESTS, method, [1], history=True)
    assert editor(model).sequence(REQUESTS, method, [1], history=False).history is None


def test_layers_without_moments(model):
    moments = random_moments(model)
    partly = cc.Moments({0: moments.matrices[0]}, {0: 10**6})
    with pytest.raises(ExperimentError, match="there is no moment of layer 1, only of 0"):
        sequence(editor(model, partly), "alphaedit")


# --- scores ---


@pytest.mark.parametrize("method", ["memit-seq", "emmet", "finetune"])
def test_edits_as_they_stand(model, method):
    """They score on the change so far as a model does that it is written into."""
    ed = editor(model)
    made = sequence(ed, method)
    assert [len(batch.edits) for batch in made] == [2, 2, 1]
    edits = made.standing(REQUESTS)
    found = ed.evaluate(edits).probes
    nothing = Delta({0: LowRank(torch.zeros(32, 1), torch.zeros(128, 1))})
    with cc.applied(model, made.delta):
        now = editor(model).evaluate([replace(edit, delta=nothing) for edit in edits]).probes
    assert found["edit_id"].to_pylist() == now["edit_id"].to_pylist()
    post, pre, written = (table[of].to_numpy() for table, of in ((found, "p_post"), (found, "p_pre"), (now, "p_pre")))
    np.testing.assert_allclose(post, written, rtol=1e-9, atol=1e-14)
    assert abs(post - pre).max() > 1e-4
