"""One change that is trained on all requests is the plain one, however its minibatches are cut into passes."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers.counted_flops import counted
from helpers.editing_cases import (
    AMPLIFICATION,
    EVERY_PROBLEM,
    EXACT,
    FORCING,
    FULL,
    INJECTION,
    SINGLE,
    error,
    request,
    task,
    weight,
)
from helpers.families import FAMILIES
from helpers.models import gpt2, tokenizer as byte_level
from oracles import finetune as oracle

import causalcone as cc
from causalcone.engine.edit.methods.fine_tuning.training import TrainingPass
from causalcone.engine.edit.methods.hparams import LocftHparams
from causalcone.engine.edit.methods.registry import method_named
from causalcone.engine.edit.runs.flops import Asked, EditWork, Flops, Searched
from causalcone.engine.errors import ExperimentError, MemoryBudgetError

FEW = LocftHparams(epochs=3, minibatch=2, lr=5e-3, stop_loss=None, noise_samples=2)
INJECTIONS = [request(fact) for fact in FULL]


def locft(model, requests, layers=(1,), window=1, hparams=FEW, tokenizer=None, **options):
    editor = cc.Editor(model, tokenizer or byte_level(), **options)
    return [edit for batch in editor.batches(requests, "locft", layers, window, hparams) for edit in batch]


def assert_exact(model, requests, layers=(1,), window=1, hparams=FEW, bounds=EXACT):
    """The edits of every window, which share the plain change."""
    edits = locft(model, requests, layers, window, hparams)
    for place in range(0, len(edits), len(requests)):
        own = edits[place : place + len(requests)]
        delta = own[0].delta
        expected = oracle.finetune_joint(model, byte_level(), list(map(task, requests)), delta.layers, hparams)
        for edit, asked, loss in zip(own, requests, expected.losses, strict=True):
            assert (edit.request, edit.method, edit.status, edit.steps) == (asked, "locft", "done", expected.updates)
            assert edit.delta is delta
            assert edit.loss == pytest.approx(loss, rel=bounds.loss)
            assert edit.delta_norm == pytest.approx(delta.norm, rel=1e-12)
        for layer, change in expected.changes.items():
            assert error(weight(delta, layer), change.weight, 1e-6) < bounds.weights
            if change.bias is not None:
                assert error(delta.changes[layer].bias, change.bias, 1e-6) < bounds.weights
    return edits


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_every_problem_of_three_architectures(name):
    """Minibatches of two, two and one: the layers alone and two at once."""
    model = FAMILIES[name](3, 32, 4, dtype=torch.float64)
    alone = assert_exact(model, EVERY_PROBLEM, (0, 2))
    assert [edit.delta.layers for edit in alone] == [(0,)] * 5 + [(2,)] * 5
    assert {edit.steps for edit in alone} == {9}
    assert_exact(model, EVERY_PROBLEM, ((0, 2),))


def test_float32():
    assert_exact(FAMILIES["llama"](3, 32, 4, dtype=torch.float32), INJECTIONS, bounds=replace(SINGLE, weights=5e-2))


def test_minibatches_that_are_learnt_take_no_step_and_a_learnt_epoch_ends_it(model):
    hparams = replace(FEW, epochs=20, minibatch=1, lr=1e-2, stop_loss=2.0)
    (edit, *_) = assert_exact(model, INJECTIONS, hparams=hparams)
    assert edit.steps < 100, "it ended early"
    assert edit.steps % 6, "some requests were skipped in an epoch"


def test_one_minibatch_of_all(model):
    hparams = LocftHparams(epochs=4)
    first, last = (assert_exact(model, INJECTIONS, hparams=replace(hparams, epochs=n)) for n in (1, 4))
    assert [edits[0].steps for edits in (first, last)] == [1, 4]
    assert all(now.loss < before.loss for now, before in zip(last, first, strict=True))


def test_every_weight_stays_within_a_constraint(model):
    (edit, *_) = assert_exact(model, INJECTIONS, hparams=replace(FEW, norm_constraint=8e-3))
    assert float(edit.delta.changes[1].weight.abs().max()) == 8e-3


def test_the_order_is_that_of_the_seed(model):
    one, again, other = (locft(model, INJECTIONS, hparams=replace(FEW, seed=seed))[0].delta for seed in (1, 1, 2))
    assert weight(one, 1).equal(weight(again, 1))
    assert error(weight(other, 1), weight(one, 1)) > 1e-3


# --- memory ---


@pytest.fixture
def passes(monkeypatch):
    """How many requests went through each pass."""
    seen, original = [], TrainingPass.__init__

    def run(self, texts, lessons, *rest, **named):
        seen.append(len(lessons))
        original(self, texts, lessons, *rest, **named)

    monkeypatch.setattr(TrainingPass, "__init__", run)
    return seen


def test_scarce_memory_makes_more_passes_of_the_same_steps(model, passes):
    hparams = replace(FEW, minibatch=6)
    (ample, *_), together = locft(model, INJECTIONS, hparams=hparams), [*passes]
    passes.clear()
    (scarce, *_) = locft(model, INJECTIONS, hparams=hparams, memory="1.6MB")
    assert together == [6] * 3
    assert len(passes) == 6
    assert sum(passes) == 18
    assert error(weight(scarce.delta, 1), weight(ample.delta, 1)) < 1e-9


def test_states_that_do_not_fit_are_refused(model):
    with pytest.raises(
        MemoryBudgetError, match=r"one change of layer 1 for 300 facts, whose states .* give more memory"
    ):
        locft(model, INJECTIONS * 50, memory="1.6MB")


def test_what_enters_the_layer_is_computed_once(tokenizer):
    """However many epochs: FLOPs are those of the formula, which has the layers before it once."""
    model, requests = gpt2(6), [replace(each, target=each.target[:1]) for each in (INJECTION, AMPLIFICATION)]
    editor = cc.Editor(model, tokenizer)
    editor.score(editor.finetune(requests, 0, hparams=cc.FinetuneHparams(steps=1)))  # verifies the model
    hparams = replace(FEW, epochs=4)
    executed = counted(lambda: list(editor.batches(requests, "locft", (4,), hparams=hparams)))
    prompts = [len(editor.encoder.bare(each).text) for each in requests]
    trained = Asked.total((Asked.after(tokens, [1]), 1) for tokens in prompts)
    searched = Searched.total((Searched.of([(tokens, 0)], 1, 1), 1) for tokens in prompts)
    work = EditWork(flops=Flops(editor.session.sizes), windows=[(4,)], searched=searched, trained=trained, noisy=False)
    assert method_named("locft").flops(work, hparams) == executed


# --- sequences, and what cannot be trained ---


def test_batches_of_a_sequence_are_trained_on_the_changed_model(model):
    sequence = cc.Editor(model, byte_level()).sequence(INJECTIONS, "locft", [1], hparams=FEW, batch=3)
    first, second = sequence
    assert [edit.fact_id for edit in second.edits] == [each.fact.id for each in INJECTIONS[3:]]
    with cc.applied(model, first.delta):
        (expected, *_) = locft(model, INJECTIONS[3:])
    assert error(weight(second.delta, 1), weight(expected.delta, 1)) < 1e-8
    assert error(weight(sequence.delta, 1), weight(first.delta, 1) + weight(expected.delta, 1)) < 1e-8


def test_a_tokenizer_without_an_end_is_refused(model):
    endless = deepcopy(byte_level())
    endless.eos_token = None
    with pytest.raises(ExperimentError, match=r"no end-of-text token, which locft trains.*set its eos_token"):
        locft(model, [INJECTION], tokenizer=endless)


def test_a_loss_that_is_not_finite_fails_all(model):
    edits = locft(model, [INJECTION, FORCING], hparams=replace(FEW, lr=1e300))
    assert {edit.status for edit in edits} == {"failed"}
    assert all("the loss is not finite after" in edit.reason and edit.delta is None for edit in edits)
