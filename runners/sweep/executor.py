"""Who carries out units: the worker of this process, alone. ``cluster`` has many."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from causalcone.engine.errors import CausalconeError
from causalcone.engine.facts import Fact
from causalcone.engine.memory import out_of_memory
from causalcone.runners.results.folder import ResultError
from causalcone.runners.sweep.signals import Stop
from causalcone.runners.sweep.units import Unit
from causalcone.runners.sweep.worker import Description, Worker


@dataclass(frozen=True)
class UnitResult:
    """What became of a unit: the seconds it took, or the reason why it failed, and where in the code."""

    unit: Unit
    seconds: float
    reason: str | None = None
    trace: str | None = None


class Executor(Protocol):
    """Carries out units, in any order; no unit begins once ``stop`` is set."""

    def describe(self) -> Description: ...

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]: ...

    def run(self, units: Sequence[Unit], stop: Stop) -> Iterator[UnitResult]: ...


class LocalExecutor:
    """A crew of one, in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def describe(self) -> Description:
        return self.worker.describe()

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]:
        return self.worker.bad_facts(facts)

    def run(self, units: Sequence[Unit], stop: Stop) -> Iterator[UnitResult]:
        for unit in units:
            if stop:
                return
            yield carried_out(self.worker, unit)


def carried_out(worker: Worker, unit: Unit) -> UnitResult:
    """A unit's outcome. What it cannot compute is a failure of its own; where results cannot be written, that ends the
    sweep (``ResultError``)."""
    try:
        return UnitResult(unit, worker.run(unit))
    except ResultError:
        raise
    except Exception as error:  # whatever it is, the other units of the night go on
        what = "memory ran out" if out_of_memory(error) else type(error).__name__
        told = str(error) if isinstance(error, CausalconeError) else f"{what}: {first_line(error)}"
        return UnitResult(unit, 0.0, told, traceback.format_exc())


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or ["no more is known"])[0]
