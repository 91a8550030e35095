"""The folder of a sweep as the analysis sees it: the tables it holds by now, and those that were asked for."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from causalcone.analysis.effects import At, Denominator, tracing_effects, zeroing_effects
from causalcone.analysis.scores import Aggregate, edits_with_effects, mean_scores, own_groups, probe_metrics, scores
from causalcone.analysis.sequences import sequence_scores
from causalcone.analysis.tables.edits import finished, read_edits, unmet
from causalcone.analysis.tables.names import SEVERED, counted, words
from causalcone.analysis.tables.traces import AnswerScore, TableError, scan_folder
from causalcone.engine.schemas import refuse_newer

State = tuple[str, int]

RESTORED, ZEROED = "traces/restore", "traces/zero"
EXPECTED = {
    "trace": {RESTORED: "traces"},
    "zero": {ZEROED: "zeroed states"},
    "gradients": {"gradients": "integrated gradients"},
}
"""Tables by stage, in words; run.json has those of stages of other packages."""


class Study:
    """A sweep's folder, which may be unfinished: every table is read when it is asked for first. Raises ``TableError``
    where the folder holds no sweep."""

    def __init__(
        self, folder: str | Path, aggregate: Aggregate | None = None, answer_score: AnswerScore | None = None
    ) -> None:
        self.folder = Path(folder)
        self.run = _run(self.folder)
        self.configuration: dict[str, Any] = self.run["configuration"]
        self._aggregate, self._answer_score = aggregate, answer_score

    @property
    def title(self) -> str:
        """Model and facts, in words."""
        return f"Model {self.configuration.get('model')}, facts {self.configuration.get('facts')}"

    @property
    def published(self) -> str | None:
        """The study on record that this one repeats, whose tables are to be set beside."""
        name = self.run.get("analysis", {}).get("published")
        return None if name is None else str(name)

    @property
    def aggregate(self) -> Aggregate:
        """Which paraphrases and neighbours count: as asked for, else as the sweep's preset says, else as published."""
        return self._aggregate or self.run.get("analysis", {}).get("aggregate") or "first"

    @property
    def answer_score(self) -> AnswerScore:
        """What p of an answer is: as asked for, else as the sweep says, else the product over its tokens."""
        return self._answer_score or self.run.get("analysis", {}).get("answer_score") or "product"

    def has(self, table: str) -> bool:
        """Whether any part of a table is there."""
        return any((self.folder / table).rglob("*.parquet"))

    def needs(self, table: str, name: str) -> None:
        """``TableError`` where no part of a table is there, which messages call by a name."""
        if not self.has(table):
            raise TableError(f"{self.folder} holds no {name} yet")

    def scan(self, table: str) -> pl.LazyFrame:
        """The rows of a table as far as they are there; ``TableError`` where there are none."""
        return scan_folder(self.folder / table)

    def states(self, table: str = RESTORED) -> list[State]:
        """The restored or zeroed states, (kind, window), in the order of the configuration; the first MLP state is the
        one that edits are compared with, unless another is asked for."""
        if not self.has(table):
            return []
        states = self.scan(table).select("kind", "window").unique().collect().rows()
        requested = (self.configuration.get("zero" if table == ZEROED else "trace") or {}).get("states", ())
        order = [_state(text) for text in requested]
        return sorted(states, key=lambda state: (order.index(state) if state in order else len(order), state))

    def main_state(self, table: str = RESTORED) -> State | None:
        """Hase et al. 2023 restore MLP outputs."""
        states = self.states(table)
        return next((state for state in states if state[0] == "mlp"), states[0] if states else None)

    @cached_property
    def scores(self) -> pl.DataFrame:
        """``analysis.scores`` of all edits that are done by now."""
        for table in ("edits", "probes"):
            self.needs(table, table)
        metrics = self.folder / "metrics" if self.has("metrics") else None
        return scores(self.folder / "edits", self.folder / "probes", metrics, self.aggregate, self.answer_score)

    @cached_property
    def suspect(self) -> pl.DataFrame:
        """The edits that were done and are out of the ordinary, with the reason."""
        return finished(read_edits(self.folder / "edits")).filter(pl.col("suspect").is_not_null())

    @cached_property
    def mean_scores(self) -> pl.DataFrame:
        """``analysis.mean_scores`` by problem, method, window and layer."""
        return mean_scores(self.scores)

    @cached_property
    def answers(self) -> pl.DataFrame:
        """``analysis.probe_metrics``, of facts' own probes and of free answers."""
        metrics = self.folder / "metrics" if self.has("metrics") else None
        return own_groups(probe_metrics(self.folder / "edits", self.folder / "probes", metrics))

    @cached_property
    def sequences(self) -> pl.DataFrame | None:
        """``analysis.sequence_scores``, also of sequences that are under way; None where there are none."""
        names = (f"{folder}checkpoints" for folder in ("state/", ""))  # a unit's table is there at its end
        found = next((self.folder / name for name in names if self.has(name)), None)
        return None if found is None else sequence_scores(found)

    @cached_property
    def traces(self) -> pl.DataFrame:
        """Rows of restored states."""
        self.needs(RESTORED, "traces")
        return self.scan(RESTORED).collect()

    def effects(self, state: State, at: At = "max", denominator: Denominator = "p_high") -> pl.DataFrame:
        """``tracing_effects`` of one restored state."""
        kind, window = state
        traces = self.traces.filter(kind=kind, window=window)
        if traces.is_empty():
            known = ", ".join(f"{kind}:{window}" for kind, window in self.states())
            raise TableError(f"{kind}:{window} was not restored; there are {known}")
        return tracing_effects(traces, at, denominator, self.answer_score)

    def zeroing(self, state: State) -> pl.DataFrame:
        """``zeroing_effects`` of one state."""
        self.needs(ZEROED, "zeroed states")
        kind, window = state
        return zeroing_effects(self.scan(ZEROED).filter(kind=kind, window=window), self.answer_score)

    def joined(self, state: State, at: At = "max", denominator: Denominator = "p_high") -> pl.DataFrame:
        """Scores beside tracing effects."""
        return edits_with_effects(self.scores, self.effects(state, at, denominator))

    def missing(self) -> Iterator[str]:
        """Tables and rows that were asked for and are not there, in words."""
        if self.run["status"] != "complete":
            yield f"the sweep is {self.run['status']}: tables are of what is finished"
        yield from self._missing_traces()
        yield from self._missing_edits()
        yield from self._left_out()
        if self.has("edits") and self.has("probes"):
            yield from filter(None, [unmet(self.folder / "edits", self.folder / "probes")])
        for failed in sorted((self.folder / "failures").glob("*.parquet")):
            unit, reason = scan_folder(failed).select("unit", "reason").collect().row(0)
            yield f"{unit} failed: {reason}"

    def _missing_traces(self) -> Iterator[str]:
        for key, tables in (EXPECTED | self.run.get("analysis", {}).get("expected", {})).items():
            for table, name in tables.items():
                if self.configuration.get(key) is None:
                    yield f"the sweep has no {name}"
                elif not self.has(table):
                    yield f"there are no {name} yet"
        for part in (self.configuration.get("sever") or {}).get("parts", ()):
            if not self.has(f"traces/sever_{part}"):
                yield f"there are no traces with {SEVERED[part]} severed yet"

    def _missing_edits(self) -> Iterator[str]:
        requested = self.configuration.get("edit")
        if requested is None:
            yield "the sweep has no edits"
            return
        for problem in requested["problems"]:
            if not self.has(f"edits/{problem}"):
                yield f"there are no edits of {words(problem)} yet"
                continue
            for method in requested["methods"]:
                name, _, window = method.partition(":")
                if not any((self.folder / "edits" / problem).glob(f"{name}-{window or '*'}/*.parquet")):
                    yield f"there are no edits of {words(problem)} by {method} yet"
        if self.has("edits") and self.has(RESTORED):
            traced = self.scan(RESTORED).select("fact_id").unique()
            edits = self.scan("edits").select("fact_id").collect()
            untraced = edits.lazy().join(traced, on="fact_id", how="anti").collect()
            if len(untraced):
                facts, total = untraced["fact_id"].n_unique(), edits["fact_id"].n_unique()
                without = f"{len(untraced)} of {counted(len(edits), 'edit')} without a tracing effect, in no regression"
                yield f"edited facts that are not traced: {facts} of {total} ({without})"

    def _left_out(self) -> Iterator[str]:
        """Facts that some stage could not use."""
        if not self.has("left_out"):
            return
        rows = self.scan("left_out").with_columns(stage=pl.col("unit").str.split("/").list.first())
        stages = rows.group_by("stage").agg(pl.col("fact_id").n_unique(), pl.first("reason")).sort("stage")
        for stage, count, reason in stages.collect().rows():
            yield f"{counted(count, 'fact')} left out of {stage}, the first: {reason}"


def _run(folder: Path) -> dict[str, Any]:
    try:
        run = dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise TableError(f"{folder} holds no run.json; give the folder that 'causalcone sweep' wrote to") from None
    except (OSError, ValueError) as error:
        raise TableError(f"{folder / 'run.json'} cannot be read: {error}") from error
    if run.get("command") != "sweep":
        raise TableError(f"{folder} holds results of {run.get('command')!r}; give the folder of a sweep")
    refuse_newer(run.get("schema", 1), folder, TableError)
    return run


def _state(text: str) -> State:
    kind, _, window = text.partition(":")
    return kind, int(window or 1)
