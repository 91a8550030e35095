"""What a model answers, by transformers' own ``generate``, and SQuAD's exact match, as its published script has it."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from oracles.editing import Prompt, run
from oracles.model import precision

TOKENS = 32


@torch.no_grad()
def answer(model: nn.Module, tokenizer: Any, prompt: Prompt) -> str:
    """What the model goes on with, greedily, up to an end-of-text token, the end of the line or a full stop."""
    ids = torch.tensor([prompt.ids])
    with precision(model, lift=True):
        sequence = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    return cut(tokenizer.decode(sequence[0, len(prompt.ids) :], skip_special_tokens=True))


def cut(text: str) -> str:
    """A text up to the end of its first line, or its first full stop."""
    return re.match(r"[^\n.]*\.?", text)[0].strip()


def normalize_answer(text: str) -> str:
    """Lower text and remove punctuation, articles and extra whitespace."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(text: str, accepted: Sequence[str]) -> bool:
    return max(normalize_answer(text) == normalize_answer(answer) for answer in accepted)


@torch.no_grad()
def likeliest(model: nn.Module, prompt: Prompt, answer: Sequence[int]) -> tuple[float, list[int]]:
    """The log-probability of an answer's tokens, and the most likely tokens in their place."""
    with precision(model, lift=True):
        log_p = run(model, [*prompt.ids, *answer[:-1]])[0, len(prompt.ids) - 1 :]
    return float(log_p[range(len(answer)), list(answer)].sum()), log_p.argmax(-1).tolist()
