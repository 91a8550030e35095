"""Lengths of CounterFact's texts in GPT-2's tokens, to plan without a file of facts."""

from __future__ import annotations

from causalcone.runners.sweep.forecast.lengths import FactLengths, drawn_contexts

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
