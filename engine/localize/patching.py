"""Interventions of one's own as experiments on prompts of one's own, and the results read of their runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.facts import EncodedFact, Fact, encode
from causalcone.engine.localize.causal_tracing import target_tokens
from causalcone.engine.localize.options import choose_tokens
from causalcone.engine.localize.prompt_runs import (
    Intervention,
    Positions,
    Prompt,
    PromptResult,
    Read,
    RunValues,
    whole_numbers,
)
from causalcone.engine.localize.states import State
from causalcone.engine.models.base import Sizes
from causalcone.engine.noise import Noise
from causalcone.engine.plan.cone import Shape
from causalcone.engine.plan.interventions import SITES, ZERO, Base, Captures, Experiment, Overwrites, given
from causalcone.engine.run.runner import Result, Trial

NO_SUBJECT = (0, 0)
"""The span of a prompt that is about no subject."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids: a fact or a text, and the token ids of its other texts."""

    own: EncodedFact
    others: tuple[tuple[int, ...], ...]

    def text(self, number: int) -> tuple[int, ...]:
        """The token ids of its own text (0), or of the others (from 1)."""
        return self.own.prompt if number == 0 else self.others[number - 1]


@dataclass(frozen=True)
class Patching:
    """Runs of ``interventions`` that start from the ``base`` run, and what is read of them."""

    runs: list[list[Intervention]]
    reads: tuple[Read, ...]
    base: str
    noise: Noise
    sizes: Sizes
    prompts: int

    def __post_init__(self) -> None:
        if self.base == "other":
            object.__setattr__(self, "base", "other:0")
        if self.corrupts and self.noise.kind == "counterfactual":
            raise ExperimentError("a counterfactual prompt is another text; give base or source 'other', and no noise")

    def encode(self, prompt: Prompt | Fact | str, number: int, tokenizer: Any) -> EncodedPrompt:
        """The ``number``-th prompt as token ids."""
        takes_others = self.base.startswith("other") or any(each.from_other for run in self.runs for each in run)
        return encode_prompt(prompt, number, tokenizer, self.sizes, takes_others)

    def trial(self, prompt: EncodedPrompt, number: int) -> Trial:
        """The experiment on one prompt, the ``number``-th."""
        bases, names = self._bases(prompt)
        own = _Places(prompt, self._base_text(self.base))
        columns: list[tuple[int, ...]] = []
        vectors: list[Tensor] = []
        for run, interventions in enumerate(self.runs, start=len(bases)):
            for each in interventions:
                columns += self._overwrites(each, run, prompt, own, names, vectors, number)
        table = np.array(columns, dtype=np.int64).reshape(-1, 8).T
        branch_base = np.full(len(self.runs), names.index(self.base))
        captures, logits = self._captured(prompt, bases, branch_base)
        experiment = Experiment(bases, branch_base, Overwrites(*table), (False,) * len(vectors), captures, logits)
        target = prompt.own.target
        prompts = tuple(prompt.text(i) + target[:-1] for i in range(1 + len(prompt.others)))
        return Trial(prompt.own.fact.id, prompts, target, self._shape(prompt, prompts), experiment, tuple(vectors))

    def result(self, prompt: EncodedPrompt, case: Trial, result: Result) -> PromptResult:
        bases = case.experiment.bases
        runs = result.log_p.shape[1]
        values, at = [], {"logits": 0, "states": 0}
        for read in self.reads:
            tokens = len(_Places(prompt, 0).tokens(read.tokens))
            layers = 1 if read.layers is None else len(_as_layers(read.layers, self.sizes.depth))
            kind, source = ("logits", result.logits) if read.what == "logits" else ("states", result.states)
            count = runs * tokens * layers
            part = source[:, at[kind] : at[kind] + count]
            at[kind] += count
            shape = (runs, tokens) if read.what == "logits" else (runs, layers, tokens)
            values.append(part.unflatten(1, shape))
        every = RunValues(np.exp(result.log_p), tuple(values))
        noised = [number for number, base in enumerate(bases) if base.draw is not None]
        first_other = 1 + len(noised)
        return PromptResult(
            patched=every[len(bases) :],
            clean=every[:1],
            corrupted=every[1:2] if noised else None,
            others=every[first_other : len(bases)],
        )

    @property
    def corrupts(self) -> bool:
        """Whether there is a corrupted run."""
        sources = [each.source for run in self.runs for each in run]
        return self.base == "corrupted" or any(isinstance(source, str) and source == "corrupted" for source in sources)

    def _bases(self, prompt: EncodedPrompt) -> tuple[tuple[Base, ...], list[str]]:
        if self.corrupts and prompt.own.span == NO_SUBJECT:
            raise ExperimentError(f"{prompt.own.fact.id!r} is no fact: only facts have a subject that can be corrupted")
        others = range(len(prompt.others))
        corrupted = (Base(draw=0, replace=self.noise.replace),) if self.corrupts else ()
        bases = (Base(), *corrupted, *(Base(prompt=1 + other) for other in others))
        names = ["clean", *["corrupted"] * self.corrupts, *(f"other:{other}" for other in others)]
        if self.base not in names:
            raise ExperimentError(f"{prompt.own.fact.id!r}: there is no base {self.base!r}; it has {', '.join(names)}")
        return bases, names

    @staticmethod
    def _base_text(name: str) -> int:
        """Which text a base run reads."""
        return 1 + int(name.removeprefix("other:")) if name.startswith("other:") else 0

    def _overwrites(
        self,
        each: Intervention,
        run: int,
        prompt: EncodedPrompt,
        own: _Places,
        names: list[str],
        vectors: list[Tensor],
        number: int,
    ) -> list[tuple[int, ...]]:
        state = State(each.site)
        head = -1 if state.head is None else state.head
        if head >= self.sizes.heads:
            raise ExperimentError(f"there is no head {head}; the model has {self.sizes.heads} heads")
        tokens = own.tokens(each.tokens)
        taken = tokens
        if isinstance(each.source, Tensor):
            width = self.sizes.hidden if head < 0 else self.sizes.head_dim
            vectors.append(_vector(each.source, width, number, self.prompts))
            source = given(len(vectors) - 1)
        elif each.source == "zero":
            source = ZERO
        else:
            name = "other:0" if each.source == "other" else each.source
            if name not in names:
                known = ", ".join([*names, "zero"])
                raise ExperimentError(f"{prompt.own.fact.id!r}: there is no source {each.source!r}; there are: {known}")
            source = names.index(name)
            places = _Places(prompt, self._base_text(name))
            taken = places.tokens(_source_tokens(each, tokens))
        if len(taken) != len(tokens):
            raise ExperimentError(
                f"{prompt.own.fact.id!r}: {len(taken)} source tokens for {len(tokens)} tokens; give as many"
            )
        return [
            (SITES.index(state.site), layer, layer + 1, run, token, source, from_token, head)
            for layer in _as_layers(each.layers, self.sizes.depth)
            for token, from_token in zip(tokens, taken, strict=True)
        ]

    def _captured(
        self, prompt: EncodedPrompt, bases: tuple[Base, ...], branch_base: np.ndarray
    ) -> tuple[Captures, np.ndarray]:
        """What is read of every run, each at the tokens of the text that it runs on."""
        texts = [base.prompt for base in bases] + [bases[base].prompt for base in branch_base]
        captures, logits = [], []
        for read in self.reads:
            wanted = len(_Places(prompt, 0).tokens(read.tokens))
            for run, text in enumerate(texts):
                tokens = _Places(prompt, text).tokens(read.tokens)
                if len(tokens) != wanted:
                    raise ExperimentError(
                        f"{prompt.own.fact.id!r}: its texts have {wanted} and {len(tokens)} tokens to read; name "
                        "positions that all have"
                    )
                if read.layers is None:
                    logits += [(run, token) for token in tokens]
                    continue
                layers = _as_layers(read.layers, self.sizes.depth)
                captures += [(SITES.index(read.what), layer, run, token) for layer in layers for token in tokens]
        columns = np.array(captures, dtype=np.int64).reshape(-1, 4).T
        return Captures(*columns), np.array(logits, dtype=np.int64).reshape(-1, 2)

    def _shape(self, prompt: EncodedPrompt, prompts: Sequence[tuple[int, ...]]) -> Shape:
        first = prompts[0]
        targets = len(target_tokens(prompt.own))
        read = tuple(tuple(range(len(tokens) - targets, len(tokens))) for tokens in prompts)
        longest = max(map(len, prompts))
        alike = []
        for other in prompts[1:]:
            # where one of two texts ends before the other, it is read: what is one row must be read as one
            same = longest if len(other) == len(first) else min(len(first), len(other)) - targets
            alike.append(tuple(i < min(same, len(first)) and first[i] == other[i] for i in range(longest)))
        return Shape(longest, prompt.own.span if self.corrupts else (0, 0), read, tuple(alike))


@dataclass(frozen=True)
class _Places:
    """Token positions in one text of a prompt: its own (0), or another."""

    prompt: EncodedPrompt
    text: int

    def tokens(self, positions: Positions) -> tuple[int, ...]:
        """Positions from numbers, in their order, or from a name."""
        fact, length = self.prompt.own, len(self.prompt.text(self.text))
        if isinstance(positions, str):
            if positions not in ("all", "last") and (self.text or fact.span == NO_SUBJECT):
                raise ExperimentError(
                    f"{fact.fact.id!r}: tokens {positions!r} need a fact's own prompt; give positions, 'all' or 'last'"
                )
            return choose_tokens(positions, length, fact.span)
        numbers = whole_numbers(positions, "tokens")
        for token in numbers:
            if not -length <= token < length:
                raise ExperimentError(f"{fact.fact.id!r}: token {token} is outside its prompt of {length} tokens")
        return tuple(token % length for token in numbers)


def _as_layers(layers: int | Iterable[int], depth: int) -> tuple[int, ...]:
    numbers = whole_numbers(layers, "layers")
    for layer in numbers:
        if not 0 <= layer < depth:
            raise ExperimentError(f"there is no layer {layer}; the model has layers 0 to {depth - 1}")
    return numbers


def _source_tokens(each: Intervention, tokens: tuple[int, ...]) -> Positions:
    """Where the source's values are: a subject's tokens are found in the fact's own prompt only."""
    if each.source_tokens is not None:
        return each.source_tokens
    return tokens if isinstance(each.tokens, str) and each.tokens.startswith("subject") else each.tokens


def _vector(source: Tensor, width: int, number: int, prompts: int) -> Tensor:
    if source.shape not in ((width,), (prompts, width)):
        raise ExperimentError(f"the source vector is {tuple(source.shape)}; give ({width},) or ({prompts}, {width})")
    if not source.isfinite().all():
        raise ExperimentError("the source vector holds NaN or infinity")
    return (source[number] if source.dim() == 2 else source).detach()


def encode_prompt(
    prompt: Prompt | Fact | str, number: int, tokenizer: Any, sizes: Sizes, takes_others: bool
) -> EncodedPrompt:
    """Token ids of a prompt and its other texts; a fact's other text is that about its counterfactual subject, where
    anything takes values from it."""

    def tokens(fact: Fact, target: str) -> EncodedFact:
        return encode(fact, tokenizer, target, sizes.vocabulary, sizes.positions)

    if isinstance(prompt, Fact):
        own, subject = tokens(prompt, "label"), prompt.counterfactual_subject
        others: tuple[str, ...] = () if subject is None or not takes_others else (prompt.prompt.replace("{}", subject),)
    else:
        prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
        text = Fact(f"prompt {number}", "{}", prompt.text, "none" if prompt.target is None else prompt.target)
        own = replace(tokens(text, "argmax" if prompt.target is None else "label"), span=NO_SUBJECT)
        others = prompt.others
    texts = (Fact(f"{own.fact.id}, other {i}", "{}", other, own.fact.target_true) for i, other in enumerate(others))
    encoded = EncodedPrompt(own, tuple(tokens(text, "argmax").prompt for text in texts))
    longest = max(map(len, encoded.others), default=0) + max(0, len(own.target) - 1)
    if longest > sizes.positions:
        raise FactError(f"{own.fact.id!r}: another text and the target need {longest} of {sizes.positions} positions")
    return encoded
