"""A user's interventions as experiments on the user's prompts, and the results read of their runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from causalcone.engine.encoding import EncodedFact, PromptEncoder
from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.facts import Fact
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
    """A prompt as token ids: a fact or a text (number 0), and the token ids of its other texts (from 1)."""

    fact: EncodedFact
    others: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """The prompt in messages."""
        return repr(self.fact.fact.id)

    def tokens(self, positions: Positions, text: int = 0) -> tuple[int, ...]:
        """Positions in one of its texts from numbers, in their order, or from a name."""
        length = len((self.fact.prompt, *self.others)[text])
        if isinstance(positions, str):
            if positions not in ("all", "last") and (text or self.fact.span == NO_SUBJECT):
                raise ExperimentError(
                    f"{self.name}: tokens {positions!r} need a fact's own prompt; give positions, 'all' or 'last'"
                )
            return choose_tokens(positions, length, self.fact.span)
        numbers = whole_numbers(positions, "tokens")
        for token in numbers:
            if not -length <= token < length:
                raise ExperimentError(f"{self.name}: token {token} is outside its prompt of {length} tokens")
        return tuple(token % length for token in numbers)


@dataclass(frozen=True)
class Patching:
    """Runs of ``interventions`` that start from the ``base`` run, and what is read of them."""

    runs: list[list[Intervention]]
    reads: tuple[Read, ...]
    base: str  # "clean", "corrupted" or "other:N"
    noise: Noise
    sizes: Sizes
    prompts: int  # how many there are

    def __post_init__(self) -> None:
        if self.corrupts and self.noise.kind == "counterfactual":
            raise ExperimentError("a counterfactual prompt is another text; give base or source 'other', and no noise")

    def encode(self, prompt: Prompt | Fact | str, number: int, encoder: PromptEncoder) -> EncodedPrompt:
        """The ``number``-th prompt as token ids; a fact's other text is that about its counterfactual subject, where
        anything takes values from it."""
        if isinstance(prompt, Fact):
            encoded, subject = encoder.fact(prompt), prompt.counterfactual_subject
            taken = self.base.startswith("other") or any(item.from_other for run in self.runs for item in run)
            others: tuple[str, ...] = (prompt.prompt.replace("{}", subject),) if subject is not None and taken else ()
        else:
            prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
            text = Fact(f"prompt {number}", "{}", prompt.text, "none" if prompt.target is None else prompt.target)
            encoded = replace(encoder.fact(text, "argmax" if prompt.target is None else "label"), span=NO_SUBJECT)
            others = prompt.others
        fact = encoded.fact
        texts = (Fact(f"{fact.id}, other {i}", "{}", other, fact.target_true) for i, other in enumerate(others))
        result = EncodedPrompt(encoded, tuple(encoder.fact(text, "argmax").prompt for text in texts))
        longest = max(map(len, result.others), default=0) + max(0, len(encoded.target) - 1)
        if longest > (most := self.sizes.positions):
            raise FactError(f"{result.name}: another text and the target need {longest} of {most} positions")
        return result

    def trial(self, prompt: EncodedPrompt, number: int) -> Trial:
        bases, names = self._bases(prompt)
        columns: list[tuple[int, ...]] = []
        vectors: list[Tensor] = []
        for run, interventions in enumerate(self.runs, start=len(bases)):
            for intervention in interventions:
                columns += self._overwrites(intervention, run, prompt, names, vectors, number)
        table = np.array(columns, dtype=np.int64).reshape(-1, 8).T
        branch_base = np.full(len(self.runs), names.index(self.base))
        captures, logits = self._captured(prompt, bases, branch_base)
        experiment = Experiment(bases, branch_base, Overwrites(*table), (False,) * len(vectors), captures, logits)
        target = prompt.fact.target
        prompts = tuple(text + target[:-1] for text in (prompt.fact.prompt, *prompt.others))
        return Trial(prompt.fact.fact.id, prompts, target, self._shape(prompt, prompts), experiment, tuple(vectors))

    def result(self, prompt: EncodedPrompt, trial: Trial, result: Result) -> PromptResult:
        bases = trial.experiment.bases
        runs = result.log_p.shape[1]
        values, at = [], {"logits": 0, "states": 0}
        for read in self.reads:
            tokens = len(prompt.tokens(read.tokens))
            layers = 1 if read.layers is None else len(_as_layers(read.layers, self.sizes.depth))
            kind, source = ("logits", result.logits) if read.what == "logits" else ("states", result.states)
            count = runs * tokens * layers
            part = source[:, at[kind] : at[kind] + count]
            at[kind] += count
            shape = (runs, tokens) if read.what == "logits" else (runs, layers, tokens)
            values.append(part.unflatten(1, shape))
        every = RunValues(np.exp(result.log_p), tuple(values))
        noised = [number for number, base in enumerate(bases) if base.draw is not None]
        corrupted, others = every[1:2] if noised else None, every[1 + len(noised) : len(bases)]
        return PromptResult(patched=every[len(bases) :], clean=every[:1], corrupted=corrupted, others=others)

    @property
    def corrupts(self) -> bool:
        sources = [intervention.source for run in self.runs for intervention in run]
        return self.base == "corrupted" or any(isinstance(source, str) and source == "corrupted" for source in sources)

    def _bases(self, prompt: EncodedPrompt) -> tuple[tuple[Base, ...], list[str]]:
        if self.corrupts and prompt.fact.span == NO_SUBJECT:
            raise ExperimentError(f"{prompt.name} is no fact: only facts have a subject that can be corrupted")
        others = range(len(prompt.others))
        corrupted = (Base(draw=0, replace=self.noise.replace),) if self.corrupts else ()
        bases = (Base(), *corrupted, *(Base(prompt=1 + other) for other in others))
        names = ["clean", *["corrupted"] * self.corrupts, *(f"other:{other}" for other in others)]
        if self.base not in names:
            raise ExperimentError(f"{prompt.name}: there is no base {self.base!r}; it has {', '.join(names)}")
        return bases, names

    def _overwrites(
        self,
        intervention: Intervention,
        run: int,
        prompt: EncodedPrompt,
        names: list[str],
        vectors: list[Tensor],
        number: int,
    ) -> list[tuple[int, ...]]:
        state = State(intervention.site)
        head = -1 if state.head is None else state.head
        if head >= self.sizes.heads:
            raise ExperimentError(f"there is no head {head}; the model has {self.sizes.heads} heads")
        taken = tokens = prompt.tokens(intervention.tokens, _text_of(self.base))
        if isinstance(intervention.source, Tensor):
            width = self.sizes.hidden if head < 0 else self.sizes.head_dim
            vectors.append(_vector(intervention.source, width, number, self.prompts))
            source = given(len(vectors) - 1)
        elif intervention.source == "zero":
            source = ZERO
        else:
            name = "other:0" if intervention.source == "other" else intervention.source
            if name not in names:
                known = ", ".join([*names, "zero"])
                raise ExperimentError(f"{prompt.name}: there is no source {intervention.source!r}; there are: {known}")
            source = names.index(name)
            taken = prompt.tokens(_source_tokens(intervention, tokens), _text_of(name))
        if len(taken) != len(tokens):
            raise ExperimentError(f"{prompt.name}: {len(taken)} source tokens for {len(tokens)} tokens; give as many")
        return [
            (SITES.index(state.site), layer, layer + 1, run, token, source, from_token, head)
            for layer in _as_layers(intervention.layers, self.sizes.depth)
            for token, from_token in zip(tokens, taken, strict=True)
        ]

    def _captured(
        self, prompt: EncodedPrompt, bases: tuple[Base, ...], branch_base: np.ndarray
    ) -> tuple[Captures, np.ndarray]:
        """What is read of every run, each at the tokens of the text that it runs on."""
        texts = [base.prompt for base in bases] + [bases[base].prompt for base in branch_base]
        captures, logits = [], []
        for read in self.reads:
            wanted = len(prompt.tokens(read.tokens))
            for run, text in enumerate(texts):
                tokens = prompt.tokens(read.tokens, text)
                if len(tokens) != wanted:
                    lengths = f"{wanted} and {len(tokens)} tokens"
                    raise ExperimentError(
                        f"{prompt.name}: its texts have {lengths} to read; name positions that all have"
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
        targets = len(target_tokens(prompt.fact))
        read = tuple(tuple(range(len(tokens) - targets, len(tokens))) for tokens in prompts)
        longest = max(map(len, prompts))
        alike = []
        for other in prompts[1:]:
            # where one of two texts ends before the other, it is read: what is one row must be read as one
            same = longest if len(other) == len(first) else min(len(first), len(other)) - targets
            alike.append(tuple(i < min(same, len(first)) and first[i] == other[i] for i in range(longest)))
        return Shape(longest, prompt.fact.span if self.corrupts else (0, 0), read, tuple(alike))


def _text_of(name: str) -> int:
    """Which text a base run reads."""
    return 1 + int(name.removeprefix("other:")) if name.startswith("other:") else 0


def _as_layers(layers: int | Iterable[int], depth: int) -> tuple[int, ...]:
    numbers = whole_numbers(layers, "layers")
    for layer in numbers:
        if not 0 <= layer < depth:
            raise ExperimentError(f"there is no layer {layer}; the model has layers 0 to {depth - 1}")
    return numbers


def _source_tokens(intervention: Intervention, tokens: tuple[int, ...]) -> Positions:
    """Where the source's values are: a subject's tokens are found in the fact's own prompt only."""
    if intervention.source_tokens is not None:
        return intervention.source_tokens
    positions = intervention.tokens
    return tokens if isinstance(positions, str) and positions.startswith("subject") else positions


def _vector(source: Tensor, width: int, number: int, prompts: int) -> Tensor:
    if source.shape not in ((width,), (prompts, width)):
        raise ExperimentError(f"the source vector is {tuple(source.shape)}; give ({width},) or ({prompts}, {width})")
    if not source.isfinite().all():
        raise ExperimentError("the source vector holds NaN or infinity")
    return (source[number] if source.dim() == 2 else source).detach()
