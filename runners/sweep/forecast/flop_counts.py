"""What the stages of a sweep take, counted on a model without weights: nothing is computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from causalcone.engine.edit.moments.collect import TOKENS_PER_COMPONENT
from causalcone.engine.edit.requests.requests import FACT_FORCING, TRACING_REVERSAL
from causalcone.engine.edit.requests.windows import as_windows
from causalcone.engine.edit.runs.flops import Asked, EditWork, Flops, Grown
from causalcone.engine.edit.scoring.sampled_texts import ESSENCE_TEXTS, TEXT_TOKENS
from causalcone.engine.edit.texts.contexts import MEMIT_TOKENS, MEMIT_WORDS, ROME_TOKENS
from causalcone.engine.edit.texts.recall import COMPLETION_TOKENS
from causalcone.engine.errors import ExperimentError
from causalcone.engine.localize.causal_tracing import CausalTracing, Zeroing, target_tokens
from causalcone.engine.localize.gradients import runs_along
from causalcone.engine.localize.options import TraceSpec, ZeroSpec, choose_tokens
from causalcone.engine.localize.states import State, as_states, states_in
from causalcone.engine.models.base import Architecture
from causalcone.engine.plan.cone import Shape
from causalcone.engine.plan.cost import cost
from causalcone.engine.plan.interventions import SITES
from causalcone.engine.run.runner import PassRunner, Trial
from causalcone.engine.run.scheduler import PlanCache
from causalcone.runners.edits.settings import Setting
from causalcone.runners.sweep import units
from causalcone.runners.sweep.config import GradientSettings, Sweep
from causalcone.runners.sweep.forecast.facts import PlannedFacts, Weighted
from causalcone.runners.sweep.forecast.lengths import FactLengths
from causalcone.runners.sweep.units import Chosen, Stage, edit_layers, filter_stage, later_stages, moment_layers

PLANNED = 24
"""Shapes of facts that are planned one by one; of more, as many typical ones."""

_ESSENCE_END = 2
"""Tokens of the essence prompt behind the subject: "is a"."""


@dataclass(frozen=True)
class StageCost:
    """What a stage takes: FLOPs; and rows by table that it writes, with the bytes of what else it writes."""

    stage: Stage
    flops: float = 0
    rows: dict[str, float] | None = None
    other_bytes: float = 0


@dataclass(frozen=True)
class Counting:
    """A sweep on a model without weights. known: how many facts pass the filter, all of them where that is None."""

    sweep: Sweep
    architecture: Architecture
    facts: PlannedFacts
    known: int | None = None

    def __post_init__(self) -> None:
        if self.known is not None and not 1 <= self.known <= self.facts.count:
            raise ExperimentError(f"--known is {self.known}; give 1 to {self.facts.count}, as many as there are facts")

    def stages(self) -> list[StageCost]:
        """All stages, in the order in which they are carried out. Raises ``ExperimentError`` for layers or states that
        the model does not have."""
        going = tuple(range(self.facts.count if self.known is None else self.known))
        first = filter_stage(self.sweep, self.facts.count)
        later = later_stages(self.sweep, Chosen(going, going), self.architecture.sizes.depth)
        count: dict[str, Callable[[Stage], StageCost]] = {
            units.NOISE: StageCost,
            units.CONTEXTS: self._contexts,
            units.MOMENTS: self._moments,
            units.TRACE: self._trace,
            units.SEVER: self._sever,
            units.ZERO: self._zero,
            units.GRADIENTS: self._gradients,
            units.EDIT: self._edit,
        }
        return [self._filter(first), *(count[stage.name](stage) for stage in later)]

    @cached_property
    def flops(self) -> Flops:
        return Flops(self.architecture.sizes)

    def _some(self, count: int | None) -> Weighted:
        """The lengths of so many of the facts that go on, of all by default."""
        going = self.facts.count if self.known is None else self.known
        return self.facts.some(going if count is None else min(count, going), first=self.known is None)

    # --- what is prepared once ---

    def _filter(self, stage: Stage) -> StageCost:
        own = self.facts.some(self.facts.count, first=True)
        asked = Asked.total((Asked.after(each.prompt, [each.target]), weight) for each, weight in own)
        flops = self.flops.unedited(asked)
        if self.sweep.filter.completes:
            said = Grown.total((Grown(1, each.prompt, COMPLETION_TOKENS), weight) for each, weight in own)
            flops += self.flops.decoding(said)
        return StageCost(stage, flops, {"filter": stage.items, "facts": stage.items})

    def _contexts(self, stage: Stage) -> StageCost:
        if self.sweep.contexts is not None:
            return StageCost(stage)
        lengths = (*ROME_TOKENS, *(MEMIT_TOKENS,) * len(MEMIT_WORDS))  # of which the first token is there
        return StageCost(stage, self.flops.decoding(Grown(len(lengths), len(lengths), sum(lengths) - len(lengths))))

    def _moments(self, stage: Stage) -> StageCost:
        """Matrices are kept in float32, of float64 models in float64."""
        sizes, choice = self.architecture.sizes, self.sweep.moments
        layers = moment_layers(self.sweep, sizes.depth)
        kept = len(layers) * sizes.inner**2 * (8 if self.sweep.dtype == "float64" else 4)
        if choice.file is not None:
            return StageCost(stage, other_bytes=kept)
        tokens = choice.tokens if isinstance(choice.tokens, int) else TOKENS_PER_COMPONENT * sizes.inner
        return StageCost(stage, self.flops.moments(tokens, layers), other_bytes=kept)

    # --- localization ---

    def _trace(self, stage: Stage) -> StageCost:
        own, noise = self.sweep.trace, self.sweep.noise
        assert own is not None
        spec = TraceSpec(
            states=self._states("trace", own.states),
            samples=noise.samples,
            sigma=1.0,
            target=own.target,
            tokens=own.tokens,
        )
        return self._restored(stage, self._some(own.facts), spec)

    def _sever(self, stage: Stage) -> StageCost:
        own, noise = self.sweep.sever, self.sweep.noise
        assert own is not None
        states = as_states("hidden:1")
        spec = TraceSpec(states=states, samples=noise.samples, sigma=1.0, target=own.target, tokens=own.tokens)
        parts = [
            self._restored(stage, self._some(own.facts), replace(spec, sever=part, compat=self.sweep.compat))
            for part in own.parts
        ]
        rows = sum((part.rows or {})["traces"] for part in parts)
        return StageCost(stage, sum(part.flops for part in parts), {"traces": rows})

    def _restored(self, stage: Stage, facts: Weighted, spec: TraceSpec) -> StageCost:
        restoring = CausalTracing(spec, self.architecture.sizes.depth)

        def one(lengths: FactLengths) -> tuple[float, int]:
            trial, grid = restoring.trial(lengths.encoded(spec.target))
            return self._planned(trial, restoring.samples), len(grid.run)

        flops, rows = _added(facts, one)
        return StageCost(stage, flops, {"traces": rows})

    def _zero(self, stage: Stage) -> StageCost:
        own = self.sweep.zero
        assert own is not None
        spec = ZeroSpec(states=self._states("zero", own.states), target=own.target, tokens=own.tokens)
        zeroing = Zeroing(spec, self.architecture.sizes.depth)

        def one(lengths: FactLengths) -> tuple[float, int]:
            trial, grid = zeroing.trial(lengths.encoded(own.target))
            return self._planned(trial, 1), len(grid.run)

        flops, rows = _added(self._some(own.facts), one)
        return StageCost(stage, flops, {"traces": rows})

    def _gradients(self, stage: Stage) -> StageCost:
        own = self.sweep.gradients
        assert own is not None
        flops, rows = _added(self._some(own.facts), lambda lengths: self._integrated(lengths, own))
        return StageCost(stage, flops, {"gradients": rows})

    def _integrated(self, lengths: FactLengths, own: GradientSettings) -> tuple[float, int]:
        """The clean run, whose states are kept; then every state's points and its baseline, forwards and back, which
        takes as much again since weights have no gradient."""
        fact = lengths.encoded(own.target)
        axes = (
            [SITES.index(kind) for kind in own.kinds],
            np.arange(self.architecture.sizes.depth),
            choose_tokens(own.tokens, len(fact.prompt), fact.span),
        )
        at = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        read = target_tokens(fact)
        case = Trial("", (fact.tokens,), fact.target, Shape(len(fact.tokens), (0, 0), (read,)), runs_along(at))
        clean = self.flops.unedited(Asked(len(fact.tokens), len(fact.tokens), len(read)))
        return clean + 2 * self._planned(case, own.steps + 1, gradient=True), len(at)

    def _states(self, stage: str, states: Sequence[str]) -> tuple[State, ...]:
        try:
            return states_in(as_states(states), self.architecture.sizes.heads)
        except ExperimentError as error:
            raise ExperimentError(f"{stage}.states: {error}") from error

    def _planned(self, case: Trial, samples: int, gradient: bool = False) -> float:
        """FLOPs of the engine's own plan, where memory does not split the fact."""
        nothing: Any = None  # noise is drawn when a pass runs
        job = PassRunner(
            architecture=self.architecture,
            trials=[case],
            samples=samples,
            noise=nothing,
            dtype=torch.float32,
            device=torch.device("cpu"),
            plans=PlanCache(),
            gradient=gradient,
        )
        sizes, argmax = self.architecture.sizes, not case.targets
        return sum(cost(job.plan(part)[0], sizes, 1, samples, argmax).flops for part in job.parts())

    # --- editing ---

    def _edit(self, stage: Stage) -> StageCost:
        edit, problem = self.sweep.edit, stage.units[0].problem
        assert edit is not None
        assert problem is not None
        editing = EditCounts(self, problem, self._some(edit.facts))
        flops = editing.before() + sum(editing.made(each) + editing.scored(each) for each in editing.settings)
        return StageCost(stage, flops, editing.rows(stage.items))


class EditCounts:
    """The edits of facts in one problem."""

    def __init__(self, counting: Counting, problem: str, facts: Weighted) -> None:
        assert counting.sweep.edit is not None
        self.sweep, self.edit, self.flops = counting.sweep, counting.sweep.edit, counting.flops
        self.problem, self.facts = problem, facts
        self.sizes = counting.architecture.sizes
        self.settings = self.sweep.plan(problem).settings
        self.layers = edit_layers(self.sweep, problem, self.sizes.depth)
        published = self.sweep.compat == "published"
        self.targets = [lengths.targets(problem, published) for lengths, _ in facts]
        self.published = published

    def before(self) -> float:
        """What the unedited model writes, once for every fact: the target in Tracing Reversal, with noise and without;
        in the first problem, essence texts."""
        flops = 0.0
        if self.problem == TRACING_REVERSAL:
            said = Grown.total((Grown(1, each.prompt, each.said), weight) for each, weight in self.facts)
            flops += self.flops.decoding(said) * (1 if self.published else 2)
        if self.edit.essence and self.problem == self.edit.problems[0]:
            begun = ((each.essence + _ESSENCE_END, weight * ESSENCE_TEXTS) for each, weight in self.facts)
            flops += self.flops.decoding(Grown.total((self._grown(tokens), times) for tokens, times in begun))
        return flops

    def made(self, setting: Setting) -> float:
        """Edits of all facts at all layers."""
        definition = setting.definition
        work = EditWork(
            flops=self.flops,
            windows=self.windows(setting),
            searched=self._total(lambda each, target, other: each.searched(definition.contexts, target)),
            trained=self._total(lambda each, target, other: Asked.after(each.prompt, [target])),
            noisy=self.problem == FACT_FORCING,
        )
        return definition.flops(work, setting.hparams)

    def scored(self, setting: Setting) -> float:
        """Answers, and where asked for what is written, before and after every edit."""
        windows, last = self.windows(setting), self.sizes.depth - 1
        rank: float | None = setting.definition.rank
        if rank is not None and setting.definition.joint:
            rank *= sum(weight for _, weight in self.facts)
        asked = self._total(lambda each, target, other: self._asked(each, target, other))
        flops = self.flops.unedited(asked, whole=any(window[0] == last for window in windows))
        flops += sum(self.flops.edited(asked, window, rank) for window in windows)
        if self.edit.generates(self.problem):
            texts = Grown.total((self._grown(n), weight) for each, weight in self.facts for n in each.generation)
            flops += self.flops.decoding(texts)
            flops += sum(self.flops.decoding(texts, len(window), rank) for window in windows)
        return flops

    def rows(self, edits: int) -> dict[str, float]:
        """Rows by table, of so many edits: metrics are two of each kind of prompt, its accuracy, and the others."""
        count = sum(weight for _, weight in self.facts)
        prompts = sum((1 + len(each.asked)) * weight for each, weight in self.facts) / count
        kinds = 3 if prompts > 1 else 1
        written = 1 + (self.edit.references is not None) if self.edit.generates(self.problem) else 0
        metrics = self.edit.essence + kinds * (2 + self.edit.accuracy) + written
        return {"edits": edits, "probes": edits * prompts, "metrics": edits * metrics}

    def windows(self, setting: Setting) -> list[tuple[int, ...]]:
        return [window.layers for window in as_windows(self.layers, setting.window, self.sizes.depth)]

    def _asked(self, lengths: FactLengths, target: int, other: int | None) -> Asked:
        parts = [(lengths.answers(target, other), 1)]
        if self.edit.essence:
            parts.append((Asked.after(1, [self._text_tokens - 1]), ESSENCE_TEXTS))
        asked = Asked.total(parts)
        return replace(asked, distinct=asked.distinct * (1 + self.edit.accuracy))  # logits are computed once more

    def _grown(self, tokens: int) -> Grown:
        return Grown(1, tokens, max(0, self._text_tokens - tokens))

    @property
    def _text_tokens(self) -> int:
        return min(TEXT_TOKENS, self.sizes.positions)

    def _total(self, of: Callable[[FactLengths, int, int | None], Any]) -> Any:
        """The sum over all facts."""
        found = [(of(each, *both), weight) for (each, weight), both in zip(self.facts, self.targets, strict=True)]
        return type(found[0][0]).total(found)


def _added(facts: Weighted, one: Callable[[FactLengths], tuple[float, int]]) -> tuple[float, float]:
    """FLOPs and rows of all facts together, from those of one."""
    found = [(one(lengths), weight) for lengths, weight in grouped(facts, PLANNED)]
    return sum(flops * weight for (flops, _), weight in found), sum(rows * weight for (_, rows), weight in found)


def grouped(facts: Weighted, most: int) -> Weighted:
    """Facts that a plan takes for one put together; where these are more than ``most`` groups, so many, of which each
    has about as many facts, and their middle one's lengths."""
    weights: dict[tuple[int, ...], float] = defaultdict(float)
    like: dict[tuple[int, ...], FactLengths] = {}
    for lengths, weight in facts:
        start, end = lengths.span
        key = (lengths.prompt - start, lengths.prompt, end, lengths.target)  # what counts most comes first
        weights[key] += weight
        like.setdefault(key, lengths)
    ordered = sorted(weights)
    if len(ordered) <= most:
        return [(like[key], weights[key]) for key in ordered]
    shares = np.array([weights[key] for key in ordered], dtype=np.float64)
    middle = np.cumsum(shares) - shares / 2
    group = np.minimum(most - 1, (middle * most / shares.sum()).astype(np.int64))
    found = []
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        centre = members[np.searchsorted(np.cumsum(shares[members]), shares[members].sum() / 2)]
        found.append((like[ordered[centre]], float(shares[members].sum())))
    return found
