"""Neither the model nor anything global is changed by editing it, however that ends."""

import copy
import random

import numpy as np
import pytest
import torch
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
from helpers.models import gpt2

import causalcone as cc


@pytest.fixture(scope="module")
def moments(model):
    return random_moments(model)


def state(model):
    """What editing might touch of a model."""
    return {
        "bits": bits(model),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {
            name: None if p.grad is None else p.grad.clone().numpy().tobytes() for name, p in model.named_parameters()
        },
        "versions": {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
    }


def global_state():
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "numpy errors": np.geterr(),
    }


@pytest.fixture
def used_model():
    """A model as its user may hold it: in part training, in part frozen, with gradients."""
    model = gpt2(3).train()
    model.transformer.h[1].eval()
    model.transformer.h[0].mlp.c_proj.weight.requires_grad_(False)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_nothing_is_changed(used_model, tokenizer, method, dtype):
    moments = random_moments(used_model)
    before = state(used_model), global_state()
    edits, _ = study(cc.Editor(used_model, tokenizer, moments, dtype=dtype), method)
    assert {edit.status for edit in edits} == {"done"}
    assert state(used_model) == before[0]
    assert global_state() == before[1]


def test_a_joint_edit_changes_nothing(used_model):
    ed = editor(used_model)
    before = state(used_model), global_state()
    ed.memit_joint(THREE, (0, 1), MEMIT)
    assert (state(used_model), global_state()) == before


@pytest.mark.parametrize("method", METHODS)
def test_what_fails_changes_nothing(used_model, monkeypatch, method):
    ed = editor(used_model)
    METHODS[method](ed, [INJECTION])
    before = state(used_model), global_state()

    def failing(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(torch.nn.functional, "layer_norm", failing)
    with pytest.raises(ZeroDivisionError):
        METHODS[method](ed, [INJECTION])
    monkeypatch.undo()
    assert (state(used_model), global_state()) == before


def test_abandoned_batches_change_nothing(used_model):
    ed = editor(used_model)
    before = state(used_model), global_state()
    for method in METHODS:
        rest = ed.run(THREE, method, (0, 1))
        next(rest)
        assert (state(used_model), global_state()) == before, "between two edits"
        rest.close()
        assert (state(used_model), global_state()) == before


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
    assert found.loss == expected.loss
    for layer in expected.delta.layers:
        assert weight(found.delta, layer).equal(weight(expected.delta, layer))
    assert ed.score([found]).equals(editor(model, moments).score([expected]))
