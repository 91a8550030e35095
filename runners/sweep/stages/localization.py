"""The stages that localize facts: "trace", "sever", "zero" and "gradients"."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pyarrow as pa
from pydantic import Field

from causalcone.engine.edit.runs.flops import Asked
from causalcone.engine.facts import Fact
from causalcone.engine.localize.causal_tracing import CausalTracing, Zeroing, own_trial, target_tokens
from causalcone.engine.localize.gradients import integrated_states, runs_along
from causalcone.engine.localize.options import TraceSpec, ZeroSpec, as_tokens, check_tokens, choose_tokens
from causalcone.engine.localize.states import State, as_states, states_in
from causalcone.engine.schemas import GRADIENT_SCHEMA, TRACE_SCHEMA
from causalcone.runners.checked_files import CheckedTable, Count
from causalcone.runners.show.forecast import USUAL_EFFICIENCY
from causalcone.runners.sweep.inputs.planned_facts import FactLengths
from causalcone.runners.sweep.inputs.resources import Resources
from causalcone.runners.sweep.inputs.settings import Names, Sweep, Target, Tokens
from causalcone.runners.sweep.inputs.units import Unit
from causalcone.runners.sweep.stages.counts import Counts
from causalcone.runners.sweep.stages.prepared import NOISE
from causalcone.runners.sweep.stages.stage import ResultTable, Stage, StageCost, StageUnits, errors_of


class LocalizationSettings(CheckedTable):
    """Shared by all of them. facts: how many, all by default."""

    tokens: Tokens = "all"
    target: Target = "label"
    facts: Count | None = None


class TraceSettings(LocalizationSettings):
    """Causal tracing. states: those that are restored, one at a time."""

    states: Names = ("hidden:1", "mlp:10", "attn:10")


class SeverSettings(LocalizationSettings):
    """Severed tracing of hidden states, once for each of the parts that are held."""

    parts: Annotated[tuple[Literal["mlp", "attn", "both"], ...], Field(min_length=1)] = ("mlp", "attn")
    tokens: Tokens = "subject_last"


class ZeroSettings(LocalizationSettings):
    """Representation zeroing."""

    states: Names = ("mlp:5",)
    tokens: Tokens = "subject"


class GradientSettings(LocalizationSettings):
    """Integrated gradients."""

    kinds: Annotated[tuple[Literal["hidden", "mlp", "attn"], ...], Field(min_length=1)] = ("hidden", "mlp", "attn")
    steps: Count = 50
    target: Target = "argmax"


Options = TypeVar("Options", bound=LocalizationSettings)
Counter = Callable[[FactLengths], tuple[float, int]]
"""FLOPs and rows of a fact, from its lengths."""


class LocalizationStage(Stage[Options]):
    """Localizes each fact alone, once for each of its groups."""

    tables = (ResultTable("traces", TRACE_SCHEMA, row_bytes=16),)
    efficiency = USUAL_EFFICIENCY

    def __init__(self, sweep: Sweep, options: Options) -> None:
        super().__init__(sweep, options)
        if isinstance(options, TraceSettings | ZeroSettings):
            with errors_of(f"{self.name}.states"):
                as_states(options.states)
        with errors_of(f"{self.name}.tokens"):
            check_tokens(as_tokens(options.tokens))

    @abstractmethod
    def batches(self, facts: Sequence[Fact], group: str, resources: Resources) -> Iterable[pa.RecordBatch]:
        """Results of facts in a group."""

    @abstractmethod
    def counter(self, group: str, counts: Counts) -> Counter:
        """Counts one fact in a group."""

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        (table,) = self.tables
        batches = self.batches(resources.facts_of(unit), unit.group, resources)
        return {table.name: pa.Table.from_batches(batches, schema=table.schema)}

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        totals = [counts.added(self.options.facts, self.counter(group, counts)) for group in self.groups]
        rows = sum(rows for _, rows in totals)
        return StageCost(units, sum(flops for flops, _ in totals), {self.tables[0].name: rows})

    def states(self, texts: Sequence[str], counts: Counts) -> tuple[State, ...]:
        """The states that the model has."""
        with errors_of(f"{self.name}.states"):
            return states_in(as_states(texts), counts.architecture.sizes.heads)

    def trial_counter(self, experiment: CausalTracing | Zeroing, samples: int, counts: Counts) -> Counter:
        def counted(lengths: FactLengths) -> tuple[float, int]:
            trial, grid = experiment.trial(lengths.encoded(self.options.target))
            return counts.planned(trial, samples), len(grid.run)

        return counted


class TracingStage(LocalizationStage[Options]):
    needs = (NOISE,)

    @abstractmethod
    def traced(self, group: str) -> dict[str, Any]:
        """The states that are restored in a group, and how."""

    def batches(self, facts: Sequence[Fact], group: str, resources: Resources) -> Iterable[pa.RecordBatch]:
        options, noise = self.options, self.sweep.noise
        drawn: dict[str, Any] = {"samples": noise.samples, "sigma": resources.noise_level, "seed": noise.seed}
        chosen = self.traced(group) | drawn
        return resources.tracer.stream(facts, tokens=options.tokens, target=options.target, **chosen)

    def counter(self, group: str, counts: Counts) -> Counter:
        chosen, samples = self.traced(group), self.sweep.noise.samples
        chosen |= {"states": self.states(chosen["states"], counts), "samples": samples, "sigma": 1.0}
        spec = TraceSpec(target=self.options.target, tokens=self.options.tokens, **chosen)
        return self.trial_counter(CausalTracing(spec, counts.architecture.sizes.depth), samples, counts)


class TraceStage(TracingStage[TraceSettings]):
    """Causal tracing."""

    name, title, table = "trace", "causal tracing", TraceSettings
    groups = ("restore",)

    def traced(self, group: str) -> dict[str, Any]:
        return {"states": self.options.states}


class SeverStage(TracingStage[SeverSettings]):
    """Severed tracing."""

    name, title, table = "sever", "severed tracing", SeverSettings

    def __init__(self, sweep: Sweep, options: SeverSettings) -> None:
        super().__init__(sweep, options)
        self.groups = [f"sever_{part}" for part in options.parts]

    def traced(self, group: str) -> dict[str, Any]:
        return {"states": ("hidden:1",), "sever": group.removeprefix("sever_"), "compat": self.sweep.compat}


class ZeroStage(LocalizationStage[ZeroSettings]):
    """Representation zeroing."""

    name, title, table = "zero", "zeroing", ZeroSettings
    groups = ("zero",)

    def batches(self, facts: Sequence[Fact], group: str, resources: Resources) -> Iterable[pa.RecordBatch]:
        options = self.options
        return resources.tracer.stream_zero(facts, options.states, target=options.target, tokens=options.tokens)

    def counter(self, group: str, counts: Counts) -> Counter:
        options = self.options
        spec = ZeroSpec(states=self.states(options.states, counts), target=options.target, tokens=options.tokens)
        return self.trial_counter(Zeroing(spec, counts.architecture.sizes.depth), 1, counts)


class GradientStage(LocalizationStage[GradientSettings]):
    """Integrated gradients."""

    name, title, table = "gradients", "integrated gradients", GradientSettings
    tables = (ResultTable("gradients", GRADIENT_SCHEMA, row_bytes=26),)
    efficiency = Stage.efficiency

    def batches(self, facts: Sequence[Fact], group: str, resources: Resources) -> Iterable[pa.RecordBatch]:
        options, stream = self.options, resources.tracer.stream_integrated_gradients
        return stream(facts, options.kinds, steps=options.steps, target=options.target, tokens=options.tokens)

    def counter(self, group: str, counts: Counts) -> Counter:
        options = self.options

        def counted(lengths: FactLengths) -> tuple[float, int]:
            """The clean run, whose states are kept; then every state's points and its baseline, forwards and back,
            which takes as much again since weights have no gradient."""
            fact = lengths.encoded(options.target)
            tokens = choose_tokens(options.tokens, len(fact.prompt), fact.span)
            at = integrated_states(options.kinds, counts.architecture.sizes.depth, tokens)
            clean = counts.flops.unedited(Asked(len(fact.tokens), len(fact.tokens), len(target_tokens(fact))))
            along = counts.planned(own_trial(fact, runs_along(at)), options.steps + 1, gradient=True)
            return clean + 2 * along, len(at)

        return counted
