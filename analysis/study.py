"""The folder of a sweep as the analysis sees it: what it holds by now, and what was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl

from causalcone.analysis.effects import Denominator, tracing_effects, zeroing_effects
from causalcone.analysis.joined import edits_with_effects
from causalcone.analysis.scores import mean_scores, scores
from causalcone.analysis.tables import TableError

Aggregate = Literal["first", "mean"]
At = Literal["max", "subject_last"]
State = tuple[str, int]

RESTORED, ZEROED = "traces/restore", "traces/zero"


class Study:
    """A sweep's folder, which may be unfinished: every table is read when it is asked for first.

    Raises ``TableError`` where the folder holds no sweep.
    """

    def __init__(self, folder: str | Path, aggregate: Aggregate | None = None) -> None:
        self.folder = Path(folder)
        self.run = _run(self.folder)
        self.configuration: dict[str, Any] = self.run["configuration"]
        self._aggregate = aggregate

    @property
    def published(self) -> str | None:
        """The study of a paper that this one repeats, whose tables are to be set beside."""
        found = self.run.get("analysis", {}).get("published")
        return None if found is None else str(found)

    @property
    def aggregate(self) -> Aggregate:
        """Which of a fact's paraphrases and neighbours count: as asked for, else as the sweep's preset says."""
        return self._aggregate or self.run.get("analysis", {}).get("aggregate") or "mean"

    def has(self, table: str) -> bool:
        """Whether any part of a table is there."""
        return any((self.folder / table).rglob("*.parquet"))

    def states(self, table: str = RESTORED) -> list[State]:
        """The restored or zeroed states, (kind, window), in the order of the configuration; the first MLP state is the
        one that edits are compared with, unless another is asked for."""
        if not self.has(table):
            return []
        found = set(self._scan(table).select("kind", "window").unique().collect().rows())
        asked = (self.configuration.get("zero" if table == ZEROED else "trace") or {}).get("states", ())
        order = [_state(text) for text in asked]
        return sorted(found, key=lambda state: (order.index(state) if state in order else len(order), state))

    def main_state(self, table: str = RESTORED) -> State | None:
        """Hase et al. 2023 restore MLP outputs."""
        states = self.states(table)
        return next((state for state in states if state[0] == "mlp"), states[0] if states else None)

    @cached_property
    def scores(self) -> pl.DataFrame:
        """``analysis.scores`` of all edits that are done by now."""
        for table in ("edits", "probes"):
            if not self.has(table):
                raise TableError(f"{self.folder} holds no {table} yet")
        metrics = self.folder / "metrics" if self.has("metrics") else None
        return scores(self.folder / "edits", self.folder / "probes", metrics, self.aggregate)

    @cached_property
    def mean_scores(self) -> pl.DataFrame:
        """``analysis.mean_scores`` by problem, method, window and layer."""
        return mean_scores(self.scores)

    @cached_property
    def traces(self) -> pl.DataFrame:
        """Rows of restored states."""
        if not self.has(RESTORED):
            raise TableError(f"{self.folder} holds no traces yet")
        return pl.read_parquet(self.folder / RESTORED / "**" / "*.parquet")

    def effects(self, state: State, at: At = "max", denominator: Denominator = "p_high") -> pl.DataFrame:
        """``tracing_effects`` of one restored state."""
        kind, window = state
        own = self.traces.filter(kind=kind, window=window)
        if own.is_empty():
            known = ", ".join(f"{kind}:{window}" for kind, window in self.states())
            raise TableError(f"{kind}:{window} was not restored; there are {known}")
        return tracing_effects(own, at, denominator)

    def zeroing(self, state: State) -> pl.DataFrame:
        """``zeroing_effects`` of one state."""
        if not self.has(ZEROED):
            raise TableError(f"{self.folder} holds no zeroed states yet")
        kind, window = state
        return zeroing_effects(self._scan(ZEROED).filter(kind=kind, window=window))

    def joined(self, state: State, at: At = "max", denominator: Denominator = "p_high") -> pl.DataFrame:
        """Scores beside tracing effects."""
        return edits_with_effects(self.scores, self.effects(state, at, denominator))

    def missing(self) -> Iterator[str]:
        """What was asked for and is not there, in words."""
        asked = self.configuration
        if self.run["status"] != "complete":
            yield f"the sweep is {self.run['status']}: tables are of what is finished"
        for key, table, name in (
            ("trace", RESTORED, "traces"),
            ("zero", ZEROED, "zeroed states"),
            ("gradients", "gradients", "integrated gradients"),
        ):
            if asked.get(key) is None:
                yield f"the sweep has no {name}"
            elif not self.has(table):
                yield f"there are no {name} yet"
        if asked.get("edit") is None:
            yield "the sweep has no edits"
            return
        for problem in asked["edit"]["problems"]:
            if not self.has(f"edits/{problem}"):
                yield f"there are no edits of {problem.replace('_', ' ')} yet"
        for failed in sorted((self.folder / "failures").glob("*.parquet")):
            unit, reason = pl.read_parquet(failed).select("unit", "reason").row(0)
            yield f"{unit} failed: {reason}"

    def _scan(self, table: str) -> pl.LazyFrame:
        return pl.scan_parquet(self.folder / table / "**" / "*.parquet")


def _run(folder: Path) -> dict[str, Any]:
    try:
        run = dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise TableError(f"{folder} holds no run.json; give the folder that 'causalcone sweep' wrote to") from None
    except (OSError, ValueError) as error:
        raise TableError(f"{folder / 'run.json'} cannot be read: {error}") from error
    if run.get("command") != "sweep":
        raise TableError(f"{folder} holds results of {run.get('command')!r}; give the folder of a sweep")
    return run


def _state(text: str) -> State:
    kind, _, window = text.partition(":")
    return kind, int(window or 1)
