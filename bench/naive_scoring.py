"""Scoring of edits the way published code works, to be timed against: each edited model by passes of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from oracles.editing import Change, changed

from causalcone.engine.encoding import target_ids

SCORING = (
    "for every edit, before and after its change is written into the weights, one forward of all prompts with both "
    "targets, padded to one length, with all logits"
)


@dataclass(frozen=True)
class Probe:
    """Probabilities of the target that was edited towards, and of the other one, after a prompt, before the edit and
    after it."""

    prompt_kind: str
    prompt_index: int
    p_pre: float
    p_post: float
    p_pre_other: float
    p_post_other: float


def score(model: Any, tokenizer: Any, fact: Any, changes: Mapping[int, Change]) -> list[Probe]:
    """A probe of each of the fact's prompts: its own, its paraphrases, its neighbours. ``changes`` are by layer."""
    prompts = [("rewrite", 0, fact.text)]
    prompts += [("paraphrase", index, text) for index, text in enumerate(fact.paraphrase_prompts)]
    prompts += [("neighborhood", index, text) for index, text in enumerate(fact.neighborhood_prompts)]
    texts, targets = [text for _, _, text in prompts], [fact.target_new, fact.target_true]
    before = probabilities(model, tokenizer, texts, targets).tolist()
    with changed(model, changes):
        after = probabilities(model, tokenizer, texts, targets).tolist()
    return [
        Probe(kind, index, pre, post, pre_other, post_other)
        for (kind, index, _), (pre, pre_other), (post, post_other) in zip(prompts, before, after, strict=True)
    ]


@torch.no_grad()
def probabilities(model: Any, tokenizer: Any, texts: Sequence[str], targets: Sequence[str]) -> Tensor:
    """Probability (texts, targets) in float64 of each target after each text, all of them in one batch."""
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    answers = [list(target_ids(target, tokenizer)) for target in targets]
    pairs = [(prompt, answer) for prompt in prompts for answer in answers]
    logits = model(**padded(model, [prompt + answer[:-1] for prompt, answer in pairs]), use_cache=False).logits
    log_p = []
    for row, (prompt, answer) in zip(logits, pairs, strict=True):
        predicting = row[len(prompt) - 1 :][: len(answer)].double().log_softmax(dim=-1)
        log_p.append(predicting[range(len(answer)), answer].sum())
    return torch.stack(log_p).exp().view(len(texts), len(targets))


def padded(model: Any, sequences: Sequence[list[int]]) -> dict[str, Tensor]:
    """The model's inputs: sequences filled up on the right, where no token of their own sees it, and their mask."""
    longest = max(map(len, sequences))
    fill = [[0] * (longest - len(sequence)) for sequence in sequences]
    ids = [sequence + rest for sequence, rest in zip(sequences, fill, strict=True)]
    mask = [[1] * len(sequence) + rest for sequence, rest in zip(sequences, fill, strict=True)]
    return {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }
