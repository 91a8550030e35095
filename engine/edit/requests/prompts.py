"""Prompts of requests as token sequences: contexts, the prompt of the subject's essence, and noise on the subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.encoding import PromptEncoder, PromptTokens
from causalcone.engine.errors import FactError
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


@dataclass(frozen=True, eq=False, kw_only=True)
class EditTask:
    """A request as the token sequences that its vector is searched on: the prompt, bare and after each context, with
    the target's tokens except the last; then the prompt of its essence up to the lookup. members: the requests that
    share the vector, whose prompts, equally many of each, follow one another; keys are those of the first."""

    request: Request
    prompts: tuple[Prompted, ...]
    members: tuple[Request, ...]

    @classmethod
    def merged(cls, tasks: Sequence[EditTask]) -> EditTask:
        """One of several requests; the essence is the first one's."""
        prompts = [prompted for task in tasks for prompted in task.prompts[:-1]]
        members = tuple(member for task in tasks for member in task.members)
        return cls(request=tasks[0].request, prompts=(*prompts, tasks[0].prompts[-1]), members=members)

    @property
    def keyed(self) -> int:
        """How many prompts keys are taken of: the first."""
        return (len(self.prompts) - 1) // len(self.members)

    @property
    def targets(self) -> list[tuple[int, ...]]:
        """What is read after each prompt but the essence's: its request's target."""
        return [member.target for member in self.members for _ in range(self.keyed)]


@lru_cache(maxsize=16)
def _noise(sigma: float, samples: int, tokens: int, hidden: int) -> np.ndarray:
    """(samples, tokens, hidden) samples of noise of a level, which all texts share."""
    return sigma * np.random.RandomState(NOISE_SEED).randn(samples, tokens, hidden)


@dataclass(frozen=True)
class Encoder:
    """Turns prompts into token ids as a model of ``sizes`` needs them. Making is the check: whatever cannot be used
    raises ``FactError``."""

    prompts: PromptEncoder
    sizes: Sizes

    def task(self, request: Request, contexts: Sequence[str]) -> EditTask:
        """The request with contexts put before its prompt."""
        prompts = [
            Prompted(self.followed(request, prompted.text, request.target), prompted.lookup)
            for prompted in self.contexts(request, contexts)
        ]
        essence = self.essence(request)
        start = replace(essence.text, tokens=essence.text.tokens[: essence.lookup + 1])
        return EditTask(request=request, prompts=(*prompts, Prompted(start, essence.lookup)), members=(request,))

    def trained(self, request: Request, samples: int) -> list[Text]:
        """The bare prompt with the target: once, or once for each of ``samples`` of noise on the subject."""
        text = self.followed(request, self.bare(request).text, request.target)
        if request.sigma is None or text.noise is None:
            return [text]
        noise = _noise(request.sigma, samples, *text.noise.shape)
        return [replace(text, noise=sample) for sample in noise]

    def bare(self, request: Request) -> Prompted:
        """The request's prompt."""
        return self.prompted(request, request.fact.prompt)

    def essence(self, request: Request) -> Prompted:
        """The beginning of a text about what the request's subject is."""
        return self._plain.prompted(request, ESSENCE)

    def prompted(self, request: Request, template: str) -> Prompted:
        """A template with the request's subject, which carries its noise."""
        encoded = self.prompts.fact(replace(request.fact, prompt=template), "argmax")
        return Prompted(self._noised(request, encoded.prompt, encoded.span), encoded.span[1] - 1)

    def answer(self, request: Request, text: str, words: str) -> tuple[int, ...]:
        """The token ids of an answer after a prompt."""
        prompt = self._read(request, text)
        return self.prompts.answer(prompt, words, request.fact.joiner, f"fact {request.fact.id!r}").tokens

    def written(self, request: Request, text: str) -> Text:
        """A prompt as written; the subject's first occurrence, if there is one, carries the request's noise."""
        prompt = self._read(request, text)
        if not prompt.tokens:
            raise FactError(f"fact {request.fact.id!r}: the prompt {text!r} has no tokens")
        if max(prompt.tokens) >= self.sizes.vocabulary:
            raise FactError(
                f"fact {request.fact.id!r}: token id {max(prompt.tokens)} of the prompt {text!r} is outside the "
                f"model's vocabulary of {self.sizes.vocabulary}; use the model's own tokenizer"
            )
        return Text(prompt.tokens) if prompt.span is None else self._noised(request, prompt.tokens, prompt.span)

    def free(self, request: Request, text: str) -> Text:
        """The same of a text, which is in no chat, and keeps the spaces at its end."""
        return self._plain.written(replace(request, fact=replace(request.fact, joiner="none")), text)

    @property
    def _plain(self) -> Encoder:
        return replace(self, prompts=self.prompts.text)

    def _read(self, request: Request, text: str) -> PromptTokens:
        fact, at = request.fact, text.find(request.fact.subject)
        characters = (at, at + len(fact.subject)) if at >= 0 else (0, 0)
        return self.prompts.prompt(text, characters, fact.joiner, f"fact {fact.id!r}")

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

    def _noised(self, request: Request, tokens: tuple[int, ...], span: tuple[int, int]) -> Text:
        """Tokens with the request's noise, if it has any, on a span."""
        sigma = request.sigma
        return Text(tokens, *(() if sigma is None else subject_noise(sigma, span, self.sizes.hidden)))


def subject_noise(level: float, span: tuple[int, int], hidden: int) -> SubjectNoise:
    """The first sample of the noise on a subject, and where it begins."""
    return _noise(level, 1, span[1] - span[0], hidden)[0], span[0]
