"""Connecting to a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
