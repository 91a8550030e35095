"""The facts that a sweep is planned for: their number, and the lengths of their texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.engine.errors import CausalconeError
from causalcone.engine.facts import Fact
from causalcone.engine.models.base import Sizes
from causalcone.runners.demo.files import path_of
from causalcone.runners.edits.settings import read_contexts
from causalcone.runners.sweep.inputs.facts_table import read_facts
from causalcone.runners.sweep.inputs.lengths import FactLengths, measured_lengths, typical_facts
from causalcone.runners.sweep.inputs.model_outline import known_tokenizer
from causalcone.runners.sweep.inputs.settings import Sweep

MEASURED = 1000
"""Of how many facts the texts are measured, evenly spaced ones, where there are more."""

USUAL_FACTS = 1000
"""How many facts are taken to be there, where neither the file nor a limit says it."""

Weighted = list[tuple[FactLengths, float]]


@dataclass(frozen=True)
class PlannedFacts:
    """The facts of a sweep. count: how many; each: lengths of all of them one by one, or (``every`` false) of some
    that stand for all; lines: in words, where this is from."""

    count: int
    each: tuple[tuple[FactLengths, float], ...]
    every: bool
    lines: tuple[str, ...]

    def some(self, count: int, first: bool) -> Weighted:
        """Lengths of ``count`` facts, with how many have them: of the ``first``, or of any."""
        if self.every and first:
            return list(self.each[:count])
        whole = sum(weight for _, weight in self.each)
        return [(lengths, weight * count / whole) for lengths, weight in self.each]


def facts_of(sweep: Sweep, sizes: Sizes) -> PlannedFacts:
    """All that can be known of the sweep's facts: the file's, measured with the model's tokenizer; else usual ones."""
    if not Path(path_of(sweep.facts, "facts")).expanduser().is_file():
        count = sweep.limit or USUAL_FACTS
        source = "the sweep's limit" if sweep.limit else "a guess; set limit"
        return _typical(count, f"facts: {count:,} ({source}), since {sweep.facts} is not there")
    facts, _ = read_facts(sweep)
    line = f"facts: {len(facts):,} of {sweep.facts}"
    tokenizer = known_tokenizer(sweep)
    if tokenizer is None:
        return _typical(len(facts), line, f"no tokenizer of {sweep.model} is at hand")
    encoder = Encoder(tokenizer, sizes)
    contexts = None if sweep.contexts is None else read_contexts(Path(sweep.contexts))
    sample = [facts[number * len(facts) // MEASURED] for number in range(MEASURED)] if len(facts) > MEASURED else facts
    measured = tuple((lengths, 1.0) for lengths in _measured(sweep, sample, encoder, contexts))
    source = f"lengths: those of {len(measured):,} facts, by the tokenizer of {sweep.model}"
    every = len(measured) == len(facts)
    count = len(facts) if len(sample) < len(facts) else len(measured)
    return PlannedFacts(count, measured, every, (line, source))


def _typical(count: int, line: str, reason: str | None = None) -> PlannedFacts:
    why = f", since {reason}" if reason else ""
    return PlannedFacts(
        count, typical_facts(), False, (line, f"lengths: those typical of CounterFact in GPT-2's tokens{why}")
    )


def _measured(sweep: Sweep, facts: Sequence[Fact], encoder: Encoder, contexts: Contexts | None) -> list[FactLengths]:
    """Of facts that can be used; the others are errors, unless the sweep skips them."""
    measured = []
    for fact in facts:
        try:
            measured.append(measured_lengths(fact, encoder, contexts))
        except CausalconeError:
            if not sweep.skip_bad_facts:
                raise
    return measured
