"""Carries a sweep out, stage by stage, and goes on with one that ended early."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
from rich.console import Console

from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.facts import Fact
from causalcone.engine.schemas import FAILURE_SCHEMA, LEFT_OUT_SCHEMA
from causalcone.runners.facts import files
from causalcone.runners.inputs.fingerprints import facts_fingerprint
from causalcone.runners.results.folder import ResultError, differences, versions
from causalcone.runners.results.store import Store
from causalcone.runners.show.progress import shown_progress
from causalcone.runners.sweep.config import Sweep
from causalcone.runners.sweep.executor import Executor, LocalExecutor, UnitResult
from causalcone.runners.sweep.facts_table import FACTS, chosen, fact_table, filtered
from causalcone.runners.sweep.log import Log
from causalcone.runners.sweep.signals import Stop, stopping
from causalcone.runners.sweep.units import (
    FILTER,
    LEFT_OUT,
    PREPARED,
    Chosen,
    Stage,
    Unit,
    edit_layers,
    filter_stage,
    later_stages,
)
from causalcone.runners.sweep.worker import Description, Worker

RUN = "run.json"
RUNNING, STOPPED, COMPLETE, INCOMPLETE = "running", "stopped", "complete", "incomplete"

_CHECKED = f"{LEFT_OUT}/checked.parquet"
_SHOWN = 10


@dataclass(frozen=True)
class SweepSummary:
    """How a sweep ended: by which signal, if by any; failed: units that could not be computed; computed: how many were
    computed now."""

    place: str
    seconds: float
    computed: int
    failed: Sequence[UnitResult]
    signal: int | None

    @property
    def status(self) -> str:
        if self.signal is not None:
            return STOPPED
        return INCOMPLETE if self.failed else COMPLETE

    @property
    def code(self) -> int:
        """That the process is to exit with: 128 and the signal, as shells have it, or 1 where units failed."""
        return int(self.failed != []) if self.signal is None else 128 + self.signal


@dataclass
class Driver:
    """Carries ``sweep`` out in the folder ``place``, by a crew that ``crew_of`` makes; the worker of this process by
    default. retry_failed: compute units again that failed; overwrite: drop what another sweep left there."""

    sweep: Sweep
    place: str
    console: Console
    quiet: bool = False
    retry_failed: bool = False
    overwrite: bool = False
    crew_of: Callable[[Sweep, str], Executor] | None = None
    failed: list[UnitResult] = field(default_factory=list)
    computed: int = 0

    def run(self) -> SweepSummary:
        """Compute what is not there yet. Raises ``ResultError`` where the folder cannot be used or written, and
        ``FactError``, ``ModelError`` or ``ExperimentError`` for input that is wrong."""
        self.store = Store.open(self.place)
        started = time.monotonic()
        with self.store.locked(), stopping(self._tell) as stop:
            kept = self._kept()
            self.log = Log(self.store)
            self.crew: Executor = (self.crew_of or _alone)(self.sweep, self.place)
            facts, description = self._begin(kept)
            finished = None
            try:
                self._stages(facts, description, stop)
                finished = SweepSummary(self.place, time.monotonic() - started, self.computed, self.failed, stop.signal)
            finally:
                status = STOPPED if finished is None else finished.status
                with suppress(ResultError):  # of the two errors, the one that ended the sweep is told
                    self._write_run(status)
                self.log(f"{status}: {self.computed} units computed, {len(self.failed)} failed")
        return finished

    # --- the beginning ---

    def _kept(self) -> dict[str, Any] | None:
        """What the folder's run.json says; refuses what is no sweep of this configuration."""
        kept = self.store.read_json(RUN)
        if kept is None or self.overwrite:
            others = [name for name in self.store.names() if not name.startswith(("sweep.", "moments.partial"))]
            if others and (kept is None or kept.get("command") != "sweep"):
                raise ResultError(
                    f"{self.place} holds files of another origin ({others[0]}, ...); choose another folder"
                )
            if kept is not None:
                for name in others:
                    self.store.delete(name)
            return None
        if kept.get("command") != "sweep":
            raise ResultError(
                f"{self.place} holds results of 'causalcone {kept.get('command')}'; choose another folder"
            )
        told = differences(kept["configuration"], self.sweep.decisive)
        if told:
            raise ResultError(
                f"{self.place} holds a sweep of another configuration:\n  " + "\n  ".join(told) + "\nchoose another "
                "folder, or give --overwrite to drop what is there"
            )
        return dict(kept)

    def _begin(self, kept: Mapping[str, Any] | None) -> tuple[list[Fact], Description]:
        """Read and check facts and model; write down what is to be done, or see that it is the same as before."""
        facts, skipped = read_facts(self.sweep)
        description = self.crew.describe()
        for problem in self.sweep.edit.problems if self.sweep.edit else ():
            edit_layers(self.sweep, problem, description.depth)
        told = {"facts": facts_fingerprint(facts), "model": description.fingerprint}
        if kept is not None and kept["fingerprints"] != told:
            changed = " and ".join(name for name in told if kept["fingerprints"].get(name) != told[name])
            raise ResultError(
                f"the {changed} of the sweep in {self.place} changed since it began; choose another folder, or give "
                "--overwrite to drop what is there"
            )
        if kept is not None and kept["versions"] != versions():
            warnings.warn(
                f"{self.place} was begun with other versions: {'; '.join(differences(kept['versions'], versions()))}",
                stacklevel=2,
            )
        self.run_json = {
            "command": "sweep",
            "configuration": self.sweep.decisive,
            "hash": self.sweep.hash,
            "versions": versions(),
            "fingerprints": told,
            "model": asdict(description),
            "analysis": {
                "published": self.sweep.published,
                "aggregate": self.sweep.plan(self.sweep.edit.problems[0]).aggregate if self.sweep.edit else None,
            },
            "begun": kept["begun"] if kept else time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        if kept is None or not self.store.exists(FACTS):
            facts = self._checked(facts, skipped)
            self.store.write_table(FACTS, fact_table(facts), {})
        else:
            from causalcone.runners.sweep.facts_table import facts_of

            facts = facts_of(self.store.read_table(FACTS))
        self._write_run(RUNNING)
        self.log(f"{'going on' if kept else 'begun'}: {len(facts)} facts, {description}")
        return facts, description

    def _checked(self, facts: Sequence[Fact], skipped: Sequence[str]) -> list[Fact]:
        """The facts that can be used; the others are listed, and an error if they are not to be skipped."""
        bad = dict(self.crew.bad_facts(facts))
        if bad and not self.sweep.skip_bad_facts:
            more = [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
            raise FactError(
                f"{len(bad)} of {len(facts)} facts cannot be used:\n  "
                + "\n  ".join([*list(bad.values())[:_SHOWN], *more])
                + "\nmend them, or set skip_bad_facts = true to leave them out"
            )
        rows = [{"fact_id": None, "unit": "reading", "reason": reason} for reason in skipped]
        rows += [{"fact_id": name, "unit": "checking", "reason": reason} for name, reason in bad.items()]
        if rows:
            self.store.write_table(_CHECKED, pa.Table.from_pylist(rows, schema=LEFT_OUT_SCHEMA), {})
            self._tell(f"{len(rows)} facts cannot be used and are left out; {_CHECKED} says why")
            for row in rows[:_SHOWN]:
                self._tell(f"  {row['reason']}")
        good = [fact for fact in facts if fact.id not in bad]
        if not good:
            raise FactError(f"none of the facts of {self.sweep.facts} can be used")
        return good

    # --- the stages ---

    def _stages(self, facts: Sequence[Fact], description: Description, stop: Stop) -> None:
        self._carry_out(filter_stage(self.sweep, len(facts)), stop)
        if stop:
            return
        which = self._choose(facts)
        if not which.known:
            raise FactError(
                f"the model completes none of the {len(facts)} facts ({FACTS} has what it says instead); set "
                "filter.completes = false to go on with all of them"
            )
        for stage in later_stages(self.sweep, which, description.depth):
            if stop:
                return
            self._carry_out(stage, stop)

    def _choose(self, facts: Sequence[Fact]) -> Chosen:
        """Which facts go on; what the filter found is written beside them."""
        table = filtered(self.store, self.sweep, len(facts))
        which = chosen(self.sweep, table)
        part = self.store.part(FACTS)
        if part is None or not part.notes.get("filtered"):
            self.store.write_table(FACTS, fact_table(facts, table), {"filtered": True})
        self._tell(f"{len(which.known)} of {len(facts)} facts go on, {len(which.erasable)} of them to be erased")
        return which

    def _carry_out(self, stage: Stage, stop: Stop) -> None:
        """Compute a stage's units that are not done."""
        todo, done, failed = self._sorted(stage)
        self.failed += failed
        if not todo:
            return
        with shown_progress(self.console, stage.title, stage.unit, self.quiet, done) as progress:
            progress(done, stage.items)
            for outcome in self.crew.run(todo, stop):
                self._note(outcome)
                done += outcome.unit.items
                progress(done, stage.items)

    def _sorted(self, stage: Stage) -> tuple[list[Unit], int, list[UnitResult]]:
        """The units of a stage that are to be computed, how many items are done, and what failed before."""
        todo, done, failed = [], 0, []
        for unit in stage.units:
            if unit.parts(self.store) is not None:
                done += unit.items
            elif not self.retry_failed and self.store.part(unit.failure) is not None:
                reason = self.store.read_table(unit.failure)["reason"][0].as_py()
                failed.append(UnitResult(unit, 0.0, reason))
                done += unit.items
            else:
                todo.append(unit)
        return todo, done, failed

    def _note(self, outcome: UnitResult) -> None:
        unit = outcome.unit
        if outcome.reason is None:
            self.computed += 1
            self.store.delete(unit.failure)
            self.log(f"{unit.name}: {unit.items} in {outcome.seconds:.1f} s")
            return
        self.log(f"{unit.name} failed: {outcome.trace or outcome.reason}")
        if unit.stage == FILTER or unit.stage in PREPARED:
            raise ExperimentError(f"{unit.name.split('/')[0]}: {outcome.reason}")
        self.failed.append(outcome)
        row = {"unit": unit.name, "stage": unit.stage, "items": unit.items, "reason": outcome.reason}
        self.store.write_table(unit.failure, pa.Table.from_pylist([row], schema=FAILURE_SCHEMA), {"unit": unit.name})
        self._tell(f"{unit.name} failed, the others go on: {outcome.reason}")

    def _write_run(self, status: str) -> None:
        self.store.write_json(RUN, {**self.run_json, "status": status, "failed": len(self.failed)})

    def _tell(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False)


def _alone(sweep: Sweep, place: str) -> Executor:
    return LocalExecutor(Worker(sweep, place))


def read_facts(sweep: Sweep) -> tuple[list[Fact], list[str]]:
    """The facts of the sweep's file, within its limit, and why records were skipped."""
    return files.read_facts(
        sweep.facts_path(), sweep.limit, sweep.seed, zsre_form=sweep.zsre_form,
        on_error="skip" if sweep.skip_bad_facts else "raise",
    )  # fmt: skip
