"""The progress of a sweep, from its folder alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from causalcone.analysis.tables.names import counted
from causalcone.runners.results.folder import ResultError
from causalcone.runners.results.store import Store
from causalcone.runners.sweep.driver import RUN, RUNNING
from causalcone.runners.sweep.inputs.facts_table import FACTS, select
from causalcone.runners.sweep.inputs.units import FAILURES, LEFT_OUT
from causalcone.runners.sweep.stages import FilterStage, StageUnits, as_sweep, later_units, stages_of

INTERRUPTED = "interrupted (the same command goes on)"
"""What a sweep is whose process was killed: its record says that it runs, but nobody holds the folder."""


@dataclass(frozen=True)
class Progress:
    """Items of a stage that are done, and that failed; how many of its units are done, and the seconds that these took
    together."""

    work: StageUnits
    done: int
    failed: int
    units: int
    seconds: float


@dataclass(frozen=True)
class Status:
    """stages: those that can be known by now, the first first; failures: how many units for which reason; left_out: how
    many facts for which reason; later: whether more stages follow when the filter is done."""

    place: str
    status: str
    begun: str
    stages: Sequence[Progress]
    failures: Counter[str]
    left_out: Counter[str]
    later: bool

    def show(self, console: Console) -> None:
        table = Table(title=f"{self.place}: {self.status}, begun {self.begun}", title_justify="left")
        for column in ("stage", "done", "of", "failed", "seconds", "rate"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for progress in self.stages:
            work, done, seconds = progress.work, progress.done, progress.seconds
            rate = f"{done / seconds:.2f} {work.stage.item}/s" if seconds and done else ""
            failed = str(progress.failed) if progress.failed else ""
            table.add_row(work.title, f"{done:,}", f"{work.items:,}", failed, f"{seconds:,.0f}", rate)
        console.print(table)
        for line in self.lines():
            console.print(line, highlight=False)

    def rows(self) -> list[tuple[str, str, str]]:
        """Each stage for a report's page: its name, and in words how many of its units and of its items are done."""
        rows = []
        for each in self.stages:
            work, failed = each.work, f", {each.failed:,} failed" if each.failed else ""
            items = f"{each.done:,} of {counted(work.items, work.stage.item.removesuffix('s'))}{failed}"
            rows.append((work.title, f"{each.units:,} of {len(work.units):,}", items))
        return [*rows, ("further stages", "", "when the filter is done")] if self.later else rows

    def lines(self) -> list[str]:
        """Everything that the table does not say."""
        lines = ["further stages follow when the filter is done"] if self.later else []
        for reasons, noun, what in ((self.failures, "unit", "failed"), (self.left_out, "fact", "left out")):
            lines += [f"{counted(count, noun)} {what}: {reason}" for reason, count in reasons.most_common(5)]
            if len(reasons) > 5:
                lines.append(f"{counted(reasons.total(), noun)} {what} in all; the folder has their list")
        if self.failures:
            lines.append("the same command with --retry-failed computes again what failed")
        return lines


def status_of(place: str) -> Status:
    """The status of the sweep in a folder. Raises ``ResultError`` where there is none."""
    store = Store.open(place)
    run = store.read_json(RUN)
    if run is None or run.get("command") != "sweep":
        raise ResultError(f"{place} holds no sweep; give the folder that 'causalcone sweep' wrote to")
    sweep = as_sweep(run["configuration"])
    facts = store.part(FACTS)
    stages: list[StageUnits] = []
    later = facts is None
    if facts is not None:
        stages.append(FilterStage(sweep, sweep.filter).all_units(facts.rows))
        later = not facts.notes.get("filtered")
        if not later:
            selection = select(sweep, store.read_table(FACTS))
            stages += later_units(stages_of(sweep).values(), selection, run["model"]["depth"])
    progress = [_progress(stage, store) for stage in stages]
    failures, left_out = _reasons(store, FAILURES), _reasons(store, LEFT_OUT)
    status = run["status"]
    if status == RUNNING and not store.held():  # unless it has ended meanwhile
        status = store.read_json(RUN)["status"]
        status = INTERRUPTED if status == RUNNING else status
    return Status(place, status, run["begun"], progress, failures, left_out, later)


def _progress(work: StageUnits, store: Store) -> Progress:
    done, failed, whole, seconds = 0, 0, 0, 0.0
    for unit in work.units:
        parts = unit.parts(store)
        if parts is not None:
            done += unit.items
            whole += 1
            seconds += max(part.notes.get("seconds", 0.0) for part in parts)
        elif store.part(unit.failure) is not None:
            failed += unit.items
    return Progress(work, done, failed, whole, seconds)


def _reasons(store: Store, table: str) -> Counter[str]:
    rows = [store.read_table(name) for name in store.names(table)]
    return Counter(reason for part in rows for reason in part["reason"].to_pylist())
