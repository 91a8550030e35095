"""Workers on a Ray cluster, each with the model on a GPU of its own, or on some CPUs."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from causalcone.engine.errors import CausalconeError, ExperimentError
from causalcone.engine.facts import Fact
from causalcone.engine.memory import default_budget
from causalcone.runners.results.folder import ResultError, differences, versions
from causalcone.runners.results.store import LOCK, Store
from causalcone.runners.sweep.cluster.ray_connection import Share, connected_ray, share
from causalcone.runners.sweep.executor import Executor, Stop, UnitResult, first_line, run_unit
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Unit
from causalcone.runners.sweep.stages import as_sweep
from causalcone.runners.sweep.worker import ModelInfo, Worker

TRIES = 3
"""How many workers may end at one unit, and how many times a worker may fail to start."""
SEEN_SECONDS = 120.0
"""How long files of another machine may take to be seen here; network file systems cache that a file is missing."""

_ROOM_SECONDS = 60.0

T = TypeVar("T")
WorkerFactory = Callable[[Sweep, str], Worker]


@contextmanager
def executors(
    address: str | None, workers: int | None = None, make: WorkerFactory = Worker
) -> Iterator[Callable[[Sweep, str], Executor] | None]:
    """A function that makes a sweep's executor on the Ray cluster at an address; None, for this process alone, where
    there is no address. At the end the workers end.

    address: HOST:PORT; "auto" is the cluster that runs here or that RAY_ADDRESS names, or else one that is started on
    this machine; "local" is always the latter. make: of a worker, on its machine. Raises ``ExperimentError`` where Ray
    is missing or no cluster answers.
    """
    if address is None:
        if workers is not None:
            raise ExperimentError("--workers says how many work on a cluster; give --cluster local, auto or an address")
        yield None
        return
    with ExitStack() as stack:

        def connect(sweep: Sweep, place: str) -> Executor:
            ray = stack.enter_context(connected_ray(address, workers))
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            executor = RayExecutor(ray, sweep, place, share(machines, workers, sweep.device), make)
            stack.callback(executor.close)
            return executor

        yield connect


class RayExecutor:
    """Workers, each in a process of its own. One that ends is replaced, and its unit is computed again."""

    def __init__(self, ray: Any, sweep: Sweep, place: str, share: Share, make: WorkerFactory = Worker) -> None:
        self.ray, self.share, self.store = ray, share, Store.open(place)
        config = sweep.model_dump() | ({"device": "cuda"} if share.gpus else {})  # Ray shows each worker one GPU
        absolute = place if self.store.local is None else str(self.store.local)
        self._start_arguments = (make, config, absolute, os.getcwd(), share)
        self._first: WorkerStarted | None = None
        self._waits_since = time.monotonic()
        self._workers = [self._start(_WorkerHandle()) for _ in range(share.workers)]

    def model_info(self) -> ModelInfo:
        """That of the first worker that has started; the others must have the same model."""
        while self._first is None:
            for worker in self._finished():
                self._note_start(worker)
        return self._first.model

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]:
        ((_, result),) = self._calls("bad_facts", [tuple(facts)], Stop())
        if isinstance(result, _WorkerEnd):
            raise ExperimentError(f"the facts cannot be checked: {result.message}")
        return list(result)

    def run(self, units: Sequence[Unit], stop: Stop) -> Iterator[UnitResult]:
        for unit, result in self._calls("run", units, stop):
            if isinstance(result, _WorkerEnd):
                yield UnitResult(unit, 0.0, result.message)
                continue
            if result.reason is None:
                self._wait_for_files(unit)
            yield result

    def close(self) -> None:
        """End all workers at once."""
        for worker in self._workers:
            self._stop(worker)

    def _calls(self, method: str, arguments: Sequence[T], stop: Stop) -> Iterator[tuple[T, Any]]:
        """Yields arguments with results of a worker method, in any order; ``_WorkerEnd`` if it ended workers."""
        waiting, ends = deque(arguments), Counter[T]()
        while True:
            for worker in self._workers:
                if worker.free and waiting and not stop:
                    worker.argument = waiting.popleft()
                    worker.task = getattr(worker.actor, method).remote(worker.argument)
            if not any(worker.busy for worker in self._workers) and (stop or not waiting):
                return
            for worker in self._finished():
                if not worker.busy:
                    self._note_start(worker)
                    continue
                argument, result = worker.argument, self._result(worker)
                if isinstance(result, _WorkerEnd):
                    ends[argument] += 1
                    again = ends[argument] < TRIES
                    name = argument.name if isinstance(argument, Unit) else method
                    self._warn(
                        f"a worker on {worker.host} ended at {name}{', which is done again' * again}: {result.reason}"
                    )
                    self._start(worker)
                    if again:
                        waiting.append(argument)
                        continue
                yield argument, result

    def _finished(self) -> list[_WorkerHandle]:
        """Workers whose task is finished; none after a second, so that signals are handled."""
        tasks = {worker.task: worker for worker in self._workers if worker.task is not None}
        done, _ = self.ray.wait(list(tasks), num_returns=1, timeout=1.0)
        if any(worker.host for worker in self._workers):
            self._waits_since = time.monotonic()
        elif time.monotonic() - self._waits_since > _ROOM_SECONDS:
            self._waits_since = time.monotonic()
            self._warn("no worker has begun yet: the cluster may be busy, or the model takes long to read")
        return [tasks[task] for task in done]

    def _result(self, worker: _WorkerHandle) -> Any:
        """The result of a worker's task, after which it is free; ``_WorkerEnd`` if it ended. Raises the worker's
        ``CausalconeError``."""
        task, worker.task, worker.argument = worker.task, None, None
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CausalconeError):
                raise error.cause from None
            return _WorkerEnd(f"{type(error.cause).__name__}: {first_line(error.cause)}", worker.host)
        except self.ray.exceptions.RayError as error:
            return _WorkerEnd(_death(error), worker.host)

    def _note_start(self, worker: _WorkerHandle) -> None:
        """Note that a worker has started, or start it again if it could not."""
        try:
            started = self._result(worker)
        except CausalconeError as error:
            if self._first is None:
                raise
            started = _WorkerEnd(str(error), None)
        if isinstance(started, WorkerStarted):
            first = self._first = self._first or started
            if started.model.fingerprint == first.model.fingerprint:
                worker.host, worker.failures = started.host, 0
                if started.versions != first.versions:
                    changes = "; ".join(differences(first.versions, started.versions))
                    self._warn(f"{started.host} has other versions than {first.host}: {changes}")
                return
            started = _WorkerEnd(f"{started.host} has another model than {first.host} at the same path", started.host)
        worker.failures += 1
        if worker.failures < TRIES:
            self._start(worker)
            return
        self._stop(worker)
        self._workers.remove(worker)
        if not self._workers:
            raise ExperimentError(f"no worker can begin: {started.reason}")
        self._warn(f"a worker cannot begin, and {len(self._workers)} are left: {started.reason}")

    def _start(self, worker: _WorkerHandle) -> _WorkerHandle:
        """Start a worker, in place of the one that was there."""
        self._stop(worker)
        options = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "scheduling_strategy": "SPREAD"}
        actor = self.ray.remote(RayWorker).options(max_restarts=0, max_task_retries=0, **options)
        worker.actor, worker.host = actor.remote(), None
        worker.task = worker.actor.start.remote(*self._start_arguments)
        return worker

    def _stop(self, worker: _WorkerHandle) -> None:
        if worker.actor is not None:
            with suppress(Exception):  # it has ended, or its cluster has
                self.ray.kill(worker.actor)

    def _wait_for_files(self, unit: Unit) -> None:
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


@dataclass(frozen=True)
class WorkerStarted:
    """The answer of a worker that has read the model."""

    host: str
    model: ModelInfo
    versions: dict[str, str]


class RayWorker:
    """A worker in a process of its own, somewhere in a cluster."""

    def start(
        self, make: WorkerFactory, config: Mapping[str, Any], place: str, folder: str, share: Share
    ) -> WorkerStarted:
        """Read the model. Relative paths of the configuration are those of the driver's folder."""
        sweep = as_sweep(config)
        torch.set_num_threads(max(1, share.cpus))
        with suppress(OSError):  # without that folder, the errors of missing files name them
            os.chdir(folder)
        if sweep.memory is None and not share.gpus:
            memory = default_budget(torch.device("cpu")) // share.neighbours
            sweep = sweep.model_copy(update={"memory": memory})
        host, self.worker = socket.gethostname(), make(sweep, place)
        if not self.worker.store.exists(LOCK):
            raise ResultError(
                f"{place} is another folder on {host} than where the sweep was started; give a path that all "
                "machines share, or an object store"
            )
        return WorkerStarted(host, self.worker.model_info(), versions())

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]:
        return self.worker.bad_facts(facts)

    def run(self, unit: Unit) -> UnitResult:
        return run_unit(self.worker, unit)


@dataclass
class _WorkerHandle:
    """A worker as the driver sees it. task: its call under way, with the argument; host: its machine, once it has
    started; failures: how many times it could not start."""

    actor: Any = None
    task: Any = None
    argument: Any = None
    host: str | None = None
    failures: int = 0

    @property
    def free(self) -> bool:
        return self.host is not None and self.task is None

    @property
    def busy(self) -> bool:
        return self.host is not None and self.task is not None


@dataclass(frozen=True)
class _WorkerEnd:
    """The end of a worker, and why."""

    reason: str
    host: str | None

    @property
    def message(self) -> str:
        return (
            f"{TRIES} workers ended at it, the last on {self.host}: {self.reason}; if memory runs out, give the units "
            "fewer facts or edits (units.facts, units.edits), or take fewer workers"
        )


def _death(error: Exception) -> str:
    """The reason that Ray gives for a process's end."""
    line = (str(error).strip().splitlines() or ["no more is known"])[-1]
    detail = line.partition("Worker exit detail: ")[2] or line
    return detail.partition(" Some common causes")[0]
