"""Options of an analysis, and the frames that its tables and figures share."""

from dataclasses import dataclass
from functools import cached_property

import polars as pl

from causalcone.analysis.effects import At, Compat, Denominator, absolute_effects
from causalcone.analysis.papers.records import APART, ON_RECORD, Record
from causalcone.analysis.scores import edits_with_effects
from causalcone.analysis.stats.correlations import Correction
from causalcone.analysis.stats.regressions import regressions
from causalcone.analysis.sweep_results import ZEROED, State, Study
from causalcone.analysis.tables.names import in_order
from causalcone.analysis.tables.traces import TableError


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """How the tables are computed; as published by default. state: whose effects, the study's main state by default;
    draws: of the bootstrap and the permutation test; mixed: whether mixed-effects models are fitted, which takes long;
    compat: "published" leaves effects that are not positive out of means by layer, by default as the sweep says;
    beside: the study on record to set beside (``Record.open``), by default the one that the sweep names."""

    state: State | None = None
    at: At = "max"
    denominator: Denominator = "p_high"
    interaction: bool = True
    draws: int = 1000
    mixed: bool = False
    correction: Correction = "holm"
    level: float = 0.95
    seed: int = 0
    compat: Compat | None = None
    beside: str | None = None


PUBLISHED = AnalysisOptions()


class AnalysisInputs:
    """Frames that several tables and figures of a study are made of, computed once. Where the study lacks one, asking
    for it raises ``TableError``, as does a study on record that is asked for and is none. on_record: that study."""

    def __init__(self, study: Study, options: AnalysisOptions) -> None:
        self.study, self.options = study, options
        name = options.beside or study.published
        self.on_record = None if name is None else Record.open(name)

    @property
    def state(self) -> State:
        """The state whose effects are compared with scores."""
        return _there("traces", self.options.state or self.study.main_state())

    @property
    def zeroed_state(self) -> State:
        return _there("zeroed states", self.study.main_state(ZEROED))

    @cached_property
    def largest(self) -> pl.DataFrame:
        """Effects, the largest over the tokens."""
        return self.study.effects(self.state, "max", self.options.denominator)

    @cached_property
    def joined(self) -> pl.DataFrame:
        """Scores beside effects, as the options say."""
        if self.options.at == "max":
            return edits_with_effects(self.study.scores, self.largest)
        return self.study.joined(self.state, self.options.at, self.options.denominator)

    def regressions(self, table: pl.DataFrame, *scores: str) -> pl.DataFrame:
        """``regressions`` of scores beside effects, in the papers' order."""
        return in_order(regressions(table, scores, interaction=self.options.interaction))

    @cached_property
    def absolute(self) -> pl.DataFrame:
        """Scores beside absolute effects at the last subject token."""
        kind, window = self.state
        traces = self.study.traces.filter(kind=kind, window=window)
        return edits_with_effects(self.study.scores, absolute_effects(traces, self.study.answer_score))

    @cached_property
    def zeroed(self) -> pl.DataFrame:
        """Scores beside effects of zeroing."""
        return edits_with_effects(self.study.scores, self.study.zeroing(self.zeroed_state))

    @property
    def compat(self) -> Compat | None:
        return self.options.compat or self.study.configuration.get("compat")

    @property
    def record(self) -> Record | None:
        """The study on record whose values are set beside: only where ours are computed as they were."""
        record = self.on_record
        return record if record is not None and record.protocol == self.protocol else None

    @property
    def form(self) -> str:
        return f"layer and effect {'with interaction' if self.options.interaction else 'additive'}"

    @property
    def notes(self) -> list[str]:
        """Whose values stand beside, or why none do; and the options of tables in words."""
        notes = []
        if self.on_record is not None:
            apart = f"the values of {self.on_record.label} {APART}"
            notes = [f"{ON_RECORD}{self.on_record.label}" if self.record else apart]
        return [*notes, self.protocol]

    @property
    def protocol(self) -> str:
        """The options of tables in words."""
        where = "largest over prompt tokens" if self.options.at == "max" else "at the last subject token"
        prompts = "the first paraphrase and neighbour" if self.study.aggregate == "first" else "means over prompts"
        kind, window = self.state
        per_token = ", p per token of the answer" if self.study.answer_score == "mean" else ""
        effects = f"effects of {kind}:{window}, {where}, over {self.options.denominator}{per_token}"
        return f"{effects}; {self.form}; scores of {prompts}, floored at 0"


def _there(name: str, state: State | None) -> State:
    if state is None:
        raise TableError(f"there are no {name}")
    return state
