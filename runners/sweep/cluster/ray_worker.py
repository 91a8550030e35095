"""A worker in its process, somewhere in a cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from causalcone.engine.facts import Fact
from causalcone.engine.memory import default_budget
from causalcone.runners.results.folder import ResultError, versions
from causalcone.runners.results.store import LOCK
from causalcone.runners.sweep.cluster.ray_connection import Share
from causalcone.runners.sweep.executor import UnitResult, run_unit
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Unit
from causalcone.runners.sweep.stages import as_sweep
from causalcone.runners.sweep.worker import ModelInfo, Worker

WorkerFactory = Callable[[Sweep, str], Worker]


@dataclass(frozen=True)
class WorkerStarted:
    """The answer of a worker that has read the model."""

    host: str
    model: ModelInfo
    versions: dict[str, str]


class RayWorker:
    """The methods that the driver calls."""

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
        host = socket.gethostname()
        self.worker = make(sweep, place)
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
