"""Edits for tests: facts with all their prompts, random moments, and each edit beside what the plain editor makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from models import FACTS, tokenizer
from oracle_editing import Task, down_weight

import causalcone as cc
from causalcone.engine.editing.requests import Request
from causalcone.engine.facts import target_ids

CONTEXTS = ("They say", "In the city of {gold}", "Bo")
SIGMA = 0.3
NEW = ("golf", "in Seattle", "Latin", "French tennis", "golf", "tennis")
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
"""Subjects at the start, in the middle, at the end of a prompt and all of it; of one token and of many."""
START, MIDDLE, END, ONLY, ONE_TOKEN, MANY_TOKENS = FULL


def request(fact: cc.Fact, problem: str = "error_injection", sigma: float = SIGMA) -> Request:
    """What a problem asks of a fact, whatever the model makes of it; Tracing Reversal is towards the new target here."""
    true, new = (target_ids(text, tokenizer()) for text in (fact.target_true, str(fact.target_new)))
    if problem in ("error_injection", "tracing_reversal"):
        return Request(fact, problem, new, true)
    return Request(fact, problem, true, new, sigma if problem == "fact_forcing" else None)


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


def editor(model: Any, moments: cc.Moments | None = None, contexts: Sequence[str] = CONTEXTS, **options: Any) -> cc.Editor:
    return cc.Editor(model, tokenizer(), moments or random_moments(model), contexts, **options)


def weight(delta: cc.Delta, layer: int) -> torch.Tensor:
    """What a delta adds to a layer's weight: (hidden, inner) in float64."""
    return delta.changes[layer].rows(slice(None)).double().cpu()


def error(found: torch.Tensor, right: torch.Tensor, floor: float = 0.0) -> float:
    """The relative error of a tensor, by norms; ``floor`` is a norm below which all are alike."""
    return float((found.double().cpu() - right.double().cpu()).norm() / max(float(right.norm()), floor, 1e-300))
