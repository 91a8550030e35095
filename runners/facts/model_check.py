"""What a model makes of facts: how many it knows, and whether answers are joined to their prompts as it expects."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from causalcone.engine.edit.texts.recall import answer_probabilities, known
from causalcone.engine.facts import Fact, usable
from causalcone.engine.run.session import Session

LIKELIER = 10
"""How many times likelier an answer has to be with the other joiner for its fact to be named."""


def check_lines(session: Session, facts: Sequence[Fact]) -> Iterator[str]:
    """What the model makes of facts: a line for each whose answer is ``LIKELIER`` times likelier with the other joiner,
    then how many of how many these are, and how many it knows. Facts that cannot be encoded are left out."""
    encoded, _ = usable(facts, session.prompts.fact, lambda fact: fact.id, "skip")
    others = [
        replace(fact.fact, joiner="none" if fact.answer and fact.answer.joiner == "space" else "space")
        for fact in encoded
    ]
    joined = answer_probabilities(session, encoded)
    otherwise = answer_probabilities(session, [session.prompts.fact(other) for other in others])
    found = 0
    for fact, other, p, p_other in zip(encoded, others, joined, otherwise, strict=True):
        if p_other >= LIKELIER * p:
            found += 1
            name = fact.answer.joiner if fact.answer else ""
            yield (
                f"fact {fact.fact.id!r}: {fact.fact.target_true!r} has p {p:.2g} after {fact.fact.text!r} with joiner "
                f"{name!r}, and {p_other:.2g} with {other.joiner!r}; give the fact joiner {other.joiner!r}"
            )
    yield f"answers much likelier with the other joiner: {found:,} of {len(encoded):,} facts"
    right = known(session, encoded)
    counts = [
        f"{sum(right[number] for number in at)} of {len(at)} whose subject {verb}"
        for verb, at in (
            ("begins the prompt", [number for number, fact in enumerate(encoded) if fact.span[0] == 0]),
            ("stands inside it", [number for number, fact in enumerate(encoded) if fact.span[0] > 0]),
        )
    ]
    yield f"answers that the model gives itself: {sum(right)} of {len(right)} ({', '.join(counts)})"
