"""Prompts of requests as token sequences: contexts, the prompt of the subject's essence, and noise on the subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.errors import FactError
from causalcone.engine.facts import Fact, encode, encode_text
from causalcone.engine.models.base import Sizes

ESSENCE = "{} is a"
NOISE_SEED = 1

SubjectNoise = tuple[np.ndarray | None, int]
"""Noise (n, hidden) on the subject's tokens, if there is any, and the first of them."""


@dataclass(frozen=True)
class Prompted:
    """A prompt about a request's subject: its text, without a target, and the last token of the subject."""

    text: Text
    lookup: int


@dataclass(frozen=True)
class Encoder:
    """Turns prompts into token ids as a model of ``sizes`` needs them."""

    tokenizer: Any
    sizes: Sizes

    def prompt(self, fact: Fact) -> tuple[int, ...]:
        return encode(fact, self.tokenizer, "argmax", self.sizes.vocabulary, self.sizes.positions).prompt

    def prompted(self, request: Request, template: str, sample: int = 0, samples: int = 1) -> Prompted:
        """A template with the request's subject, which carries sample number ``sample`` of its noise."""
        fact = replace(request.fact, prompt=template)
        encoded = encode(fact, self.tokenizer, "argmax", self.sizes.vocabulary, self.sizes.positions)
        text = Text(encoded.prompt, *self._noise(request, encoded.span, sample, samples))
        return Prompted(text, encoded.span[1] - 1)

    def written(self, request: Request, text: str) -> Text:
        """A text as written; the first occurrence of the subject, if there is one, carries the request's noise."""
        at = text.find(request.fact.subject)
        ids, span = encode_text(text, (at, at + len(request.fact.subject)) if at >= 0 else (0, 0), self.tokenizer)
        if not ids:
            raise FactError(f"fact {request.fact.id!r}: the prompt {text!r} has no tokens")
        if max(ids) >= self.sizes.vocabulary:
            raise FactError(
                f"fact {request.fact.id!r}: token id {max(ids)} of the prompt {text!r} is outside the model's "
                f"vocabulary of {self.sizes.vocabulary}; use the model's own tokenizer"
            )
        return Text(ids) if span is None else Text(ids, *self._noise(request, span))

    def followed(self, request: Request, text: Text, target: Sequence[int]) -> Text:
        """A text and all tokens of a target except the last."""
        if not target or not 0 <= min(target) <= max(target) < self.sizes.vocabulary:
            raise FactError(
                f"fact {request.fact.id!r}: the target's token ids {tuple(target)} are not of the model's vocabulary "
                f"of {self.sizes.vocabulary}; use the model's own tokenizer, and a target that has tokens"
            )
        whole = replace(text, tokens=text.tokens + tuple(target[:-1]))
        if len(whole) > self.sizes.positions:
            raise FactError(
                f"fact {request.fact.id!r}: prompt and target need {len(whole)} positions, the model has "
                f"{self.sizes.positions}; shorten the prompt or the contexts"
            )
        return whole

    def contexts(self, request: Request, texts: Sequence[str]) -> list[Prompted]:
        """The bare prompt, then the prompt after each of the texts."""
        prompt = request.fact.prompt
        plain = (text.replace("{", "").replace("}", "") for text in texts)
        return [self.prompted(request, template) for template in (prompt, *(f"{text}. {prompt}" for text in plain))]

    def _noise(self, request: Request, span: tuple[int, int], sample: int = 0, samples: int = 1) -> SubjectNoise:
        hidden = self.sizes.hidden
        return (None, 0) if request.sigma is None else subject_noise(request.sigma, span, hidden, sample, samples)


def subject_noise(level: float, span: tuple[int, int], hidden: int, sample: int = 0, samples: int = 1) -> SubjectNoise:
    """Sample number ``sample`` of the noise on a subject, and where it begins."""
    noise = np.random.RandomState(NOISE_SEED).randn(samples, span[1] - span[0], hidden)
    return level * noise[sample], span[0]
