"""Scores of an edit as METHODS defines them: probabilities and perplexities before and after, one prompt at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from causalcone.engine.encoding import target_ids
from causalcone.engine.facts import Fact
from oracles.editing import Change, Prompt, Task, about_subject, changed, forcing, run
from oracles.model import precision


@dataclass(frozen=True)
class Reading:
    """A teacher-forced target: each token's log-probability, and whether it is the most likely token."""

    log_p: tuple[float, ...]
    likeliest: tuple[bool, ...]

    @property
    def p(self) -> float:
        """The product of the tokens' probabilities."""
        return math.exp(sum(self.log_p))

    @property
    def geometric_mean(self) -> float:
        """The tokens' mean probability, in the sense of products."""
        return math.exp(sum(self.log_p) / len(self.log_p))

    @property
    def accuracy(self) -> float:
        """The share of tokens that are the most likely ones."""
        return sum(self.likeliest) / len(self.likeliest)


@dataclass(frozen=True)
class Probe:
    """The problem's target, and the other one if the fact has it, on one prompt before and after an edit."""

    kind: str
    index: int
    pre: Reading
    post: Reading
    pre_other: Reading | None
    post_other: Reading | None


def probe(model: nn.Module, tokenizer: Any, task: Task, changes: Mapping[int, Change]) -> list[Probe]:
    """The rewrite prompt and all evaluation prompts of a fact, each with both targets."""
    other = other_target(tokenizer, task)
    probes = []
    with precision(model, lift=True):
        for kind, index, prompt in scored_prompts(model, tokenizer, task.fact):
            pre, pre_other = read_both(model, task, prompt, other)
            with changed(model, changes):
                post, post_other = read_both(model, task, prompt, other)
            probes.append(Probe(kind, index, pre, post, pre_other, post_other))
    return probes


def scored_prompts(model: nn.Module, tokenizer: Any, fact: Fact) -> list[tuple[str, int, Prompt]]:
    """Kind, number and prompt."""
    texts = {
        "paraphrase": fact.paraphrase_prompts,
        "neighborhood": fact.neighborhood_prompts,
        "attribute": fact.attribute_prompts,
    }
    rows = [("rewrite", 0, about_subject(model, tokenizer, fact, fact.prompt))]
    for kind, of_kind in texts.items():
        rows += [(kind, i, in_text(tokenizer, text, fact.subject)) for i, text in enumerate(of_kind)]
    return rows


def in_text(tokenizer: Any, text: str, subject: str, closed: bool = False) -> Prompt:
    """A text whose subject is where it first occurs; special tokens at the end stay only where it is ``closed``."""
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids = list(encoding["input_ids"])
    while not closed and encoding["special_tokens_mask"][len(ids) - 1]:
        ids.pop()
    if subject not in text:
        return Prompt(ids, None)
    first = text.index(subject)
    last = first + len(subject)
    inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < b and a < last and b > first]
    return Prompt(ids, (inside[0], inside[-1] + 1) if inside else None)


def read_both(
    model: nn.Module, task: Task, prompt: Prompt, other: Sequence[int] | None
) -> tuple[Reading, Reading | None]:
    """The problem's target and the other one, if there is one."""
    return read(model, task, prompt, task.target), None if other is None else read(model, task, prompt, other)


@torch.no_grad()
def read(model: nn.Module, task: Task, prompt: Prompt, target: Sequence[int]) -> Reading:
    """A target after a prompt, which in Fact Forcing is noised."""
    log_p = run(model, [*prompt.ids, *target[:-1]], forcing(model, task, prompt))[0, len(prompt.ids) - 1 :]
    each = [float(log_p[i, token]) for i, token in enumerate(target)]
    return Reading(tuple(each), tuple(int(log_p[i].argmax()) == token for i, token in enumerate(target)))


def other_target(tokenizer: Any, task: Task) -> tuple[int, ...] | None:
    """What the problem's target is compared with: the true answer where it is another, else the new one."""
    if task.problem in ("error_injection", "tracing_reversal"):
        return target_ids(task.fact.target_true, tokenizer)
    return None if task.fact.target_new is None else target_ids(task.fact.target_new, tokenizer)


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Any, task: Task, text: str) -> float:
    """exp(-sum of the N - 1 log-probabilities / N) of a text of N tokens, special ones counted."""
    prompt = in_text(tokenizer, text, task.fact.subject, closed=True)
    with precision(model, lift=True):
        log_p = run(model, prompt.ids, forcing(model, task, prompt))[0]
    total = sum(float(log_p[i, token]) for i, token in enumerate(prompt.ids[1:]))
    return math.exp(-total / len(prompt.ids))


def essence_perplexities(
    model: nn.Module, tokenizer: Any, task: Task, texts: Sequence[str], changes: Mapping[int, Change]
) -> tuple[float, float]:
    """The mean perplexity of the texts before and after an edit."""

    def mean() -> float:
        return sum(perplexity(model, tokenizer, task, text) for text in texts) / len(texts)

    pre = mean()
    with changed(model, changes):
        return pre, mean()


def target_score(problem: str, p_pre: float, p_post: float) -> float:
    """The rewrite and the paraphrase score: ``erased`` in Fact Erasure, ``recovered`` in all other problems."""
    return erased(p_pre, p_post) if problem == "fact_erasure" else recovered(p_pre, p_post)


def recovered(p_pre: float, p_post: float) -> float:
    """How much of what was missing to certainty has been won."""
    return max(0.0, 1 - (1 - p_post) / (1 - p_pre))


def erased(p_pre: float, p_post: float) -> float:
    """How much of the probability has been lost."""
    return max(0.0, (p_pre - p_post) / p_pre)


def neighborhood_score(p_pre: float, p_post: float) -> float:
    """One where nothing changed, zero where the probability changed as much as it could."""
    return 1 - abs(p_post - p_pre) / (0.5 + abs(p_pre - 0.5))


def essence_score(pre: float, post: float) -> float:
    """One where the mean perplexity has not risen, zero where it has risen by five or more."""
    return 1 - min(max(post - pre, 0.0), 5.0) / 5
