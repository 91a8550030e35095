"""The stage "filter": what the model knows of all facts, which decides how they go on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from causalcone.engine.edit.runs.flops import Asked, Grown
from causalcone.engine.edit.texts.recall import COMPLETION_TOKENS, completes, completions, known_answers
from causalcone.engine.facts import Fact
from causalcone.engine.schemas import FILTER_SCHEMA
from causalcone.runners.sweep.inputs.resources import Resources
from causalcone.runners.sweep.inputs.settings import FilterSettings
from causalcone.runners.sweep.inputs.units import Selection, Unit
from causalcone.runners.sweep.stages.counts import Counts
from causalcone.runners.sweep.stages.stage import ResultTable, Stage, StageCost, StageUnits

FACT_BYTES = 1150
"""Of a row of the table of facts in zstd-compressed Parquet, measured on a sweep of the demo model."""


class FilterStage(Stage[FilterSettings]):
    """Completions and answer probabilities of all facts."""

    name, title, table = "filter", "what the model knows", FilterSettings
    tables = (ResultTable("filter", FILTER_SCHEMA, row_bytes=190),)
    required = True

    def all_units(self, facts: int) -> StageUnits:
        """The units of this many facts."""
        return self.units(Selection(tuple(range(facts))), 0)[0]

    def fact_check(self, resources: Resources) -> Callable[[Fact], object]:
        """Refuses facts that leave no positions after the prompt for the completion, or for one token at least."""
        session, tokens = resources.session, COMPLETION_TOKENS if self.options.completes else 1
        return replace(session.prompts, positions=session.sizes.positions + 1 - tokens).fact

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        session, facts = resources.session, resources.facts_of(unit)
        encoded = [session.prompts.fact(fact) for fact in facts]
        session.tell(encoded)
        nothing = [None] * len(facts)
        texts: Sequence[str | None] = completions(session, encoded) if self.options.completes else nothing
        right = [None if text is None else completes(fact, text) for fact, text in zip(facts, texts, strict=True)]
        first: Sequence[bool | None] = nothing
        if self.options.argmax:
            likeliest = completions(session, encoded, 1)
            first = [text.strip() == fact.target_true.strip() for fact, text in zip(facts, likeliest, strict=True)]
        p_true, tokens = zip(*known_answers(session, encoded), strict=True)
        answers = [fact.answer for fact in encoded if fact.answer is not None]
        columns = [
            [fact.id for fact in facts], texts, right, first, p_true,
            [answer.joiner for answer in answers], [answer.joined for answer in answers], tokens,
        ]  # fmt: skip
        return {"filter": pa.table(columns, schema=FILTER_SCHEMA)}

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        facts = counts.facts.some(counts.facts.count, first=True)
        asked = Asked.total((Asked.after(fact.prompt, [fact.target]), weight) for fact, weight in facts)
        flops = counts.flops.unedited(asked)
        if self.options.completes:
            texts = Grown.total((Grown(1, fact.prompt, COMPLETION_TOKENS), weight) for fact, weight in facts)
            flops += counts.flops.decoding(texts)
        return StageCost(units, flops, {"filter": units.items}, other_bytes=FACT_BYTES * units.items)
