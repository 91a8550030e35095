"""One stage of a sweep: all that driver, workers, forecast, status and analysis ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Generic, NamedTuple, TypeVar

import pyarrow as pa

from causalcone.engine.errors import CausalconeError, ExperimentError
from causalcone.engine.facts import Fact
from causalcone.runners.checked_files import CheckedTable
from causalcone.runners.sweep.inputs.resources import Resources
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Selection, Unit
from causalcone.runners.sweep.stages.counts import Counts

EFFICIENCY = 0.4
"""Of editing, of scoring, and of what models write: FLOPs / (seconds x the rate of matrix products). Like
``USUAL_EFFICIENCY``, of tracing, it was measured on two CPU cores with GPT-2's shape (bench/RESULTS.md): fine-tuning
reached less (29% and 15%), and a model too small to fill the cores does too. On a GPU it was not measured."""

FILE_BYTES = 2500
"""Of a Parquet file besides its rows, measured on a sweep of the demo model."""

Options = TypeVar("Options")


class ResultTable(NamedTuple):
    """A table that units write. row_bytes: of a row in zstd-compressed Parquet, measured on a sweep of the demo model,
    for forecasts."""

    name: str
    schema: pa.Schema
    row_bytes: float = 0


class Stage(ABC, Generic[Options]):
    """A stage of a sweep, constructed with its own table of the sweep's file.

    A stage of another package is a subclass with ``name``, ``title``, ``table``, ``tables`` and ``compute``, named in
    the entry-point group ``causalcone.sweep_stages``.

    Attributes:
        name: Its key in the sweep's file, and what the names of its units begin with.
        title: What tables and progress call it.
        table: The pydantic model of its table in the file. A key ``facts`` limits the facts that it takes.
        item: What its units have one or several of: "facts", "edits" or "files".
        tables: The tables that it writes, in the order in which a unit writes them.
        efficiency: Share of the device's rate of matrix products that is reached.
        required: Whether a unit that fails ends the sweep.
        expected: Folders of results, with what the analysis calls them where they are missing.
        needs: Names of the prepared stages whose files it reads: "noise", "contexts" and "moments".
        groups: Folders in its tables, each of which gets all facts.
        aggregate: The paraphrases and neighbours that scores are of, if it gives scores: "first" or "mean".
    """

    name: ClassVar[str]
    title: ClassVar[str]
    table: ClassVar[type[CheckedTable]]
    item: ClassVar[str] = "facts"
    efficiency: ClassVar[float] = EFFICIENCY
    required: ClassVar[bool] = False
    expected: ClassVar[Mapping[str, str]] = {}
    tables: tuple[ResultTable, ...] = ()
    needs: Sequence[str] = ()
    groups: Sequence[str] = ("",)
    aggregate: str | None = None

    def __init__(self, sweep: Sweep, options: Options) -> None:
        """Raises ``ExperimentError`` for options that are seen to be wrong without model and facts."""
        self.sweep, self.options = sweep, options

    def moment_layers(self, depth: int) -> Sequence[int]:
        """The layers that it needs second moments of, in a model of ``depth`` layers."""
        return ()

    def units(self, selection: Selection, depth: int) -> list[StageUnits]:
        """Its units. Raises ``ExperimentError`` for layers that a model of ``depth`` layers does not have."""
        facts = selection.known[: getattr(self.options, "facts", None)]
        units = [unit for group in self.groups for unit in self.cut(group, facts, self.sweep.units.facts)]
        return [StageUnits(self, self.title, tuple(units))] if units else []

    def cut(self, group: str, facts: Sequence[int], size: int, items: int = 1) -> list[Unit]:
        """Units of ``size`` facts one after the other, each fact giving ``items`` items."""
        tables = tuple(table.name for table in self.tables)
        parts = [tuple(facts[start : start + size]) for start in range(0, len(facts), size)]
        return [Unit(self.name, group, number, part, items * len(part), tables) for number, part in enumerate(parts)]

    def fact_check(self, resources: Resources) -> Callable[[Fact], object] | None:
        """A function that raises ``CausalconeError`` for a fact that the stage cannot use; nothing is computed."""
        return None

    @abstractmethod
    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        """The tables of a unit, by name."""

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        """The cost of units, counted on a model without weights. Raises ``ExperimentError`` for layers or states that
        the model does not have."""
        return StageCost(units)


@dataclass(frozen=True)
class StageUnits:
    """Units of a stage that are computed and shown together; subject: of which of a stage's several they are."""

    stage: Stage
    title: str
    units: tuple[Unit, ...]
    subject: str = ""

    @property
    def items(self) -> int:
        return sum(unit.items for unit in self.units)


@dataclass(frozen=True)
class StageCost:
    """The cost of units: FLOPs; and rows by table that they write, with the bytes of all else that they write."""

    work: StageUnits
    flops: float = 0
    rows: Mapping[str, float] = field(default_factory=dict)
    other_bytes: float = 0

    def hours(self, rate: float) -> float:
        """On a device whose matrix products run at ``rate`` FLOP/s."""
        return self.flops / (self.work.stage.efficiency * rate) / 3600

    @property
    def disk(self) -> float:
        """Bytes of results."""
        rows = sum(table.row_bytes * self.rows.get(table.name, 0) for table in self.work.stage.tables)
        return rows + FILE_BYTES * sum(len(unit.files) for unit in self.work.units) + self.other_bytes


@contextmanager
def errors_of(key: str) -> Iterator[None]:
    """Errors meanwhile are ``ExperimentError`` and begin with a key of the sweep's file."""
    try:
        yield
    except CausalconeError as error:
        raise ExperimentError(f"{key}: {error}") from error
