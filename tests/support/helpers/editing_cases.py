"""What tests of edits share: facts with all their prompts, random moments, and how alike two edits must be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from oracles import finetune as oracle_finetune, memit as oracle_memit, rome as oracle_rome, scores as oracle_scores
from oracles.editing import Task, down_weight
from oracles.finetune import FinetuneEdit
from oracles.memit import MemitEdit
from oracles.rome import RomeEdit

import causalcone as cc
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.requests import PROBLEMS, Request
from causalcone.engine.edit.scoring.evaluate import Scores
from causalcone.engine.encoding import target_ids
from helpers.models import FACTS, tokenizer

CONTEXTS = ("They say", "In the city of {gold}", "Bo")
"""Of unequal lengths; braces are none of a prompt's."""
SIGMA = 0.3
NEW = ("in Seattle golf", "in Seattle", "Latin", "French tennis", "golf", "tennis")
FULL = tuple(
    replace(
        fact,
        target_new=new,
        paraphrase_prompts=(f"So {fact.text}", "It is known that"),
        neighborhood_prompts=("Bo plays the sport of", "Rome is"),
        attribute_prompts=("They speak",),
    )
    for fact, new in zip(FACTS, NEW, strict=True)
)
"""Subjects at the start, in the middle, at the end of a prompt and all of it, of one token and of many; both targets of
one token and of several."""
START, MIDDLE, END, ONLY, ONE_TOKEN, MANY_TOKENS = FULL


@dataclass(frozen=True)
class Bounds:
    """How alike two edits must be: relative errors of weights (by norms) and of losses, of which those that are
    probabilities may differ by ``p`` however small they are. What is ``nothing`` times as large as a change that does
    something is zero."""

    weights: float
    loss: float
    p: float
    nothing: float


EXACT = Bounds(1e-9, 1e-9, 0.0, 1e-5)
# transformers takes norms, softmax and rotary angles in float32: rounding of 1e-7, magnified as in float32
UNMODIFIED = Bounds(1e-3, 5e-6, 5e-6, 1e-5)
# Adam's steps are as long for small gradients as for large ones, so that rounding turns those components round whose
# gradient is as small as rounding: of weights, one in a million or so
SINGLE = Bounds(5e-3, 5e-5, 1e-5, 1e-3)


def request(fact: cc.Fact, problem: str = "error_injection", sigma: float = SIGMA) -> Request:
    """What a problem asks of a fact, whatever the model makes of it; Tracing Reversal is towards the new target."""
    true, new = (target_ids(text, tokenizer()) for text in (fact.target_true, str(fact.target_new)))
    if problem in ("error_injection", "tracing_reversal"):
        return Request(fact, problem, new, true)
    return Request(fact, problem, true, new, sigma if problem == "fact_forcing" else None)


EVERY_PROBLEM = tuple(
    request(fact, problem) for fact, problem in zip((START, MIDDLE, MANY_TOKENS, ONLY, END), PROBLEMS, strict=True)
)
INJECTION, REVERSAL, ERASURE, AMPLIFICATION, FORCING = EVERY_PROBLEM
THREE = (INJECTION, ERASURE, FORCING)


def task(request: Request) -> Task:
    """The same for the plain editors."""
    return Task(request.fact, request.problem, request.target, request.sigma or 0.0)


def random_moments(model: Any, seed: int = 0) -> cc.Moments:
    """Of random keys, for every layer, as if of enough tokens."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for layer in range(model.config.num_hidden_layers):
        inner = down_weight(model, layer).shape[1]
        keys = torch.randn(3 * inner, inner, generator=generator, dtype=torch.float64)
        matrices[layer] = keys.T @ keys / len(keys)
    return cc.Moments(matrices, dict.fromkeys(matrices, 10**6))


def unit_moments(model: Any) -> cc.Moments:
    """Identities: what is solved with them stays as it is."""
    layers = range(model.config.num_hidden_layers)
    matrices = {layer: torch.eye(down_weight(model, layer).shape[1], dtype=torch.float64) for layer in layers}
    return cc.Moments(matrices, dict.fromkeys(matrices, 10**6))


def editor(
    model: Any, moments: cc.Moments | None = None, contexts: Sequence[str] = CONTEXTS, **options: Any
) -> cc.Editor:
    return cc.Editor(model, tokenizer(), moments or random_moments(model), contexts, **options)


ROME = cc.RomeHparams(steps=4, stop_loss=None)
MEMIT = cc.MemitHparams(steps=4, stop_loss=None, covariance_weight=5.0)
FINETUNE = cc.FinetuneHparams(steps=4, lr=5e-3, norm_constraint=1.2e-2, stop_loss=None, noise_samples=2)
METHODS = {
    "rome": lambda ed, requests, layers=(1,): ed.rome(requests, layers, ROME),
    "memit": lambda ed, requests, layers=(1,): ed.memit(requests, layers, 3, MEMIT),
    "finetune": lambda ed, requests, layers=(1,): ed.finetune(requests, layers, 3, FINETUNE),
}
"""By name: edits of a few steps by each method, in windows of three layers but for ROME."""


def study(ed: cc.Editor, method: str) -> tuple[list[Edit], Scores]:
    """Requests, edits and scores, with everything that there is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        requests = ed.requests(FULL[2:4], "fact_forcing", filtered=False)
    edits = METHODS[method](ed, requests)
    return edits, ed.evaluate(edits, essence=True, accuracy=True, generation=True)


@contextmanager
def unlifted() -> Iterator[None]:
    """While inside, the plain editors run models as transformers has them."""
    with ExitStack() as stack:
        for oracle in (oracle_rome, oracle_memit, oracle_finetune, oracle_scores):
            stack.enter_context(patch.object(oracle, "precision", lambda model, lift: nullcontext()))
        yield


def weight(delta: cc.Delta | None, layer: int) -> torch.Tensor:
    """What a delta adds to a layer's weight: (hidden, inner) in float64."""
    assert delta is not None
    return delta.changes[layer].rows(slice(None)).double().cpu()


def error(found: torch.Tensor, right: torch.Tensor, floor: float = 0.0) -> float:
    """The relative error of a tensor, by norms; ``floor`` is a norm below which nothing counts."""
    return float((found.double().cpu() - right.double().cpu()).norm()) / max(float(right.norm()), floor, 1e-300)


def assert_loss(edit: Edit, expected: float, bounds: Bounds) -> None:
    """The loss is that of the plain edit."""
    assert edit.loss == pytest.approx(expected, rel=bounds.loss, abs=bounds.p if edit.request.erases else 0.0)


def assert_rome(edit: Edit, expected: RomeEdit, bounds: Bounds = EXACT) -> None:
    """Key, value, change of the weight, loss and steps are those of the plain edit."""
    assert (edit.status, edit.steps, edit.reason) == ("done", expected.updates, None)
    assert_loss(edit, expected.loss, bounds)
    assert edit.delta is not None
    assert edit.delta.layers == (edit.layer,)
    change = edit.delta.changes[edit.layer]
    left, right = (part[:, 0].double().cpu() for part in (change.left, change.right))
    left, right = left * right.norm(), right / right.norm()
    u, key, given = (part.double().cpu() for part in (expected.u, expected.solved, expected.given))
    value = bounds.nothing * float(expected.v.norm())
    reach = float(key @ u)
    assert error(right, u) < bounds.weights
    assert error(left * reach, expected.v_star.cpu() - given, value) < bounds.weights
    assert edit.key_alignment == pytest.approx(expected.alignment, rel=bounds.weights)
    assert error(left, expected.Lambda, value / abs(reach)) < bounds.weights
    assert error(weight(edit.delta, edit.layer), expected.weight, value / abs(reach)) < bounds.weights
    assert edit.delta_norm == pytest.approx(float(expected.weight.norm()), rel=bounds.weights, abs=value / abs(reach))


def assert_memit(
    delta: cc.Delta | None, expected: MemitEdit, moments: cc.Moments, weight_of: float, bounds: Bounds = EXACT
) -> None:
    """The change of every layer is that of the plain edit; ``weight_of`` is the covariance's."""
    assert delta is not None
    assert delta.layers == tuple(expected.changes)
    for layer, change in expected.changes.items():
        keys = expected.keys[layer].cpu()
        directions = torch.linalg.solve(weight_of * moments.matrix(layer) + keys @ keys.T, keys)
        floor = bounds.nothing * float(expected.optima[0].start.double().norm() * directions.norm())
        assert error(weight(delta, layer), change.weight, floor) < bounds.weights, layer


def assert_finetuned(edit: Edit, expected: FinetuneEdit, bounds: Bounds = EXACT) -> None:
    """The changes of weights and biases, loss and steps are those of the plain edit."""
    assert (edit.status, edit.steps, edit.reason) == ("done", expected.updates, None)
    assert_loss(edit, expected.loss, bounds)
    assert edit.delta is not None
    assert edit.delta.layers == tuple(expected.changes)
    for layer, change in expected.changes.items():
        found = edit.delta.changes[layer]
        assert (found.bias is None) == (change.bias is None)
        for part, right in ((found.weight, change.weight), (found.bias, change.bias)):
            if right is not None:  # the plain change is a difference of weights, which holds their rounding
                assert error(part, right, 1e-6 * right.numel() ** 0.5) < bounds.weights, layer
