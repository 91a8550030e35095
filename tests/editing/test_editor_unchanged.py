"""Neither the model nor anything global is changed by editing it, however that ends."""

import pytest
import torch
from helpers.compare import assert_table_close
from helpers.edited_models import bits
from helpers.editing_cases import (
    FORCING,
    INJECTION,
    MEMIT,
    METHODS,
    THREE,
    editor,
    random_moments,
    study,
    weight,
)
from helpers.unchanged import state

import causalcone as cc


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_nothing_is_changed(used_model, tokenizer, method, dtype):
    moments = random_moments(used_model)
    before = state(used_model)
    edits, _ = study(cc.Editor(used_model, tokenizer, moments, dtype=dtype), method)
    assert {edit.status for edit in edits} == {"done"}
    assert state(used_model) == before


def test_a_joint_edit_changes_nothing(used_model):
    ed = editor(used_model)
    before = state(used_model)
    ed.memit_joint(THREE, (0, 1), MEMIT)
    assert state(used_model) == before


@pytest.mark.parametrize("method", METHODS)
def test_what_fails_changes_nothing(used_model, monkeypatch, method):
    ed = editor(used_model)
    METHODS[method](ed, [INJECTION])
    before = state(used_model)

    def failing(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(torch.nn.functional, "layer_norm", failing)
    with pytest.raises(ZeroDivisionError):
        METHODS[method](ed, [INJECTION])
    monkeypatch.undo()
    assert state(used_model) == before


def test_abandoned_batches_change_nothing(used_model):
    ed = editor(used_model)
    before = state(used_model)
    for method in METHODS:
        rest = ed.run(THREE, method, (0, 1))
        next(rest)
        assert state(used_model) == before, "between two edits"
        rest.close()
        assert state(used_model) == before


def test_requests_and_moments_are_left_as_given(model, moments):
    kept = {layer: matrix.clone() for layer, matrix in moments.matrices.items()}
    requests, layers = list(THREE), [0, 2]
    for make in METHODS.values():
        make(editor(model, moments), requests, layers)
    assert (requests, layers) == (list(THREE), [0, 2])
    assert all(matrix.equal(kept[layer]) for layer, matrix in moments.matrices.items())


def test_deltas_are_the_callers_own(model, moments):
    """Whatever is done to one changes neither another nor the model."""
    before, ed = bits(model), editor(model, moments)
    for make in METHODS.values():
        first, second = make(ed, [INJECTION, FORCING])
        kept = {layer: weight(second.delta, layer) for layer in second.delta.layers}
        for change in first.delta.changes.values():
            for part in vars(change).values():
                assert not part.requires_grad
                part.fill_(7.0)
        assert all(weight(second.delta, layer).equal(own) for layer, own in kept.items())
    assert bits(model) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_callers_mode(model, moments, method, mode):
    """And its results can be used outside of that mode."""
    (expected,) = METHODS[method](editor(model, moments), [INJECTION])
    with mode():
        ed = editor(model, moments)
        (found,) = METHODS[method](ed, [INJECTION])
        ed.score([found])
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    for layer in expected.delta.layers:
        torch.testing.assert_close(weight(found.delta, layer), weight(expected.delta, layer), rtol=1e-9, atol=1e-12)
    assert_table_close(ed.score([found]), editor(model, moments).score([expected]))
