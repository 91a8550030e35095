"""Carries a sweep out, stage by stage, and goes on with one that ended early."""

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
from rich.console import Console

from causalcone.analysis.tables.names import counted
from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.facts import Fact
from causalcone.engine.schemas import FAILURE_SCHEMA, LEFT_OUT_SCHEMA, SCHEMA_VERSION, refuse_newer
from causalcone.runners.inputs.fingerprints import facts_fingerprint
from causalcone.runners.results.folder import ResultError, differences, versions
from causalcone.runners.results.store import Store
from causalcone.runners.show.progress import shown_progress
from causalcone.runners.sweep.executor import Executor, LocalExecutor, Stop, UnitResult, stopping
from causalcone.runners.sweep.inputs.facts_table import FACTS, fact_table, facts_of, read_facts, select
from causalcone.runners.sweep.inputs.resources import NOISE_FILE
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import LEFT_OUT, STATE, Selection, Unit
from causalcone.runners.sweep.stages import FilterStage, StageUnits, later_units, stages_of
from causalcone.runners.sweep.stages.prepared import CONTEXTS_FILE, MOMENTS_FILE, PARTIAL
from causalcone.runners.sweep.worker import ModelInfo, Worker

logger = logging.getLogger(__name__)

RUN = "run.json"
RUNNING, STOPPED, COMPLETE, INCOMPLETE = "running", "stopped", "complete", "incomplete"

_CHECKED = f"{LEFT_OUT}/checked.parquet"
_SHOWN = 10
_ANOTHER = "choose another folder, or give --overwrite to drop what is there"


@dataclass(frozen=True)
class SweepSummary:
    """The end of a sweep. computed: how many units were computed now; failed: those that could not be; signal: the one
    that ended it, if any did."""

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
        """The process's exit code: 128 and the signal, as shells have it, or 1 if units failed."""
        return int(self.failed != []) if self.signal is None else 128 + self.signal


@dataclass
class Driver:
    """Carries ``sweep`` out in the folder ``place``.

    retry_failed: compute units again that failed; overwrite: drop what another sweep left there; make_executor: of the
    executor, a worker of this process by default.
    """

    sweep: Sweep
    place: str
    console: Console
    quiet: bool = False
    retry_failed: bool = False
    overwrite: bool = False
    make_executor: Callable[[Sweep, str], Executor] | None = None
    failed: list[UnitResult] = field(default_factory=list)
    computed: int = 0

    def run(self) -> SweepSummary:
        """Compute all that is not there yet. Raises ``ResultError`` where the folder cannot be used or written, and
        ``FactError``, ``ModelError`` or ``ExperimentError`` for input that is wrong."""
        self.store = Store.open(self.place)
        started = time.monotonic()
        with self.store.locked(), stopping(self._tell) as stop:
            run_before = self._run_before()
            with self.store.log_of(logger):
                self.stages = stages_of(self.sweep)
                make_executor = self.make_executor or (lambda sweep, place: LocalExecutor(Worker(sweep, place)))
                self.executor = make_executor(self.sweep, self.place)
                facts, model = self._begin(run_before)
                summary = None
                try:
                    self._compute(facts, model.depth, stop)
                    summary = SweepSummary(time.monotonic() - started, self.computed, self.failed, stop.signal)
                finally:
                    status = STOPPED if summary is None else summary.status
                    with suppress(ResultError):  # of the two errors, the one that ended the sweep is raised
                        self._write_run(status)
                    logger.info("%s: %s units computed, %s failed", status, self.computed, len(self.failed))
        return summary

    # --- begin ---

    def _run_before(self) -> dict[str, Any] | None:
        """The folder's run.json; refuses one that is not of a sweep of this configuration."""
        before = self.store.read_json(RUN)
        command = None if before is None else before.get("command")
        if before is None or self.overwrite:
            others = [name for name in self.store.names() if not name.startswith(("sweep.", PARTIAL))]
            if others and command != "sweep":
                origin = f"files of another origin ({others[0]}, ...)"
                raise ResultError(f"{self.place} holds {origin}; choose another folder")
            return None
        if command != "sweep":
            raise ResultError(f"{self.place} holds results of 'causalcone {command}'; choose another folder")
        refuse_newer(before.get("schema", 1), self.place, ResultError)
        if changed := differences(before["configuration"], self.sweep.result_config):
            changes = "\n  ".join(changed)
            raise ResultError(f"{self.place} holds a sweep of another configuration:\n  {changes}\n{_ANOTHER}")
        return dict(before)

    def _drop(self) -> None:
        """Delete what an earlier sweep wrote; run.json last, which says that the rest is a sweep's."""
        written = {NOISE_FILE, CONTEXTS_FILE, MOMENTS_FILE, RUN}
        names = [
            n for n in self.store.names() if n in written or n.endswith(".parquet") or n.startswith((PARTIAL, STATE))
        ]
        for name in sorted(names, key=lambda name: name == RUN):
            self.store.delete(name)

    def _begin(self, before: Mapping[str, Any] | None) -> tuple[list[Fact], ModelInfo]:
        """Read and check facts and model; write run.json and the table of facts, or see that they are as before."""
        facts, skipped, recognised = read_facts(self.sweep)
        model = self.executor.model_info()
        later_units(self.stages.values(), Selection(), model.depth)  # refuses layers that the model does not have
        fingerprints = {"facts": facts_fingerprint(facts), "model": model.fingerprint}
        if before is not None:
            old = before["fingerprints"]
            if changed := " and ".join(name for name, now in fingerprints.items() if old.get(name) != now):
                raise ResultError(f"the {changed} of the sweep in {self.place} changed since it began; {_ANOTHER}")
            if changes := "; ".join(differences(before["versions"], versions())):
                warnings.warn(f"{self.place} was begun with other versions: {changes}", stacklevel=2)
        else:
            self._drop()
        stages = self.stages.values()
        expected = {stage.name: dict(stage.expected) for stage in stages if stage.expected}
        self.run_json = {
            "command": "sweep",
            "configuration": self.sweep.result_config,
            "hash": self.sweep.hash,
            "schema": SCHEMA_VERSION,
            "versions": versions(),
            "fingerprints": fingerprints,
            "model": asdict(model),
            "analysis": {
                "published": self.sweep.published,
                "answer_score": self.sweep.answer_score,
                "aggregate": next((stage.aggregate for stage in stages if stage.aggregate), None),
                **({"expected": expected} if expected else {}),
            },
            "begun": before["begun"] if before else time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        if before is None or not self.store.exists(FACTS):
            self._tell(f"facts: {len(facts):,} of {self.sweep.facts}; {'; '.join(recognised.lines())}")
            facts = self._checked(facts, skipped)
            self.store.write_table(FACTS, fact_table(facts), {})
        else:
            facts = facts_of(self.store.read_table(FACTS))
        self._write_run(RUNNING)
        logger.info("%s: %s facts, %s", "going on" if before else "begun", len(facts), model)
        return facts, model

    def _checked(self, facts: Sequence[Fact], skipped: Sequence[str]) -> list[Fact]:
        """The facts that can be used; the others are listed, and an error if they are not to be skipped."""
        bad = dict(self.executor.bad_facts(facts))
        if bad and not self.sweep.skip_bad_facts:
            more = [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
            reasons = "\n  ".join(
                [f"{len(bad)} of {counted(len(facts), 'fact')} cannot be used:", *[*bad.values()][:_SHOWN], *more]
            )
            raise FactError(f"{reasons}\nmend them, or set skip_bad_facts = true to leave them out")
        rows = [{"fact_id": None, "unit": "reading", "reason": reason} for reason in skipped]
        rows += [{"fact_id": name, "unit": "checking", "reason": reason} for name, reason in bad.items()]
        if rows:
            self.store.write_table(_CHECKED, pa.Table.from_pylist(rows, schema=LEFT_OUT_SCHEMA), {})
            self._tell(f"{counted(len(rows), 'fact')} left out, as unusable; {_CHECKED} says why")
            for row in rows[:_SHOWN]:
                self._tell(f"  {row['reason']}")
        good = [fact for fact in facts if fact.id not in bad]
        if not good:
            raise FactError(f"none of the facts of {self.sweep.facts} can be used")
        return good

    # --- the stages ---

    def _compute(self, facts: Sequence[Fact], depth: int, stop: Stop) -> None:
        first = FilterStage(self.sweep, self.sweep.filter).all_units(len(facts))
        self._compute_units(first, stop)
        if stop:
            return
        selection = self._select(facts, first)
        if not selection.known:
            raise FactError(
                f"the model completes none of {counted(len(facts), 'fact')} ({FACTS} has what it says instead); set "
                "filter.completes = false to go on with all of them"
            )
        for work in later_units(self.stages.values(), selection, depth):
            if stop:
                return
            self._compute_units(work, stop)

    def _select(self, facts: Sequence[Fact], done: StageUnits) -> Selection:
        """The facts that go on; the filter's results are written beside them."""
        parts = [self.store.read_table(unit.file(FilterStage.name)) for unit in done.units]
        results = pa.concat_tables(parts, promote_options="default")  # older parts may lack columns
        selection = select(self.sweep, results)
        stored = self.store.part(FACTS)
        if stored is None or not stored.notes.get("filtered"):
            self.store.write_table(FACTS, fact_table(facts, results), {"filtered": True})
        known, erasable = len(selection.known), len(selection.erasable)
        self._tell(f"facts that go on: {known} of {len(facts)}; likely enough to be erased: {erasable}")
        return selection

    def _compute_units(self, work: StageUnits, stop: Stop) -> None:
        """Compute those units that are not done."""
        todo, done, failed = self._sorted(work.units)
        self.failed += failed
        if not todo:
            return
        with shown_progress(self.console, work.title, work.stage.item, self.quiet, done) as progress:
            progress(done, work.items)
            for result in self.executor.run(todo, stop):
                self._note(result)
                done += result.unit.items
                progress(done, work.items)

    def _sorted(self, units: Sequence[Unit]) -> tuple[list[Unit], int, list[UnitResult]]:
        """The units that are to be computed, how many items are done, and those that failed before."""
        todo, done, failed = [], 0, []
        for unit in units:
            if unit.parts(self.store) is not None:
                done += unit.items
            elif not self.retry_failed and self.store.part(unit.failure) is not None:
                reason = self.store.read_table(unit.failure)["reason"][0].as_py()
                failed.append(UnitResult(unit, 0.0, reason))
                done += unit.items
            else:
                todo.append(unit)
        return todo, done, failed

    def _note(self, result: UnitResult) -> None:
        unit, reason = result.unit, result.reason
        if reason is None:
            self.computed += 1
            self.store.delete(unit.failure)
            logger.info("%s: %s in %.1f s", unit.name, unit.items, result.seconds)
            return
        logger.info("%s failed: %s", unit.name, result.trace or reason)
        if self.stages[unit.stage].required:
            raise ExperimentError(f"{unit.stage}: {reason}")
        self.failed.append(result)
        row = {"unit": unit.name, "stage": unit.stage, "items": unit.items, "reason": reason}
        self.store.write_table(unit.failure, pa.Table.from_pylist([row], schema=FAILURE_SCHEMA), {"unit": unit.name})
        self._tell(f"{unit.name} failed, the others go on: {reason}")

    def _write_run(self, status: str) -> None:
        self.store.write_json(RUN, {**self.run_json, "status": status, "failed": len(self.failed)})

    def _tell(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False)
