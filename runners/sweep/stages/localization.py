"""The stages that localize facts: "trace", "sever", "zero" and "gradients"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal, Protocol, TypeVar

import numpy as np
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


class TraceSettings(CheckedTable):
    """Causal tracing: what is restored, at which tokens, of how many facts (all by default)."""

    states: Names = ("hidden:1", "mlp:10", "attn:10")
    tokens: Tokens = "all"
    target: Target = "label"
    facts: Count | None = None


class SeverSettings(CheckedTable):
    """Severed tracing of hidden states, once for each of the parts that are held."""

    parts: Annotated[tuple[Literal["mlp", "attn", "both"], ...], Field(min_length=1)] = ("mlp", "attn")
    tokens: Tokens = "subject_last"
    target: Target = "label"
    facts: Count | None = None


class ZeroSettings(CheckedTable):
    """Representation zeroing."""

    states: Names = ("mlp:5",)
    tokens: Tokens = "subject"
    target: Target = "label"
    facts: Count | None = None


class GradientSettings(CheckedTable):
    """Integrated gradients."""

    kinds: Annotated[tuple[Literal["hidden", "mlp", "attn"], ...], Field(min_length=1)] = ("hidden", "mlp", "attn")
    steps: Count = 50
    tokens: Tokens = "all"
    target: Target = "argmax"
    facts: Count | None = None


class _Tokens(Protocol):
    @property
    def tokens(self) -> Tokens: ...
    @property
    def facts(self) -> int | None: ...


Options = TypeVar("Options", bound=_Tokens)


class _Localization(Stage[Options]):
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


class Trace(_Localization[TraceSettings]):
    """Causal tracing."""

    name, title, table = "trace", "causal tracing", TraceSettings
    needs, groups = (NOISE,), ("restore",)

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        options, noise = self.options, self.sweep.noise
        batches = resources.tracer.stream(
            resources.facts_of(unit),
            options.states,
            tokens=options.tokens,
            target=options.target,
            samples=noise.samples,
            sigma=resources.noise_level,
            seed=noise.seed,
        )
        return {"traces": pa.Table.from_batches(list(batches), schema=TRACE_SCHEMA)}

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        options, noise = self.options, self.sweep.noise
        spec = TraceSpec(
            states=self.states(options.states, counts),
            samples=noise.samples,
            sigma=1.0,
            target=options.target,
            tokens=options.tokens,
        )
        flops, rows = _restored(counts, options.facts, spec)
        return StageCost(units, flops, {"traces": rows})


class Sever(_Localization[SeverSettings]):
    """Severed tracing."""

    name, title, table = "sever", "severed tracing", SeverSettings
    needs = (NOISE,)

    @property
    def groups(self) -> Sequence[str]:
        return [f"sever_{part}" for part in self.options.parts]

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        options, noise = self.options, self.sweep.noise
        batches = resources.tracer.stream(
            resources.facts_of(unit),
            (("hidden", 1),),
            tokens=options.tokens,
            target=options.target,
            sever=next(part for part in options.parts if unit.group == f"sever_{part}"),
            compat=self.sweep.compat,
            samples=noise.samples,
            sigma=resources.noise_level,
            seed=noise.seed,
        )
        return {"traces": pa.Table.from_batches(list(batches), schema=TRACE_SCHEMA)}

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        options, noise = self.options, self.sweep.noise
        states = as_states("hidden:1")
        spec = TraceSpec(states=states, samples=noise.samples, sigma=1.0, target=options.target, tokens=options.tokens)
        specs = [replace(spec, sever=part, compat=self.sweep.compat) for part in options.parts]
        flops, rows = np.sum([_restored(counts, options.facts, spec) for spec in specs], axis=0)
        return StageCost(units, float(flops), {"traces": float(rows)})


def _restored(counts: Counts, facts: int | None, spec: TraceSpec) -> tuple[float, float]:
    """FLOPs and rows of causal tracing."""
    tracing = CausalTracing(spec, counts.architecture.sizes.depth)

    def one(lengths: FactLengths) -> tuple[float, int]:
        trial, grid = tracing.trial(lengths.encoded(spec.target))
        return counts.planned(trial, tracing.samples), len(grid.run)

    return counts.added(facts, one)


class Zero(_Localization[ZeroSettings]):
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


class Gradients(_Localization[GradientSettings]):
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
