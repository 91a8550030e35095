"""Constrained fine-tuning gives the plain edits: for every architecture, problem and window of layers."""

from dataclasses import replace

import pytest
import torch
from helpers.editing_cases import (
    CONTEXTS,
    END,
    ERASURE,
    EVERY_PROBLEM,
    EXACT,
    FORCING,
    FULL,
    INJECTION,
    ONE_TOKEN,
    SINGLE,
    START,
    THREE,
    UNMODIFIED,
    assert_finetuned,
    editor,
    request,
    task,
    unlifted,
)
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import gpt2, tokenizer as byte_level
from oracles import finetune as oracle_finetune

import causalcone as cc
from causalcone.engine.edit.methods.hparams import FtmHparams
from causalcone.engine.edit.requests.requests import PROBLEMS, Request
from causalcone.engine.encoding import target_ids

FEW_STEPS = cc.FinetuneHparams(steps=4, lr=5e-3, norm_constraint=1.2e-2, stop_loss=None, noise_samples=3)

FEW_MEAN = FtmHparams(steps=4, lr=5e-3, stop_loss=None, noise_samples=3)


def assert_exact(model, requests, layers, window=1, hparams=FEW_STEPS, bounds=EXACT):
    """Every edit, against the plain one of the layers that it says; returns the edits."""
    edits = cc.Editor(model, byte_level()).finetune(requests, layers, window, hparams)
    for edit in edits:
        expected = oracle_finetune.finetune(model, byte_level(), task(edit.request), edit.delta.layers, hparams)
        assert_finetuned(edit, expected, bounds)
    return edits


def assert_mean(model, requests, layers, hparams=FEW_MEAN):
    """The same of FT-M."""
    edits = [
        edit for batch in cc.Editor(model, byte_level()).batches(requests, "ft-m", layers, 1, hparams) for edit in batch
    ]
    for edit in edits:
        assert edit.method == "ft-m"
        expected = oracle_finetune.finetune(
            model, byte_level(), task(edit.request), edit.delta.layers, hparams, mean=True
        )
        assert_finetuned(edit, expected)
    return edits


def likely(model, fact, problem="fact_erasure"):
    """A request for what the model says after a fact's prompt."""
    with torch.no_grad():
        logits = model(torch.tensor([byte_level()(fact.text)["input_ids"]])).logits
    return Request(fact, problem, (int(logits[0, -1].argmax()),))


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request):
    return FAMILIES[request.param](3, 32, 4, dtype=torch.float64)


def test_one_layer_of_every_architecture(family):
    edits = assert_exact(family, [INJECTION, likely(family, ONE_TOKEN), FORCING], (0, 2))
    assert [edit.delta.layers for edit in edits] == [(0,), (2,)] * 3
    assert all(edit.delta_norm > 1e-3 for edit in edits)


def test_three_layers_of_every_architecture(family):
    edits = assert_exact(family, [INJECTION, likely(family, ONE_TOKEN), FORCING], (1,), 3)
    assert [edit.delta.layers for edit in edits] == [(0, 1, 2)] * 3


def test_the_unmodified_float64_model(family):
    with unlifted():
        assert_exact(family, [INJECTION, FORCING], (1,), 3, bounds=replace(UNMODIFIED, weights=5e-2))


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_float32(name):
    """One weight of a layer that goes the other way is an error of a thirtieth."""
    model = FAMILIES[name](3, 32, 4, dtype=torch.float32)
    assert_exact(model, [INJECTION, likely(model, ONE_TOKEN), FORCING], (1,), 3, bounds=replace(SINGLE, weights=5e-2))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_problem_and_place_of_the_subject(model, problem):
    edits = assert_exact(model, [request(fact, problem) for fact in FULL], (1,), 3)
    assert [edit.steps for edit in edits] == [4] * 6


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_windows(model, window):
    """They are clipped at both ends."""
    edits = assert_exact(model, [INJECTION], "all", window)
    expected = {
        1: [(0,), (1,), (2,), (3,)],
        2: [(0,), (0, 1), (1, 2), (2, 3)],
        3: [(0, 1), (0, 1, 2), (1, 2, 3), (2, 3)],
        5: [(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3), (1, 2, 3)],
    }
    assert [edit.delta.layers for edit in edits] == expected[window]


def test_lists_of_layers(model):
    """With gaps, and of unequal numbers, all in one batch."""
    edits = assert_exact(model, [INJECTION, FORCING], ((1, 3), (0, 2), (2,), (0, 1, 3), 3), 3)
    assert [edit.delta.layers for edit in edits] == 2 * [(1, 3), (0, 2), (2,), (0, 1, 3), (2, 3)]


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_depths(layers):
    assert_exact(gpt2(layers, 16, 2), THREE, sorted({0, layers - 1}), 5)


@pytest.mark.parametrize(
    "hparams",
    [
        replace(FEW_STEPS, steps=1),
        replace(FEW_STEPS, norm_constraint=0.0),
        replace(FEW_STEPS, norm_constraint=10.0, steps=10),
        replace(FEW_STEPS, noise_samples=1),
        cc.FinetuneHparams(),
    ],
    ids=["one step", "pinned", "free", "one sample", "published"],
)
def test_hyperparameters(model, hparams):
    assert_exact(model, THREE, (1,), 3, hparams)


def test_the_constraint_is_reached(model):
    """No weight is further from what it was, and many are as far."""
    for edit in assert_exact(model, [INJECTION, FORCING], (1,), 3):
        for change in edit.delta.changes.values():
            for part in (change.weight, change.bias):
                assert float(part.abs().max()) == 1.2e-2
                assert 0.1 < float((part.abs() == 1.2e-2).double().mean()) < 0.99


def test_some_stop_early(model):
    """No step follows a loss below the limit; the others go on as if those were not there."""
    hparams = replace(FEW_STEPS, steps=14, stop_loss=2.0, norm_constraint=10.0)
    requests = [INJECTION, ERASURE, FORCING, request(END), likely(model, START, "error_injection")]
    edits = assert_exact(model, requests, (1, 3), 3, hparams)
    assert len({edit.steps for edit in edits}) > 4
    assert {edit.steps for edit in edits if edit.request is ERASURE} == {0}
    assert all((edit.loss < 2) == (edit.steps < 14) for edit in edits)


def test_an_erased_fact_is_left_at_the_limit(model):
    """Where p is the loss, no step is taken below it."""
    hparams = replace(FEW_STEPS, lr=1e-3, steps=25, stop_loss=1e-2)
    edits = assert_exact(model, [likely(model, fact) for fact in FULL], (1,), 3, hparams)
    assert len({edit.steps for edit in edits}) > 2
    assert all(edit.loss < 1e-2 and edit.steps < 25 for edit in edits)


def test_the_published_patience_changes_nothing(model):
    """Five checks below the limit end it, and so do fewer: whatever follows them, no step is taken."""
    hparams = replace(FEW_STEPS, stop_loss=4.0, norm_constraint=10.0)
    found = [
        [(edit.steps, edit.loss) for edit in assert_exact(model, [INJECTION, FORCING], (2,), 3, each)]
        for each in (replace(hparams, steps=steps) for steps in (15, 18, 30))
    ]
    assert found[0] == found[1] == found[2]
    assert all(0 < steps < 14 for steps, _ in found[0])


def test_noise_samples_are_draws_of_one_stream(model):
    """Five samples begin with the first of one."""
    one, five = (assert_exact(model, [FORCING], (1,), 3, replace(FEW_STEPS, noise_samples=n)) for n in (1, 5))
    assert five[0].loss > 3 * one[0].loss, "the loss is their sum"


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_the_mean_over_tokens_without_a_constraint(name):
    model = FAMILIES[name](3, 32, 4, dtype=torch.float64)
    edits = assert_mean(model, EVERY_PROBLEM, (0, 2))
    assert max(float(edit.delta.changes[edit.layer].weight.abs().max()) for edit in edits) > 1.5e-2
    assert_mean(model, [INJECTION, likely(model, ONE_TOKEN)], (1,), replace(FEW_MEAN, norm_constraint=1.2e-2))
    (stopped,) = assert_mean(model, [INJECTION], (1,), replace(FEW_MEAN, steps=15, stop_loss=4.5))
    assert 0 < stopped.steps < 15


def test_without_a_constraint_the_sum_is_trained(model):
    assert_exact(model, THREE, (1,), 3, replace(FEW_STEPS, norm_constraint=None))


def test_a_target_of_many_tokens(model):
    long = target_ids("golf in Seattle and French tennis in Rome", byte_level())
    requests = [Request(START, "error_injection", long), Request(END, "fact_forcing", long, sigma=0.2)]
    first = [edit.loss for edit in assert_exact(model, requests, (1, 3), 3, replace(FEW_STEPS, steps=1))]
    assert min(first) > 20, "the loss is their sum"


def test_special_tokens(model):
    tokenizer = byte_level(bos=True)
    for edit in cc.Editor(model, tokenizer).finetune(THREE, (1,), 3, FEW_STEPS):
        expected = oracle_finetune.finetune(model, tokenizer, task(edit.request), (0, 1, 2), FEW_STEPS)
        assert_finetuned(edit, expected)


def test_neither_moments_nor_contexts_matter(model):
    plain, furnished = (
        each.finetune(EVERY_PROBLEM, (1,), 3, FEW_STEPS)
        for each in (cc.Editor(model, byte_level()), editor(model, contexts=CONTEXTS))
    )
    for one, other in zip(plain, furnished, strict=True):
        assert (one.loss, one.steps, one.delta_norm) == (other.loss, other.steps, other.delta_norm)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(
    ("dtype", "bounds"), [(torch.float64, EXACT), (torch.float32, replace(SINGLE, weights=5e-2))], ids=["f64", "f32"]
)
def test_on_a_gpu(name, dtype, bounds):
    assert_exact(FAMILIES[name](3, 32, 4, dtype=dtype).cuda(), [INJECTION, FORCING], (0, 1, (0, 2)), 3, bounds=bounds)
