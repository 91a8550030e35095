"""The stages that localize facts: "trace", "sever", "zero" and "gradients"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pyarrow as pa
from pydantic import Field

from causalcone.engine.edit.runs.flops import Asked
from causalcone.engine.localize.causal_tracing import CausalTracing, Zeroing, target_tokens
from causalcone.engine.localize.gradients import integrated_states, runs_along
from causalcone.engine.localize.options import TraceSpec, ZeroSpec, as_tokens, check_tokens, choose_tokens
from causalcone.engine.localize.states import State, as_states, states_in
from causalcone.engine.plan.cone import Shape
from causalcone.engine.run.runner import Trial
from causalcone.engine.schemas import GRADIENT_SCHEMA, TRACE_SCHEMA
from causalcone.runners.checked_files import CheckedTable, Count
from causalcone.runners.show.forecast import USUAL_EFFICIENCY
from causalcone.runners.sweep.inputs.lengths import FactLengths
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


class _LocalizationStage(Stage[Options]):
    tables = (ResultTable("traces", TRACE_SCHEMA, row_bytes=16),)
    efficiency = USUAL_EFFICIENCY

    def __init__(self, sweep: Sweep, options: Options) -> None:
        super().__init__(sweep, options)
        if isinstance(options, TraceSettings | ZeroSettings):
            with errors_of(f"{self.name}.states"):
                as_states(options.states)
        with errors_of(f"{self.name}.tokens"):
            check_tokens(as_tokens(options.tokens))

    def states(self, texts: Sequence[str], counts: Counts) -> tuple[State, ...]:
        """The states that the model has."""
        with errors_of(f"{self.name}.states"):
            return states_in(as_states(texts), counts.architecture.sizes.heads)


class _TracingStage(_LocalizationStage[Options]):
    needs = (NOISE,)

    def traces(self, unit: Unit, resources: Resources, **options: Any) -> Mapping[str, pa.Table]:
        batches = resources.tracer.stream(
            resources.facts_of(unit),
            tokens=self.options.tokens,
            target=self.options.target,
            samples=self.sweep.noise.samples,
            sigma=resources.noise_level,
            seed=self.sweep.noise.seed,
            **options,
        )
        return {"traces": pa.Table.from_batches(list(batches), schema=TRACE_SCHEMA)}

    def counted(self, counts: Counts, states: tuple[State, ...], **options: Any) -> tuple[float, float]:
        """FLOPs and rows."""
        samples, target, tokens = self.sweep.noise.samples, self.options.target, self.options.tokens
        spec = TraceSpec(states=states, samples=samples, sigma=1.0, target=target, tokens=tokens, **options)
        tracing = CausalTracing(spec, counts.architecture.sizes.depth)

        def one(lengths: FactLengths) -> tuple[float, int]:
            trial, grid = tracing.trial(lengths.encoded(target))
            return counts.planned(trial, tracing.samples), len(grid.run)

        return counts.added(self.options.facts, one)


class TraceStage(_TracingStage[TraceSettings]):
    """Causal tracing."""

    name, title, table = "trace", "causal tracing", TraceSettings
    groups = ("restore",)

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        return self.traces(unit, resources, states=self.options.states)

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        flops, rows = self.counted(counts, self.states(self.options.states, counts))
        return StageCost(units, flops, {"traces": rows})


class SeverStage(_TracingStage[SeverSettings]):
    """Severed tracing."""

    name, title, table = "sever", "severed tracing", SeverSettings

    @property
    def groups(self) -> Sequence[str]:
        return [f"sever_{part}" for part in self.options.parts]

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        part, compat = unit.group.removeprefix("sever_"), self.sweep.compat
        return self.traces(unit, resources, states=(("hidden", 1),), sever=part, compat=compat)

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        states, compat = as_states("hidden:1"), self.sweep.compat
        parts = [self.counted(counts, states, sever=part, compat=compat) for part in self.options.parts]
        return StageCost(units, sum(flops for flops, _ in parts), {"traces": sum(rows for _, rows in parts)})


class ZeroStage(_LocalizationStage[ZeroSettings]):
    """Representation zeroing."""

    name, title, table = "zero", "zeroing", ZeroSettings
    groups = ("zero",)

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        options, facts = self.options, resources.facts_of(unit)
        batches = resources.tracer.stream_zero(facts, options.states, target=options.target, tokens=options.tokens)
        return {"traces": pa.Table.from_batches(list(batches), schema=TRACE_SCHEMA)}

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        options = self.options
        spec = ZeroSpec(states=self.states(options.states, counts), target=options.target, tokens=options.tokens)
        zeroing = Zeroing(spec, counts.architecture.sizes.depth)

        def one(lengths: FactLengths) -> tuple[float, int]:
            trial, grid = zeroing.trial(lengths.encoded(options.target))
            return counts.planned(trial, 1), len(grid.run)

        flops, rows = counts.added(options.facts, one)
        return StageCost(units, flops, {"traces": rows})


class GradientStage(_LocalizationStage[GradientSettings]):
    """Integrated gradients."""

    name, title, table = "gradients", "integrated gradients", GradientSettings
    tables = (ResultTable("gradients", GRADIENT_SCHEMA, row_bytes=26),)
    efficiency = Stage.efficiency

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        options = self.options
        batches = resources.tracer.stream_integrated_gradients(
            resources.facts_of(unit), options.kinds, steps=options.steps, target=options.target, tokens=options.tokens
        )
        return {"gradients": pa.Table.from_batches(list(batches), schema=GRADIENT_SCHEMA)}

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        flops, rows = counts.added(self.options.facts, lambda lengths: self._integrated(lengths, counts))
        return StageCost(units, flops, {"gradients": rows})

    def _integrated(self, lengths: FactLengths, counts: Counts) -> tuple[float, int]:
        """The clean run, whose states are kept; then every state's points and its baseline, forwards and back, which
        takes as much again since weights have no gradient."""
        options = self.options
        fact = lengths.encoded(options.target)
        tokens = choose_tokens(options.tokens, len(fact.prompt), fact.span)
        at = integrated_states(options.kinds, counts.architecture.sizes.depth, tokens)
        read = target_tokens(fact)
        trial = Trial("", (fact.tokens,), fact.target, Shape(len(fact.tokens), (0, 0), (read,)), runs_along(at))
        clean = counts.flops.unedited(Asked(len(fact.tokens), len(fact.tokens), len(read)))
        return clean + 2 * counts.planned(trial, options.steps + 1, gradient=True), len(at)
