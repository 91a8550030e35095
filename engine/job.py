"""Experiments on many facts: plans their passes, runs them, and hands out each fact's results once complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.compiling import compile_plan
from causalcone.engine.cone import Shape
from causalcone.engine.cost import Footprint
from causalcone.engine.errors import MemoryBudgetError, ModelError
from causalcone.engine.gradient_wave import run_gradient_pass
from causalcone.engine.interventions import Experiment
from causalcone.engine.layout import Group
from causalcone.engine.memory import out_of_memory
from causalcone.engine.models.base import Architecture
from causalcone.engine.passes import Budget, Part, PlanCache, assemble, split
from causalcone.engine.plan import Plan
from causalcone.engine.wave import run_pass
from causalcone.engine.workspace import Workspace
from causalcone.kernels.backends import TORCH, Backends

MAX_CELLS = 2**18
"""Runs x tokens of what is compiled at once; a fact with more is split before."""


@dataclass(frozen=True, eq=False)
class Case:
    """One fact and the experiment on it.

    name: for messages; prompts: the token ids that run through the model, prompt by prompt; targets: ids of the target,
    none where it is the clean run's most likely token; vectors: the given ones, each (width,), or (samples, width).
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    targets: tuple[int, ...]
    shape: Shape
    experiment: Experiment
    vectors: tuple[Tensor, ...] = ()

    @property
    def padded(self) -> list[list[int]]:
        """The prompts at one length; what is added is never read."""
        return [[*prompt, *[0] * (self.shape.tokens - len(prompt))] for prompt in self.prompts]


@dataclass(frozen=True)
class Result:
    """What an experiment gave for one fact.

    log_p (J, R) float64: the target's log-probability in each sample of each run; states (J, captures, hidden): the
    captured values; logits (J, n, vocabulary); gradients: of the sum of log p over all runs, by each of the given
    vectors, (J, width); none unless asked for.
    """

    log_p: np.ndarray
    states: Tensor
    logits: Tensor
    gradients: dict[int, Tensor]


@dataclass
class Job:
    """Runs ``cases`` with ``samples`` noise samples in ``dtype`` on ``device``.

    noise: the noise of a span of so many tokens, for a range of samples (``NoiseStream``). plans: may be kept from job
    to job. backends: of passes without gradient.
    """

    architecture: Architecture
    cases: Sequence[Case]
    samples: int
    noise: Callable[[int, range], np.ndarray]
    dtype: torch.dtype
    device: torch.device
    plans: PlanCache
    gradient: bool = False
    backends: Backends = TORCH

    def plan(self, part: Part) -> tuple[Plan, Footprint]:
        case, architecture = self.cases[part.fact], self.architecture

        def make() -> tuple[Plan, Footprint]:
            experiment = case.experiment.part(part.branches)
            plan = compile_plan(case.shape, experiment, architecture.sizes.depth, architecture.parallel)
            footprint = Footprint.of_gradient if self.gradient else Footprint.of
            return plan, footprint(plan, architecture.sizes, self.dtype.itemsize)

        return self.plans.get((case.shape, case.experiment.digest, part.branches), make)

    def parts(self) -> Iterator[Part]:
        """Each fact whole, but for those too large to be compiled at once."""
        for index, case in enumerate(self.cases):
            branches = case.experiment.branches
            step = max(1, MAX_CELLS // case.shape.tokens)
            for first in range(0, max(1, branches), step):
                yield Part(index, range(self.samples), range(first, min(first + step, branches)))

    def passes(self, budget: Budget) -> Iterator[tuple[list[Part], int]]:
        """Passes of consecutive facts, or of parts of large ones, each with its predicted peak of bytes."""
        return assemble(self.parts(), lambda part: self.plan(part)[1], budget, lambda index: self.cases[index].name)

    def results(self, budget: Budget) -> Iterator[tuple[int, Result]]:
        """The number of each case in order, with its result."""
        self._check_smallest(budget)
        collected = _Collected(self)
        space = Workspace(self.dtype, self.device)
        for parts, _ in self.passes(budget):
            for done, outcome in self._run(parts, budget, space):
                collected.add(done, outcome)
                del outcome  # the results of a whole pass hang on those of one part
            yield from collected.complete()

    def _check_smallest(self, budget: Budget) -> None:
        """Refuse, before anything is computed, what does not fit even one sample of one run at a time."""
        known = set()
        for index, case in enumerate(self.cases):
            key = (case.shape, case.experiment.digest)
            if key not in known:
                known.add(key)
                smallest = Part(index, range(1), range(min(1, case.experiment.branches)))
                for _ in assemble([smallest], lambda part: self.plan(part)[1], budget, lambda i: self.cases[i].name):
                    pass

    def _run(self, parts: list[Part], budget: Budget, space: Workspace) -> Iterator[tuple[Part, Result]]:
        """Run a pass; where memory runs out after all, run it as two smaller ones."""
        pending = [parts]
        while pending:
            current = pending.pop()
            try:
                done = self._run_once(current, budget, space)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                done, halves = [], split(current)
                if halves is None:
                    name = self.cases[current[0].fact].name
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

    def _run_once(self, parts: list[Part], budget: Budget, space: Workspace) -> list[tuple[Part, Result]]:
        plans = [self.plan(part)[0] for part in parts]  # held, since the cache may drop them at any time
        members: dict[tuple[int, range, bool], list[int]] = {}
        for index, (part, plan) in enumerate(zip(parts, plans, strict=True)):
            labelled = bool(self.cases[part.fact].targets)
            members.setdefault((id(plan), part.samples, labelled), []).append(index)
        groups = [self._group(plans[group[0]], [parts[index] for index in group]) for group in members.values()]
        if self.gradient:
            return self._differentiate(parts, list(members.values()), groups, budget)
        outcomes = run_pass(self.architecture, groups, budget.tiles, space, self.backends)
        done = []
        for group, outcome in zip(members.values(), outcomes, strict=True):
            log_p, states, logits = outcome.log_p.sum(-1).cpu().numpy(), outcome.states.cpu(), outcome.logits.cpu()
            done += [(parts[index], Result(log_p[i], states[i], logits[i], {})) for i, index in enumerate(group)]
        return done

    def _differentiate(
        self, parts: list[Part], members: list[list[int]], groups: list[Group], budget: Budget
    ) -> list[tuple[Part, Result]]:
        groups = [
            replace(group, vectors=tuple(tuple(_leaf(v) for v in own) for own in group.vectors)) for group in groups
        ]
        leaves = [vector for group in groups for own in group.vectors for vector in own]
        with torch.inference_mode(False), torch.enable_grad():
            by_group = run_gradient_pass(self.architecture, groups, budget.tiles, self.dtype, self.device)
            log_p = [values.sum(-1) for values in by_group]
            total = torch.stack([values.sum() for values in log_p]).sum()
            depends = total.requires_grad  # not where nothing read out depends on any vector
            found = torch.autograd.grad(total, leaves, allow_unused=True) if depends else (None,) * len(leaves)
        gradients = iter(found)
        done = []
        for group, indices, values in zip(groups, members, log_p, strict=True):
            nothing = torch.empty(group.samples, 0, 0)
            for index, own, of_fact in zip(indices, group.vectors, values, strict=True):
                of_vectors = enumerate(islice(gradients, len(own)))
                used = {number: gradient.cpu() for number, gradient in of_vectors if gradient is not None}
                done.append((parts[index], Result(of_fact.detach().cpu().numpy(), nothing, nothing, used)))
        return done

    def _group(self, plan: Plan, parts: list[Part]) -> Group:
        cases = [self.cases[part.fact] for part in parts]
        samples = parts[0].samples
        start, end = cases[0].shape.noised
        return Group(
            plan=plan,
            tokens=torch.tensor([case.padded for case in cases]),
            targets=torch.tensor([case.targets for case in cases]) if cases[0].targets else None,
            noise=torch.from_numpy(self.noise(end - start, samples)),
            vectors=tuple(
                tuple(each[samples.start : samples.stop] if each.dim() == 2 else each for each in case.vectors)
                for case in cases
            ),
        )


class _Collected:
    """Results of parts, put together per fact and handed out in the facts' order."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.next = 0
        self.results: dict[int, Result] = {}
        self.missing: dict[int, int] = {}

    def add(self, part: Part, own: Result) -> None:
        case = self.job.cases[part.fact]
        experiment, samples = case.experiment, slice(part.samples.start, part.samples.stop)
        if not np.isfinite(own.log_p).all():
            raise ModelError(
                f"fact {case.name!r}: probabilities are not finite in {self.job.dtype}; compute in float32 or bfloat16"
            )
        if part.fact not in self.results:
            self.results[part.fact] = self._empty(experiment, own)
            self.missing[part.fact] = self.job.samples * max(1, experiment.branches)
        whole = self.results[part.fact]
        runs, captures, logits = experiment.kept(part.branches)
        whole.log_p[samples, runs] = own.log_p
        whole.states[samples, captures] = own.states
        whole.logits[samples, logits] = own.logits
        for number, gradient in own.gradients.items():
            empty = gradient.new_empty(self.job.samples, gradient.shape[1])
            whole.gradients.setdefault(number, empty)[samples] = gradient
        self.missing[part.fact] -= len(part.samples) * max(1, len(part.branches))

    def _empty(self, experiment: Experiment, part: Result) -> Result:
        J = self.job.samples
        states = part.states.new_empty(J, len(experiment.captures), part.states.shape[-1])
        logits = part.logits.new_empty(J, len(experiment.logits), part.logits.shape[-1])
        return Result(np.empty((J, len(experiment.base))), states, logits, {})

    def complete(self) -> Iterator[tuple[int, Result]]:
        while self.missing.get(self.next) == 0:
            del self.missing[self.next]
            yield self.next, self.results.pop(self.next)
            self.next += 1


def _leaf(vector: Tensor) -> Tensor:
    """The vector as a start of gradients, whatever mode it was made in."""
    with torch.inference_mode(False):
        plain = vector.clone() if vector.is_inference() else vector
        return plain.detach().requires_grad_()
