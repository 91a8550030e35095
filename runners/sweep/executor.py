"""Executors of units: here the worker of this process, which ``cluster`` has many of; they end when they are asked to,
after the unit that is running, or at once when they are asked again."""

import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from causalcone.engine.errors import CausalconeError
from causalcone.engine.facts import Fact
from causalcone.engine.memory import out_of_memory
from causalcone.runners.results.folder import ResultError
from causalcone.runners.sweep.inputs.units import Unit
from causalcone.runners.sweep.worker import ModelInfo, Worker


class Stop:
    """Whether the sweep is to end; ``signal`` says by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@dataclass(frozen=True)
class UnitResult:
    """The seconds that a unit took, or the reason why it failed, and where in the code."""

    unit: Unit
    seconds: float
    reason: str | None = None
    trace: str | None = None


class Executor(Protocol):
    """Carries out units, in any order; no unit begins once ``stop`` is set."""

    def model_info(self) -> ModelInfo: ...

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]: ...

    def run(self, units: Sequence[Unit], stop: Stop) -> Iterator[UnitResult]: ...


class LocalExecutor:
    """One worker in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.model_info, self.bad_facts = worker, worker.model_info, worker.bad_facts

    def run(self, units: Sequence[Unit], stop: Stop) -> Iterator[UnitResult]:
        for unit in units:
            if stop:
                return
            yield run_unit(self.worker, unit)


def run_unit(worker: Worker, unit: Unit) -> UnitResult:
    """Computes a unit. An error of the computation is the unit's result; results that cannot be written end the sweep
    (``ResultError``)."""
    try:
        return UnitResult(unit, worker.run(unit))
    except ResultError:
        raise
    except Exception as error:  # whatever it is, the other units of the night go on
        kind = "memory ran out" if out_of_memory(error) else type(error).__name__
        reason = str(error) if isinstance(error, CausalconeError) else f"{kind}: {first_line(error)}"
        return UnitResult(unit, 0.0, reason, traceback.format_exc())


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or ["no more is known"])[0]


@contextmanager
def stopping(tell: Callable[[str], None]) -> Iterator[Stop]:
    """A ``Stop`` that interruptions (Ctrl-C, SIGTERM) set; the second one ends what is running."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.signal = number
        tell("stopping after what is running now; once more to stop at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
