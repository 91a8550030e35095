"""One trace of many facts: plans its passes, runs them, and hands out each fact's results when they are complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from causalcone.engine.branches import Branches, choose_tokens, restoration_branches
from causalcone.engine.cone import Shape
from causalcone.engine.errors import MemoryBudgetError, ModelError
from causalcone.engine.facts import EncodedFact
from causalcone.engine.interventions import State, restorations
from causalcone.engine.layout import Group
from causalcone.engine.models.base import Architecture
from causalcone.engine.noise import standard_noise
from causalcone.engine.passes import Budget, Footprint, Part, PlanCache, assemble, split
from causalcone.engine.plan import Plan, compile_plan
from causalcone.engine.wave import run_pass
from causalcone.engine.workspace import Workspace

BASE_RUNS = 2
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class TraceSpec:
    """The checked arguments of a trace, with the noise level as a number."""

    states: tuple[State, ...]
    samples: int
    sigma: float
    seed: int
    target: str
    tokens: str | tuple[int, ...]


@dataclass
class TraceJob:
    """Traces ``facts`` as ``spec`` says, in ``dtype`` on ``device``; ``plans`` may be kept from job to job."""

    architecture: Architecture
    facts: list[EncodedFact]
    spec: TraceSpec
    dtype: torch.dtype
    device: torch.device
    plans: PlanCache
    _branches: dict[tuple, Branches] = field(default_factory=dict)

    def branches(self, fact: EncodedFact) -> Branches:
        """The fact's branch runs and table rows; facts of one shape share them."""
        tokens = choose_tokens(self.spec.tokens, len(fact.prompt), fact.span)
        key = (tokens, fact.span[0])
        if key not in self._branches:
            depth = self.architecture.sizes.depth
            self._branches[key] = restoration_branches(self.spec.states, depth, fact.span[0], tokens)
        return self._branches[key]

    def plan(self, part: Part) -> tuple[Plan, Footprint]:
        fact = self.facts[part.fact]
        prompt = len(fact.prompt)
        shape = Shape(len(fact.tokens), fact.span, (prompt - 1, len(fact.tokens)))
        tokens = choose_tokens(self.spec.tokens, prompt, fact.span)
        sizes = self.architecture.sizes

        def make() -> tuple[Plan, Footprint]:
            windows = self.branches(fact).windows[part.branches.start : part.branches.stop]
            plan = compile_plan(shape, restorations(windows), sizes.depth)
            return plan, Footprint.of(plan, sizes, self.dtype.itemsize)

        return self.plans.get((shape, self.spec.states, tokens, part.branches), make)

    def passes(self, budget: Budget) -> Iterator[tuple[list[Part], int]]:
        """Passes of consecutive facts, or of parts of large ones, each with its predicted peak of bytes."""
        whole = (
            Part(index, range(self.spec.samples), range(len(self.branches(fact).windows)))
            for index, fact in enumerate(self.facts)
        )
        return assemble(whole, lambda part: self.plan(part)[1], budget, lambda index: self.facts[index].fact.id)

    def results(self, budget: Budget) -> Iterator[tuple[EncodedFact, Branches, np.ndarray]]:
        """Each fact in order, with its branches and the target's log-probability (samples, runs) float64."""
        collected = _Collected(self)
        space = Workspace(self.dtype, self.device)
        for parts, _ in self.passes(budget):
            for done, log_p in self._run(parts, budget, space):
                collected.add(done, log_p)
            yield from collected.complete()

    def _run(self, parts: list[Part], budget: Budget, space: Workspace) -> Iterator[tuple[Part, np.ndarray]]:
        """Run a pass; where memory runs out after all, run it as two smaller ones."""
        pending = [parts]
        while pending:
            current = pending.pop()
            try:
                done = self._run_once(current, budget, space)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                done, halves = [], split(current)
                if halves is None:
                    name = self.facts[current[0].fact].fact.id
                    raise MemoryBudgetError(
                        f"memory ran out on fact {name!r} even one restoration at a time; free some memory, or use a "
                        "smaller dtype"
                    ) from error
                pending += reversed(halves)
            if not done:  # the error and the tensors that it held are gone by now
                space.clear()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            yield from done

    def _run_once(self, parts: list[Part], budget: Budget, space: Workspace) -> list[tuple[Part, np.ndarray]]:
        plans = [self.plan(part)[0] for part in parts]  # held, since the cache may drop them at any time
        members: dict[tuple[int, range], list[int]] = {}
        for index, (part, plan) in enumerate(zip(parts, plans, strict=True)):
            members.setdefault((id(plan), part.samples), []).append(index)
        groups = [self._group(plans[group[0]], [parts[index] for index in group]) for group in members.values()]
        log_p = run_pass(self.architecture, groups, budget.tiles, space)
        return [
            (parts[index], values)
            for group, of_facts in zip(members.values(), log_p, strict=True)
            for index, values in zip(group, of_facts.sum(-1).cpu().numpy(), strict=True)
        ]

    def _group(self, plan: Plan, parts: list[Part]) -> Group:
        facts = [self.facts[part.fact] for part in parts]
        start, end = facts[0].span
        spec, hidden = self.spec, self.architecture.sizes.hidden
        samples = parts[0].samples
        noise = standard_noise(spec.seed, spec.samples, end - start, hidden)[samples.start : samples.stop]
        return Group(
            plan=plan,
            tokens=torch.tensor([fact.tokens for fact in facts]),
            targets=torch.tensor([fact.target for fact in facts]) if facts[0].target else None,
            noise=torch.from_numpy(spec.sigma * noise),
        )


class _Collected:
    """Results of parts, put together per fact and handed out in the facts' order."""

    def __init__(self, job: TraceJob) -> None:
        self.job = job
        self.next = 0
        self.log_p: dict[int, np.ndarray] = {}
        self.missing: dict[int, int] = {}

    def add(self, part: Part, log_p: np.ndarray) -> None:
        branches = len(self.job.branches(self.job.facts[part.fact]).windows)
        if part.fact not in self.log_p:
            self.log_p[part.fact] = np.empty((self.job.spec.samples, BASE_RUNS + branches))
            self.missing[part.fact] = self.job.spec.samples * max(1, branches)
        if not np.isfinite(log_p).all():
            raise ModelError(
                f"fact {self.job.facts[part.fact].fact.id!r}: probabilities are not finite in {self.job.dtype}; "
                "compute in float32 or bfloat16"
            )
        whole = self.log_p[part.fact]
        samples = slice(part.samples.start, part.samples.stop)
        whole[samples, :BASE_RUNS] = log_p[:, :BASE_RUNS]
        whole[samples, BASE_RUNS + part.branches.start : BASE_RUNS + part.branches.stop] = log_p[:, BASE_RUNS:]
        self.missing[part.fact] -= len(part.samples) * max(1, len(part.branches))

    def complete(self) -> Iterator[tuple[EncodedFact, Branches, np.ndarray]]:
        while self.missing.get(self.next) == 0:
            fact = self.job.facts[self.next]
            del self.missing[self.next]
            yield fact, self.job.branches(fact), self.log_p.pop(self.next)
            self.next += 1


def _out_of_memory(error: BaseException) -> bool:
    """CPU allocators raise a plain RuntimeError; the words differ by platform."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)
