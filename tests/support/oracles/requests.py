"""Which facts a problem is about, and what it trains towards, as METHODS defines it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from causalcone.engine.encoding import target_ids
from causalcone.engine.facts import Fact
from oracles.editing import Task, about_subject, noising, run, target_log_p
from oracles.model import Hook, precision

PROBLEMS = ("error_injection", "tracing_reversal", "fact_erasure", "fact_amplification", "fact_forcing")
REVERSAL_TOKENS = 12
COMPLETION_TOKENS = 36
ERASABLE = 0.02


def request(model: nn.Module, tokenizer: Any, fact: Fact, problem: str, sigma: float) -> Task:
    """The task of a fact in a problem."""
    if problem == "tracing_reversal":
        return Task(fact, problem, noised_continuation(model, tokenizer, fact, sigma), sigma)
    answer = fact.target_new if problem == "error_injection" else fact.target_true
    return Task(fact, problem, target_ids(answer, tokenizer), sigma)


def noised_continuation(model: nn.Module, tokenizer: Any, fact: Fact, sigma: float) -> tuple[int, ...]:
    """How the model goes on, greedily, after the prompt with noise on its subject, until there are 12 tokens in all."""
    prompt = about_subject(model, tokenizer, fact, fact.prompt)
    count = max(1, REVERSAL_TOKENS - len(prompt.ids))
    return tuple(greedy(model, prompt.ids, count, noising(model, prompt, sigma)))


@torch.no_grad()
def greedy(model: nn.Module, ids: Sequence[int], count: int, hooks: Sequence[Hook] = ()) -> list[int]:
    """So many most likely tokens, one after the other, whatever they are; each time everything is computed anew."""
    sequence = list(ids)
    with precision(model, lift=True):
        for _ in range(count):
            sequence.append(int(run(model, sequence, hooks)[0, -1].argmax()))
    return sequence[len(ids) :]


def completes(model: nn.Module, tokenizer: Any, fact: Fact) -> bool:
    """Whether the model says the true answer, in either case, among the 36 tokens with which it goes on."""
    prompt = about_subject(model, tokenizer, fact, fact.prompt)
    continuation = greedy(model, prompt.ids, COMPLETION_TOKENS)
    text = tokenizer.decode(continuation, clean_up_tokenization_spaces=False)
    return fact.target_true.strip().lower() in text.lower()


@torch.no_grad()
def suits(model: nn.Module, tokenizer: Any, fact: Fact, problem: str) -> bool:
    """Whether the problem is posed for a fact: the model completes it, and in Fact Erasure has something to lose."""
    if not completes(model, tokenizer, fact):
        return False
    prompt = about_subject(model, tokenizer, fact, fact.prompt)
    with precision(model, lift=True):
        log_p = target_log_p(model, prompt, target_ids(fact.target_true, tokenizer)).sum().item()
    return problem != "fact_erasure" or math.exp(log_p) >= ERASABLE
