"""How workers share the CPUs and GPUs of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from causalcone.engine.errors import ExperimentError


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
