"""Experiments on many facts: plans their passes, runs them, and hands out each fact's results once complete."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.errors import CausalconeError, MemoryBudgetError, ModelError
from causalcone.engine.memory import out_of_memory
from causalcone.engine.models.base import Architecture
from causalcone.engine.plan.buffers import Buffers
from causalcone.engine.plan.compiler import compile_plan
from causalcone.engine.plan.cone import Shape
from causalcone.engine.plan.cost import Footprint
from causalcone.engine.plan.interventions import Experiment
from causalcone.engine.plan.plan import Plan
from causalcone.engine.run.forward import PassResult, run_pass
from causalcone.engine.run.forward_autograd import run_gradient_pass
from causalcone.engine.run.packing import Group
from causalcone.engine.run.scheduler import Budget, PlanCache, PlannedPart, TrialPart, assemble, split
from causalcone.kernels.backends import TORCH, Backends
from causalcone.kernels.transfer import ahead, fetch

MAX_CELLS = 2**18
"""Runs x tokens of what is compiled at once; a fact with more is split before."""


def passes_ahead(device: torch.device) -> int:
    """How many passes a device is given before the results of the first are waited for: it computes one while the host
    prepares the next. A CPU is done when the host goes on."""
    return 1 if device.type == "cuda" else 0


@dataclass(frozen=True, eq=False)
class Trial:
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


Finish = Callable[[], Iterable[tuple[TrialPart, Result]]]
"""Waits for a pass and hands out its results."""


@dataclass(kw_only=True)
class PassRunner:
    """Runs ``trials`` with ``samples`` noise samples in ``dtype`` on ``device``.

    noise: the noise of a span of n tokens, for a range of samples (``NoiseStream``). plans: may be kept from run
    to run. backends: of passes without gradient.
    """

    architecture: Architecture
    trials: Sequence[Trial]
    samples: int
    noise: Callable[[int, range], np.ndarray]
    dtype: torch.dtype
    device: torch.device
    plans: PlanCache
    gradient: bool = False
    backends: Backends = TORCH

    def plan(self, part: TrialPart) -> tuple[Plan, Footprint]:
        trial, architecture = self.trials[part.fact], self.architecture

        def make() -> tuple[Plan, Footprint]:
            experiment = trial.experiment.subset(part.branches)
            plan = compile_plan(trial.shape, experiment, architecture.sizes.depth, architecture.parallel)
            footprint = Footprint.of_gradient if self.gradient else Footprint.of
            return plan, footprint(plan, architecture.sizes, self.dtype.itemsize)

        return self.plans.get((trial.shape, trial.experiment.digest, part.branches), make)

    def parts(self) -> Iterator[TrialPart]:
        """Each fact whole, but for those too large to be compiled at once."""
        for index, trial in enumerate(self.trials):
            branches = trial.experiment.branches
            step = max(1, MAX_CELLS // trial.shape.tokens)
            for first in range(0, max(1, branches), step):
                yield TrialPart(index, range(self.samples), range(first, min(first + step, branches)))

    def passes(
        self, budget: Budget, parts: Iterable[TrialPart] | None = None
    ) -> Iterator[tuple[list[PlannedPart], int]]:
        """Passes of consecutive facts, or of parts of large ones, each with its predicted peak of bytes."""
        return assemble(
            self.parts() if parts is None else parts, self.plan, budget, lambda index: self.trials[index].name
        )

    def results(self, budget: Budget) -> Iterator[tuple[int, Result]]:
        """The number of each trial in order, with its result."""
        collected, space, most = _TrialResults(self), Buffers(self.dtype, self.device), passes_ahead(self.device)
        running: deque[Finish] = deque()
        try:
            for finish in self._begin_all(budget, space):
                running.append(finish)
                del finish  # what a pass gave hangs on it
                if len(running) > most:
                    yield from collected.add_all(running.popleft()())
        except CausalconeError:  # what is computed is handed out all the same
            yield from collected.add_all(chain.from_iterable(finish() for finish in running))
            raise
        yield from collected.add_all(chain.from_iterable(finish() for finish in running))

    def check_smallest(self, budget: Budget) -> None:
        """Refuse, before anything is computed, what does not fit even one sample of one run at a time."""
        distinct: dict[tuple[Shape, bytes], int] = {}
        for number, trial in enumerate(self.trials):
            distinct.setdefault((trial.shape, trial.experiment.digest), number)
        for number in distinct.values():
            smallest = TrialPart(number, range(1), range(min(1, self.trials[number].experiment.branches)))
            deque(self.passes(budget, [smallest]), maxlen=0)

    def _begin_all(self, budget: Budget, space: Buffers) -> Iterator[Finish]:
        """Begin every pass; where memory runs out after all, two smaller ones in its place."""
        for planned, peak in ahead(self.passes(budget), self.device, 1):
            pending, room = [planned], max(1.0, budget.for_rows / max(1, peak - budget.fixed))
            while pending:
                current, begun = pending.pop(), []
                try:
                    begun.append(self._begin(current, budget, space, room))
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    halves = split([part for part, _ in current])
                    if halves is None:
                        name = self.trials[current[0].part.fact].name
                        raise MemoryBudgetError(
                            f"memory ran out on fact {name!r} even one restoration at a time; free some memory, or use "
                            "a smaller dtype"
                        ) from error
                    pending += [[PlannedPart(part, self.plan(part)[0]) for part in half] for half in reversed(halves)]
                if begun:
                    yield begun.pop()
                else:  # the error and the tensors that it held are gone by now
                    room = 1.0
                    space.clear()
                    if self.device.type == "cuda":
                        torch.cuda.empty_cache()

    def _begin(self, planned: list[PlannedPart], budget: Budget, space: Buffers, room: float) -> Finish:
        """Give the device a pass to compute, for which there is ``room`` times the memory that it needs. The results
        are fetched after it, and waited for when they are asked for."""
        by_plan: dict[tuple[int, range, bool], tuple[Plan, list[TrialPart]]] = {}
        for part, plan in planned:
            key = (id(plan), part.samples, bool(self.trials[part.fact].targets))
            by_plan.setdefault(key, (plan, []))[1].append(part)
        noise = lru_cache(maxsize=None)(self.noise)  # the groups of a pass share it
        groups = [self._group(plan, members, noise) for plan, members in by_plan.values()]
        members = [members for _, members in by_plan.values()]
        if self.gradient:
            done = self._differentiate(members, groups, budget)
            return lambda: done
        fetched = fetch(*run_pass(self.architecture, groups, budget.tiles, space, self.backends, room))

        def finish() -> Iterator[tuple[TrialPart, Result]]:
            for parts_of, results in zip(members, PassResult(*fetched.wait()).by_group(groups), strict=True):
                for part, log_p, states, logits in zip(parts_of, *results, strict=True):
                    yield part, Result(log_p.sum(-1).numpy(), states, logits, {})

        return finish

    def _differentiate(
        self, members: list[list[TrialPart]], groups: list[Group], budget: Budget
    ) -> list[tuple[TrialPart, Result]]:
        leaves_of = [tuple(tuple(map(_leaf, of_fact)) for of_fact in group.vectors) for group in groups]
        groups = [replace(group, vectors=vectors) for group, vectors in zip(groups, leaves_of, strict=True)]
        leaves = [leaf for vectors in leaves_of for of_fact in vectors for leaf in of_fact]
        with torch.inference_mode(False), torch.enable_grad():
            by_group = run_gradient_pass(self.architecture, groups, budget.tiles, self.dtype, self.device)
            log_p = [values.sum(-1) for values in by_group]
            total = torch.stack([values.sum() for values in log_p]).sum()
            depends = total.requires_grad  # not where nothing read out depends on any vector
            slopes = torch.autograd.grad(total, leaves, allow_unused=True) if depends else (None,) * len(leaves)
        gradients = iter(slopes)
        results = []
        for group, parts, values in zip(groups, members, log_p, strict=True):
            nothing = torch.empty(group.samples, 0, 0)
            for part, vectors, of_fact in zip(parts, group.vectors, values, strict=True):
                of_vectors = enumerate(islice(gradients, len(vectors)))
                used = {number: gradient.cpu() for number, gradient in of_vectors if gradient is not None}
                results.append((part, Result(of_fact.detach().cpu().numpy(), nothing, nothing, used)))
        return results

    def _group(self, plan: Plan, parts: list[TrialPart], noise: Callable[[int, range], np.ndarray]) -> Group:
        trials = [self.trials[part.fact] for part in parts]
        samples, shape = parts[0].samples, trials[0].shape
        start, end = shape.noised
        padded = [[[*ids, *[0] * (shape.tokens - len(ids))] for ids in trial.prompts] for trial in trials]  # never read
        return Group(
            plan=plan,
            tokens=np.array(padded),
            targets=np.array([trial.targets for trial in trials]) if trials[0].targets else None,
            noise=noise(end - start, samples),
            vectors=tuple(
                tuple(vector[samples.start : samples.stop] if vector.dim() == 2 else vector for vector in trial.vectors)
                for trial in trials
            ),
        )


class _TrialResults:
    """Results of parts, put together per fact and handed out in the facts' order."""

    def __init__(self, runner: PassRunner) -> None:
        self.runner = runner
        self.next = 0
        self.results: dict[int, Result] = {}
        self.missing: dict[int, int] = {}

    def add_all(self, results: Iterable[tuple[TrialPart, Result]]) -> Iterator[tuple[int, Result]]:
        """Put results of a pass to those that are there; hands out the facts that are complete."""
        for part, result in results:
            self.add(part, result)
            del result  # the results of a whole pass hang on those of one part
        yield from self.complete()

    def add(self, part: TrialPart, result: Result) -> None:
        trial = self.runner.trials[part.fact]
        experiment, samples = trial.experiment, slice(part.samples.start, part.samples.stop)
        if not np.isfinite(result.log_p).all():
            raise ModelError(
                f"fact {trial.name!r}: probabilities are not finite in {self.runner.dtype}; compute in float32 or "
                "bfloat16"
            )
        J = self.runner.samples
        if part.fact not in self.results:
            states = result.states.new_empty(J, len(experiment.captures), result.states.shape[-1])
            logits = result.logits.new_empty(J, len(experiment.logits), result.logits.shape[-1])
            self.results[part.fact] = Result(np.empty((J, len(experiment.base))), states, logits, {})
            self.missing[part.fact] = J * max(1, experiment.branches)
        whole = self.results[part.fact]
        runs, captures, read = experiment.indices_of(part.branches)
        whole.log_p[samples, runs] = result.log_p
        whole.states[samples, captures] = result.states
        whole.logits[samples, read] = result.logits
        for number, gradient in result.gradients.items():
            whole.gradients.setdefault(number, gradient.new_zeros(J, gradient.shape[1]))[samples] += gradient
        self.missing[part.fact] -= len(part.samples) * max(1, len(part.branches))

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
