"""Lengths of the texts about facts, on which alone it depends what a sweep takes. Without a file of facts they are
those of CounterFact in GPT-2's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from causalcone.engine.edit.requests.problems import REVERSAL_TOKENS
from causalcone.engine.edit.requests.prompts import ESSENCE, Encoder
from causalcone.engine.edit.requests.requests import FACT_AMPLIFICATION, TRACING_REVERSAL, Request
from causalcone.engine.edit.runs.flops import Asked, Searched
from causalcone.engine.edit.texts.contexts import MEMIT_TOKENS, MEMIT_WORDS, ROME_TOKENS, Contexts
from causalcone.engine.facts import EncodedFact, Fact, encode, target_ids

DRAWN = {"rome": ROME_TOKENS, "memit": (MEMIT_TOKENS + 1,) * len(MEMIT_WORDS)}
"""Tokens that contexts put before a prompt, where they are still to be drawn. Each ends in a full stop, which in ROME's
comes in place of the token that they begin from."""


SHAPES = (
    ((5, 0, 2), 0.08),
    ((6, 0, 3), 0.17),
    ((7, 0, 4), 0.18),
    ((8, 0, 5), 0.07),
    ((9, 0, 5), 0.08),
    ((10, 0, 5), 0.08),
    ((11, 0, 7), 0.07),
    ((8, 3, 3), 0.09),
    ((10, 4, 4), 0.06),
    ((10, 6, 1), 0.04),
    ((12, 4, 7), 0.05),
    ((14, 4, 8), 0.03),
)
"""Tokens of the prompt and before the subject, tokens of the subject, and their share: the first 60 prompts of
CounterFact, put together by what is alike (mean 8.3 tokens, of the subject 4.2). All of their targets are one token."""

TARGET = 1

PARAPHRASES, NEIGHBOURS, ATTRIBUTES, GENERATIONS = (10, 14), 10, 10, 10
"""Tokens of the two paraphrases, and how many of the other prompts a record has."""

NEIGHBOUR, GENERATION = 7, 7
"""Tokens of the other prompts, on average."""


@dataclass(frozen=True)
class FactLengths:
    """Tokens of the texts about a fact.

    prompt: its own; span: those of the subject in it; target, new: of both answers, ``new`` None where there is none;
    essence: of the essence prompt up to the subject's end; asked: of each further prompt that edits are scored on, and
    of the prompt's own answer (0: none); generation: of each generation prompt; contexts: by method, tokens and lookup
    of the prompt, bare and after each context.
    """

    prompt: int
    span: tuple[int, int]
    target: int
    new: int | None
    essence: int
    asked: tuple[tuple[int, int], ...]
    generation: tuple[int, ...]
    contexts: Mapping[str, Sequence[tuple[int, int]]]

    @property
    def reversed(self) -> int:
        """Tokens that the model writes under noise, in Tracing Reversal."""
        return max(1, REVERSAL_TOKENS - self.prompt)

    def targets(self, problem: str, published: bool) -> tuple[int, int | None]:
        """Tokens of the target that is trained, and of the other one."""
        if problem == TRACING_REVERSAL:
            return self.reversed + self.prompt * published, self.target
        if problem == "error_injection":
            return self.new or self.target, self.target
        return self.target, self.new

    def searched(self, contexts: str | None, target: int) -> Searched:
        """The texts that a vector is searched on: in a method's contexts, or the bare prompt."""
        texts = self.contexts["rome"][:1] if contexts is None else self.contexts[contexts]
        return Searched.of(texts, self.essence, target)

    def answers(self, target: int, other: int | None) -> Asked:
        """The prompts that edits are scored on, but for essence texts."""
        both = [target] if other is None else [target, other]
        prompts = [(self.prompt, 0), *self.asked]
        return Asked.total((Asked.after(tokens, [*both, answer] if answer else both), 1) for tokens, answer in prompts)

    def encoded(self, target: str) -> EncodedFact:
        """A fact of these lengths."""
        fact = Fact("of these lengths", "{}", "subject", "target")
        return EncodedFact(fact, (0,) * self.prompt, self.span, (0,) * self.target if target == "label" else ())


def measured_lengths(fact: Fact, encoder: Encoder, contexts: Contexts | None) -> FactLengths:
    """The lengths of a fact's texts, with given contexts, or those that are still to be drawn. Raises ``FactError``
    where the fact cannot be encoded."""
    tokenizer, sizes = encoder.tokenizer, encoder.sizes
    encoded = encode(fact, tokenizer, "label", sizes.vocabulary, sizes.positions)
    request = Request(fact, FACT_AMPLIFICATION, encoded.target)
    answer = 0 if fact.neighborhood_target is None else len(target_ids(fact.neighborhood_target, tokenizer))
    plain, neighbours = fact.paraphrase_prompts + fact.attribute_prompts, fact.neighborhood_prompts
    by_method = {} if contexts is None else {"rome": contexts.rome, "memit": contexts.memit}
    return FactLengths(
        prompt=len(encoded.prompt),
        span=encoded.span,
        target=len(encoded.target),
        new=None if fact.target_new is None else len(target_ids(fact.target_new, tokenizer)),
        essence=encoder.prompted(request, ESSENCE).lookup + 1,
        asked=tuple(
            (len(encoder.written(request, text)), tokens)
            for texts, tokens in ((plain, 0), (neighbours, answer))
            for text in texts
        ),
        generation=tuple(len(encoder.written(request, text)) for text in fact.generation_prompts),
        contexts={
            method: [(len(prompt.text), prompt.lookup) for prompt in encoder.contexts(request, texts)]
            for method, texts in by_method.items()
        }
        or drawn_contexts(len(encoded.prompt), encoded.span[1] - 1),
    )


def drawn_contexts(prompt: int, lookup: int) -> dict[str, list[tuple[int, int]]]:
    """By method: tokens and lookup of a prompt, bare and after contexts that are still to be drawn."""
    return {method: [(prompt + more, lookup + more) for more in (0, *lengths)] for method, lengths in DRAWN.items()}


def typical_facts() -> tuple[tuple[FactLengths, float], ...]:
    """Lengths of a dozen facts, with the share of facts that have them."""
    return tuple((_lengths(prompt, start, start + subject), share) for (prompt, start, subject), share in SHAPES)


def _lengths(prompt: int, start: int, end: int) -> FactLengths:
    others = (NEIGHBOUR,) * (NEIGHBOURS + ATTRIBUTES)
    return FactLengths(
        prompt=prompt,
        span=(start, end),
        target=TARGET,
        new=TARGET,
        essence=end - start,
        asked=tuple((tokens, 0) for tokens in PARAPHRASES + others),
        generation=(GENERATION,) * GENERATIONS,
        contexts=drawn_contexts(prompt, end - 1),
    )
