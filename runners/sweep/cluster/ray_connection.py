"""Connecting to a Ray cluster, or starting one on this machine, and sharing its CPUs and GPUs among workers."""

import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalcone.engine.errors import ExperimentError
from causalcone.runners.sweep.executor import first_line

AUTO, LOCAL = "auto", "local"

_ANSWER_SECONDS = 10.0
_OBJECT_BYTES = 2**27  # results go through files; what Ray holds is small
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}  # the latter: shows no log line


@contextmanager
def connected_ray(address: str, workers: int | None) -> Iterator[Any]:
    """Ray, connected to a cluster meanwhile; one that was connected before is used, and left."""
    with _environment():
        try:
            import ray
        except ImportError:
            raise ExperimentError("--cluster needs Ray: pip install 'causalcone[cluster]'") from None
        starts = not ray.is_initialized()
        if starts:
            _initialize(ray, address, workers)
    try:
        yield ray
    finally:
        if starts:
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
    """Raise ``OSError`` or ``ValueError`` where nothing listens."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()


@dataclass(frozen=True)
class Share:
    """The CPUs (0 where GPUs come with none) and GPUs (1 or 0) that each of ``workers`` gets of a cluster. room: how
    many workers fit in now; neighbours: the most that are on one machine."""

    workers: int
    cpus: int
    gpus: int
    room: int
    neighbours: int


def share(machines: Sequence[Mapping[str, float]], workers: int | None, device: str | None) -> Share:
    """How ``workers`` share machines with their numbers of "CPU" and "GPU": by default one to a GPU, or to two CPUs
    where there is none. Raises ``ExperimentError`` where a GPU is asked for, and no machine has one."""
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
        cpus = max((count for count in range(1, max(cores, default=0) + 1) if room(count) >= workers), default=1)
    return Share(workers, cpus, 0, room(cpus), max(1, min(workers, max(cores, default=0) // cpus)))
