"""Many machines: a crew of workers on a Ray cluster, each with the model on a GPU of its own, or on some CPUs."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from causalcone.engine.errors import CausalconeError, ExperimentError
from causalcone.engine.facts import Fact
from causalcone.engine.memory import default_budget
from causalcone.runners.results import ResultError, differences, versions
from causalcone.runners.sweep.config import Sweep
from causalcone.runners.sweep.crew import Crew, Outcome, carried_out, first_line
from causalcone.runners.sweep.stopping import Stop
from causalcone.runners.sweep.store import LOCK, Store
from causalcone.runners.sweep.units import Unit
from causalcone.runners.sweep.work import Description, Worker

AUTO, LOCAL = "auto", "local"
TRIES = 3
"""So many workers may end at one unit, and a worker may begin so many times in vain."""
SEEN_SECONDS = 120.0
"""How long files of another machine may take to be seen here; network file systems keep what is not there in mind."""

_ANSWER_SECONDS = 10.0
_ROOM_SECONDS = 60.0
_OBJECT_BYTES = 2**27  # results go through files; what Ray holds is small
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}  # the latter: shows no log line

Made = Callable[[Sweep, str], Worker]
T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What each of ``workers`` gets of a cluster: so many CPUs (0 where GPUs come with none) and GPUs (1 or 0). room:
    how many fit in now; neighbours: how many there are on a machine at most."""

    workers: int
    cpus: int
    gpus: int
    room: int
    neighbours: int


def share(machines: Sequence[Mapping[str, float]], workers: int | None, device: str | None) -> Share:
    """How ``workers`` share machines of so many "CPU" and "GPU": by default one to a GPU, or to two CPUs where there
    is none. Raises ``ExperimentError`` where a GPU is asked for, and no machine has one."""
    on_gpus = [machine for machine in machines if machine.get("GPU", 0) >= 1 and device != "cpu"]
    if on_gpus:
        gpus = [int(machine["GPU"]) for machine in on_gpus]
        cpus = min(int(machine.get("CPU", 0)) // number for machine, number in zip(on_gpus, gpus, strict=True))
        return Share(workers or sum(gpus), cpus, 1, sum(gpus), max(gpus))
    if device is not None and device.startswith("cuda"):
        raise ExperimentError(f"the sweep's device is {device!r}, and no machine of the cluster has a GPU")
    cores = [int(machine.get("CPU", 0)) for machine in machines]

    def room(cpus: int) -> int:
        return sum(number // cpus for number in cores)

    if workers is None:
        cpus = 2 if room(2) else 1
        workers = max(1, room(cpus))
    else:
        cpus = max((each for each in range(1, max(cores, default=0) + 1) if room(each) >= workers), default=1)
    return Share(workers, cpus, 0, room(cpus), max(1, min(workers, max(cores, default=0) // cpus)))


@contextmanager
def crews(address: str | None, workers: int | None = None, make: Made = Worker) -> Iterator[Callable[..., Crew] | None]:
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
) -> Iterator[Cluster]:
    """A crew on the Ray cluster at ``address``, HOST:PORT. "auto" is the one that runs here or that RAY_ADDRESS names,
    or else one that is started on this machine; "local" is always the latter. make: of a worker, on its machine.

    Raises ``ExperimentError`` where Ray is missing or no cluster answers.
    """
    with _ray(address, workers) as ray:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cluster = Cluster(ray, sweep, place, share(machines, workers, sweep.device), make)
        try:
            yield cluster
        finally:
            cluster.close()


class Cluster:
    """A crew of workers, each in a process of its own. One that ends is replaced, and what it was at is done again."""

    def __init__(self, ray: Any, sweep: Sweep, place: str, share: Share, make: Made = Worker) -> None:
        self.ray, self.share, self.store = ray, share, Store.open(place)
        own = sweep.model_copy(update={"device": "cuda"}) if share.gpus else sweep  # Ray shows it one GPU
        absolute = place if self.store.local is None else str(self.store.local)
        self._made_of = (make, own, absolute, os.getcwd(), share)
        self._first: _Begun | None = None
        self._waits_since = time.monotonic()
        self._hands = [self._hire(_Hand()) for _ in range(share.workers)]

    def describe(self) -> Description:
        """Of the first worker that has begun; the others must have the same model."""
        while self._first is None:
            for hand in self._ended():
                self._begin(hand)
        return self._first.description

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]:
        ((_, found),) = self._calls("bad_facts", [tuple(facts)], Stop())
        if isinstance(found, _Lost):
            raise ExperimentError(f"the facts cannot be checked: {found.reason}")
        return list(found)

    def run(self, units: Sequence[Unit], stop: Stop) -> Iterator[Outcome]:
        for unit, found in self._calls("carry_out", units, stop):
            if isinstance(found, _Lost):
                yield Outcome(unit, 0.0, found.reason)
                continue
            if found.reason is None:
                self._see(unit)
            yield found

    def close(self) -> None:
        """End all workers, whatever they are at."""
        for hand in self._hands:
            self._dismiss(hand)

    def _calls(self, method: str, arguments: Sequence[T], stop: Stop) -> Iterator[tuple[T, Any]]:
        """What a method of some worker gives for each argument, in any order; ``_Lost`` for one that ended workers."""
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
                if isinstance(found, _Lost):
                    ends[argument] += 1
                    again = ends[argument] < TRIES
                    name = argument.name if isinstance(argument, Unit) else method
                    self._warn(f"a worker on {hand.host} ended at {name}{', which is done again' * again}: {found.why}")
                    self._hire(hand)
                    if again:
                        waiting.append(argument)
                        continue
                yield argument, found

    def _ended(self) -> list[_Hand]:
        """Workers that have done what they were at; none after a second, so that signals are heard."""
        tasks = {hand.task: hand for hand in self._hands if hand.task is not None}
        done, _ = self.ray.wait(list(tasks), num_returns=1, timeout=1.0)
        if any(hand.host for hand in self._hands):
            self._waits_since = time.monotonic()
        elif time.monotonic() - self._waits_since > _ROOM_SECONDS:
            self._waits_since = time.monotonic()
            self._warn("no worker has begun yet: the cluster may be busy, or the model takes long to read")
        return [tasks[task] for task in done]

    def _found(self, hand: _Hand) -> Any:
        """What a worker found, which is free then; ``_Lost`` where it ended. Raises the ``CausalconeError`` that it
        met."""
        task, hand.task, hand.argument = hand.task, None, None
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CausalconeError):
                raise error.cause from None
            return _Lost(f"{type(error.cause).__name__}: {first_line(error.cause)}", hand.host)
        except self.ray.exceptions.RayError as error:
            return _Lost(_death(error), hand.host)

    def _begin(self, hand: _Hand) -> None:
        """Note that a worker has begun; have it begin again where it could not."""
        try:
            begun = self._found(hand)
        except CausalconeError as error:
            if self._first is None:
                raise
            begun = _Lost(str(error), None)
        if isinstance(begun, _Begun):
            first = self._first = self._first or begun
            if begun.description.fingerprint == first.description.fingerprint:
                hand.host, hand.vain = begun.host, 0
                if begun.versions != first.versions:
                    told = "; ".join(differences(first.versions, begun.versions))
                    self._warn(f"{begun.host} has other versions than {first.host}: {told}")
                return
            begun = _Lost(f"{begun.host} has another model than {first.host} at the same path", begun.host)
        hand.vain += 1
        if hand.vain < TRIES:
            self._hire(hand)
            return
        self._dismiss(hand)
        self._hands.remove(hand)
        if not self._hands:
            raise ExperimentError(f"no worker can begin: {begun.why}")
        self._warn(f"a worker cannot begin, and {len(self._hands)} are left: {begun.why}")

    def _hire(self, hand: _Hand) -> _Hand:
        """Put a worker that begins in the place of the one that was there."""
        self._dismiss(hand)
        options = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "scheduling_strategy": "SPREAD"}
        hired = self.ray.remote(_Hired).options(max_restarts=0, max_task_retries=0, **options)
        hand.actor, hand.host = hired.remote(), None
        hand.task = hand.actor.begin.remote(*self._made_of)
        return hand

    def _dismiss(self, hand: _Hand) -> None:
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
class _Hand:
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
class _Lost:
    """That a worker ended, and why."""

    why: str
    host: str | None

    @property
    def reason(self) -> str:
        return (
            f"{TRIES} workers ended at it, the last on {self.host}: {self.why}; if memory runs out, give the units "
            "fewer facts or edits (units.facts, units.edits), or take fewer workers"
        )


@dataclass(frozen=True)
class _Begun:
    """What a worker says when it has begun."""

    host: str
    description: Description
    versions: dict[str, str]


class _Hired:
    """A worker in its process, somewhere in the cluster."""

    def begin(self, make: Made, sweep: Sweep, place: str, folder: str, share: Share) -> _Begun:
        """Read the model. Relative paths of the configuration are those of the driver's folder."""
        torch.set_num_threads(max(1, share.cpus))
        with suppress(OSError):  # where there is no such folder, files that are missing are told by name
            os.chdir(folder)
        if sweep.memory is None and not share.gpus:
            memory = default_budget(torch.device("cpu")) // share.neighbours
            sweep = sweep.model_copy(update={"memory": memory})
        host = socket.gethostname()
        self.worker = make(sweep, place)
        if not self.worker.store.exists(LOCK):
            raise ResultError(
                f"{place} is another folder on {host} than where the sweep was started; give a path that all "
                "machines share, or an object store"
            )
        return _Begun(host, self.worker.describe(), versions())

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]:
        return self.worker.bad_facts(facts)

    def carry_out(self, unit: Unit) -> Outcome:
        return carried_out(self.worker, unit)


@contextmanager
def _ray(address: str, workers: int | None) -> Iterator[Any]:
    """Ray, connected to a cluster meanwhile; one that was connected before is used, and left."""
    with _environment():
        try:
            import ray
        except ImportError:
            raise ExperimentError("--cluster needs Ray: pip install 'causalcone[cluster]'") from None
        begun = not ray.is_initialized()
        if begun:
            _initialize(ray, address, workers)
    try:
        yield ray
    finally:
        if begun:
            ray.shutdown()


@contextmanager
def _environment() -> Iterator[None]:
    """Ray reports nothing to its makers, shows no logs, and leaves SIGTERM to us."""
    missing = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)
        for name in missing:
            del os.environ[name]


def _initialize(ray: Any, address: str, workers: int | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    given = os.environ.get("RAY_ADDRESS") if address == AUTO else address
    known = given or _noted()
    if address != LOCAL and known is not None and (given or _answers(known)):
        try:
            _check_answer(known)  # Ray itself tries for many minutes
            ray.init(address=known, **quiet)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise ExperimentError(
                f"no Ray cluster can be used at {known}: {first_line(error)}; give HOST:PORT of its head (and "
                "RAY_AUTH_MODE=token where it asks for a token), or --cluster local"
            ) from error
        return
    if address != LOCAL:
        warnings.warn("no Ray cluster is running here; one is started on this machine", stacklevel=2)
    more = workers if workers is not None and workers > (os.cpu_count() or 1) else None
    ray.init(address=LOCAL, num_cpus=more, include_dashboard=False, object_store_memory=_OBJECT_BYTES, **quiet)


def _answers(address: str) -> bool:
    try:
        _check_answer(address)
    except (OSError, ValueError):
        return False
    return True


def _noted() -> str | None:
    """Where the cluster is that "ray start" last started on this machine, or joined."""
    try:
        return (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return None


def _check_answer(address: str) -> None:
    """Raise ``OSError`` or ``ValueError`` where nobody listens."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()


def _death(error: Exception) -> str:
    """In a few words, why Ray says that a process ended."""
    line = (str(error).strip().splitlines() or ["no more is known"])[-1]
    detail = line.partition("Worker exit detail: ")[2] or line
    return detail.partition(" Some common causes")[0]
