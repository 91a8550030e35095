"""Many machines: a crew of workers on a Ray cluster, each with the model on a GPU of its own, or on some CPUs."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from causalcone.engine.errors import CausalconeError, ExperimentError
from causalcone.engine.facts import Fact
from causalcone.runners.results.folder import ResultError, differences
from causalcone.runners.results.store import Store
from causalcone.runners.sweep.cluster.ray_connection import connected_ray
from causalcone.runners.sweep.cluster.ray_worker import Made, RayWorker, WorkerStarted
from causalcone.runners.sweep.cluster.resources import Share, share
from causalcone.runners.sweep.config import Sweep
from causalcone.runners.sweep.executor import Executor, UnitResult, first_line
from causalcone.runners.sweep.signals import Stop
from causalcone.runners.sweep.units import Unit
from causalcone.runners.sweep.worker import Description, Worker

TRIES = 3
"""So many workers may end at one unit, and a worker may begin so many times in vain."""
SEEN_SECONDS = 120.0
"""How long files of another machine may take to be seen here; network file systems keep what is not there in mind."""

_ROOM_SECONDS = 60.0

T = TypeVar("T")


@contextmanager
def crews(
    address: str | None, workers: int | None = None, make: Made = Worker
) -> Iterator[Callable[..., Executor] | None]:
    """What makes the crew of a sweep, on the cluster at an address; None, for this process alone, where there is no
    address. At the end the crew's workers end."""
    if address is None:
        if workers is not None:
            raise ExperimentError("--workers says how many work on a cluster; give --cluster local, auto or an address")
        yield None
        return
    with ExitStack() as stack:
        yield lambda sweep, place: stack.enter_context(connect(address, sweep, place, workers, make))


@contextmanager
def connect(
    address: str, sweep: Sweep, place: str, workers: int | None = None, make: Made = Worker
) -> Iterator[RayExecutor]:
    """A crew on the Ray cluster at ``address``, HOST:PORT. "auto" is the one that runs here or that RAY_ADDRESS names,
    or else one that is started on this machine; "local" is always the latter. make: of a worker, on its machine.

    Raises ``ExperimentError`` where Ray is missing or no cluster answers.
    """
    with connected_ray(address, workers) as ray:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cluster = RayExecutor(ray, sweep, place, share(machines, workers, sweep.device), make)
        try:
            yield cluster
        finally:
            cluster.close()


class RayExecutor:
    """A crew of workers, each in a process of its own. One that ends is replaced, and what it was at is done again."""

    def __init__(self, ray: Any, sweep: Sweep, place: str, share: Share, make: Made = Worker) -> None:
        self.ray, self.share, self.store = ray, share, Store.open(place)
        own = sweep.model_copy(update={"device": "cuda"}) if share.gpus else sweep  # Ray shows it one GPU
        absolute = place if self.store.local is None else str(self.store.local)
        self._made_of = (make, own, absolute, os.getcwd(), share)
        self._first: WorkerStarted | None = None
        self._waits_since = time.monotonic()
        self._hands = [self._hire(_WorkerHandle()) for _ in range(share.workers)]

    def describe(self) -> Description:
        """Of the first worker that has begun; the others must have the same model."""
        while self._first is None:
            for hand in self._ended():
                self._begin(hand)
        return self._first.description

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]:
        ((_, found),) = self._calls("bad_facts", [tuple(facts)], Stop())
        if isinstance(found, _WorkerLost):
            raise ExperimentError(f"the facts cannot be checked: {found.reason}")
        return list(found)

    def run(self, units: Sequence[Unit], stop: Stop) -> Iterator[UnitResult]:
        for unit, found in self._calls("carry_out", units, stop):
            if isinstance(found, _WorkerLost):
                yield UnitResult(unit, 0.0, found.reason)
                continue
            if found.reason is None:
                self._see(unit)
            yield found

    def close(self) -> None:
        """End all workers, whatever they are at."""
        for hand in self._hands:
            self._dismiss(hand)

    def _calls(self, method: str, arguments: Sequence[T], stop: Stop) -> Iterator[tuple[T, Any]]:
        """Yields arguments with results of a worker method, in any order; ``_WorkerLost`` if it ended workers."""
        waiting, ends = deque(arguments), Counter[T]()
        while True:
            for hand in self._hands:
                if hand.free and waiting and not stop:
                    hand.ask(method, waiting.popleft())
            if not any(hand.busy for hand in self._hands) and (stop or not waiting):
                return
            for hand in self._ended():
                if not hand.busy:
                    self._begin(hand)
                    continue
                argument, found = hand.argument, self._found(hand)
                if isinstance(found, _WorkerLost):
                    ends[argument] += 1
                    again = ends[argument] < TRIES
                    name = argument.name if isinstance(argument, Unit) else method
                    self._warn(f"a worker on {hand.host} ended at {name}{', which is done again' * again}: {found.why}")
                    self._hire(hand)
                    if again:
                        waiting.append(argument)
                        continue
                yield argument, found

    def _ended(self) -> list[_WorkerHandle]:
        """Workers that have done what they were at; none after a second, so that signals are heard."""
        tasks = {hand.task: hand for hand in self._hands if hand.task is not None}
        done, _ = self.ray.wait(list(tasks), num_returns=1, timeout=1.0)
        if any(hand.host for hand in self._hands):
            self._waits_since = time.monotonic()
        elif time.monotonic() - self._waits_since > _ROOM_SECONDS:
            self._waits_since = time.monotonic()
            self._warn("no worker has begun yet: the cluster may be busy, or the model takes long to read")
        return [tasks[task] for task in done]

    def _found(self, hand: _WorkerHandle) -> Any:
        """The result of a worker, which is free afterwards; ``_WorkerLost`` if it ended. Raises the worker's
        ``CausalconeError``."""
        task, hand.task, hand.argument = hand.task, None, None
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CausalconeError):
                raise error.cause from None
            return _WorkerLost(f"{type(error.cause).__name__}: {first_line(error.cause)}", hand.host)
        except self.ray.exceptions.RayError as error:
            return _WorkerLost(_death(error), hand.host)

    def _begin(self, hand: _WorkerHandle) -> None:
        """Note that a worker has begun; have it begin again where it could not."""
        try:
            begun = self._found(hand)
        except CausalconeError as error:
            if self._first is None:
                raise
            begun = _WorkerLost(str(error), None)
        if isinstance(begun, WorkerStarted):
            first = self._first = self._first or begun
            if begun.description.fingerprint == first.description.fingerprint:
                hand.host, hand.vain = begun.host, 0
                if begun.versions != first.versions:
                    told = "; ".join(differences(first.versions, begun.versions))
                    self._warn(f"{begun.host} has other versions than {first.host}: {told}")
                return
            begun = _WorkerLost(f"{begun.host} has another model than {first.host} at the same path", begun.host)
        hand.vain += 1
        if hand.vain < TRIES:
            self._hire(hand)
            return
        self._dismiss(hand)
        self._hands.remove(hand)
        if not self._hands:
            raise ExperimentError(f"no worker can begin: {begun.why}")
        self._warn(f"a worker cannot begin, and {len(self._hands)} are left: {begun.why}")

    def _hire(self, hand: _WorkerHandle) -> _WorkerHandle:
        """Put a worker that begins in the place of the one that was there."""
        self._dismiss(hand)
        options = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "scheduling_strategy": "SPREAD"}
        hired = self.ray.remote(RayWorker).options(max_restarts=0, max_task_retries=0, **options)
        hand.actor, hand.host = hired.remote(), None
        hand.task = hand.actor.begin.remote(*self._made_of)
        return hand

    def _dismiss(self, hand: _WorkerHandle) -> None:
        if hand.actor is not None:
            with suppress(Exception):  # it has ended, or its cluster has
                self.ray.kill(hand.actor)

    def _see(self, unit: Unit) -> None:
        """Wait until the files of a unit that was done elsewhere are seen here."""
        until = time.monotonic() + SEEN_SECONDS
        while unit.parts(self.store) is None:
            if time.monotonic() > until:
                raise ResultError(
                    f"{unit.name} was computed, and its files are not in {self.store.place} as this machine sees it; "
                    "give a path that all machines share, or an object store"
                )
            time.sleep(1.0)

    def _warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=3)


@dataclass
class _WorkerHandle:
    """A worker as the driver sees it. task: what it is at, of which argument; host: where it is, once it has begun;
    vain: how many times it could not."""

    actor: Any = None
    task: Any = None
    argument: Any = None
    host: str | None = None
    vain: int = 0

    @property
    def free(self) -> bool:
        return self.host is not None and self.task is None

    @property
    def busy(self) -> bool:
        return self.host is not None and self.task is not None

    def ask(self, method: str, argument: Any) -> None:
        self.task, self.argument = getattr(self.actor, method).remote(argument), argument


@dataclass(frozen=True)
class _WorkerLost:
    """That a worker ended, and why."""

    why: str
    host: str | None

    @property
    def reason(self) -> str:
        return (
            f"{TRIES} workers ended at it, the last on {self.host}: {self.why}; if memory runs out, give the units "
            "fewer facts or edits (units.facts, units.edits), or take fewer workers"
        )


def _death(error: Exception) -> str:
    """In a few words, why Ray says that a process ended."""
    line = (str(error).strip().splitlines() or ["no more is known"])[-1]
    detail = line.partition("Worker exit detail: ")[2] or line
    return detail.partition(" Some common causes")[0]
