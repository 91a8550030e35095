"""What runs in the process of a worker, somewhere in a cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from causalcone.engine.facts import Fact
from causalcone.engine.memory import default_budget
from causalcone.runners.results.folder import ResultError, versions
from causalcone.runners.results.store import LOCK
from causalcone.runners.sweep.cluster.resources import Share
from causalcone.runners.sweep.config import Sweep
from causalcone.runners.sweep.executor import UnitResult, carried_out
from causalcone.runners.sweep.units import Unit
from causalcone.runners.sweep.worker import Description, Worker

Made = Callable[[Sweep, str], Worker]


@dataclass(frozen=True)
class WorkerStarted:
    """What a worker says when it has begun."""

    host: str
    description: Description
    versions: dict[str, str]


class RayWorker:
    """A worker in its process, somewhere in the cluster."""

    def begin(self, make: Made, sweep: Sweep, place: str, folder: str, share: Share) -> WorkerStarted:
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
        return WorkerStarted(host, self.worker.describe(), versions())

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]:
        return self.worker.bad_facts(facts)

    def carry_out(self, unit: Unit) -> UnitResult:
        return carried_out(self.worker, unit)
