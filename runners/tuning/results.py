"""Results of a tuning: scores of all settings, the choice among them (Hase et al. 2023; docs/editing.md, "Tuning"), and
the preset of the chosen ones."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table

from causalcone.analysis.scores import mean_scores
from causalcone.analysis.tables.names import heading
from causalcone.engine.errors import ExperimentError
from causalcone.runners.edits.presets import preset_text, tuned_preset
from causalcone.runners.edits.settings import EditPlan
from causalcone.runners.options import SourceOptions, TuningOptions
from causalcone.runners.show.edit_tables import failed_lines, scores_of
from causalcone.runners.show.tables import new_table
from causalcone.runners.tuning.grid import Grid, GridPoint

SCORES = ("rewrite", "paraphrase", "neighborhood")


ROUNDING = 1e-9
"""Tolerance of differences of scores."""


@dataclass(frozen=True)
class Candidate:
    """Mean scores of a setting, None where no edit has one. caution: of settings that do equally well, the one with
    more of it is chosen; it is compared number by number."""

    rewrite: float | None
    paraphrase: float | None
    neighborhood: float | None
    caution: tuple[float, ...] = ()


@dataclass(frozen=True)
class TunedChoice:
    """The number of the chosen setting. note: the rule that it breaks, where all settings do."""

    number: int
    note: str | None = None


def choose(candidates: Sequence[Candidate], most: float = 0.99, give_up: float = 0.05) -> TunedChoice:
    """The setting with the highest rewrite score that is not above ``most`` and gives up little for it.

    - Admissible are settings whose rewrite score is at most ``most``. If there are none, the one with the lowest
      rewrite score is chosen, with a note.
    - Of these, settings whose paraphrase or neighbourhood score is more than ``give_up`` below the best that an
      admissible one has are dropped. If that leaves none, since the best of the two scores are different settings', the
      one is chosen whose larger loss of the two is the smallest, with a note.
    - Of what is left, the highest rewrite score is chosen; of equals the more cautious one, then the first.

    Raises ``ExperimentError`` where no setting has a rewrite score.
    """
    scored = {number: candidate.rewrite for number, candidate in enumerate(candidates) if candidate.rewrite is not None}
    if not scored:
        raise ExperimentError("no setting has a rewrite score: all edits failed, or nothing was left to gain")

    def bolder(number: int) -> tuple[float, ...]:
        return tuple(-sign for sign in candidates[number].caution)

    admissible = [number for number, rewrite in scored.items() if rewrite <= most]
    if not admissible:
        lowest = min(scored, key=lambda number: (scored[number], bolder(number)))
        return TunedChoice(lowest, f"every setting has a rewrite score above {most:g}; the lowest is taken")
    losses = dict(zip(admissible, _losses([candidates[number] for number in admissible]), strict=True))
    close = [number for number in admissible if losses[number] <= give_up + ROUNDING]
    if close:
        return TunedChoice(min(close, key=lambda number: (-scored[number], bolder(number))))
    least = min(admissible, key=lambda number: (losses[number], -scored[number], bolder(number)))
    return TunedChoice(
        least,
        f"every setting gives up more than {give_up:g} of the best paraphrase or neighbourhood score; the one that "
        f"gives up the least, {losses[least]:.3f}, is taken",
    )


def _losses(candidates: Sequence[Candidate]) -> list[float]:
    """How far each is below the best in the score, paraphrase or neighbourhood, in which it is further."""
    losses = [0.0] * len(candidates)
    for name in ("paraphrase", "neighborhood"):
        scores = [getattr(candidate, name) for candidate in candidates]
        best = max((score for score in scores if score is not None), default=0.0)
        losses = [max(loss, 0.0 if score is None else best - score) for loss, score in zip(losses, scores, strict=True)]
    return losses


@dataclass(frozen=True)
class TrialResult:
    """The results of a setting, in its folder."""

    point: GridPoint
    folder: Path
    facts: int
    edits: int
    failed: Mapping[str, int]
    suspect: Mapping[str, int]
    means: Candidate

    @classmethod
    def read(cls, point: GridPoint, folder: Path, aggregate: str) -> TrialResult:
        """Raises ``TableError`` for tables that are damaged."""
        results = json.loads((folder / "run.json").read_text(encoding="utf-8"))["results"]
        scores = dict(mean_scores(scores_of(folder, aggregate, essence=False)).select("score", "mean").iter_rows())
        means = Candidate(scores["rewrite"], scores["paraphrase"], scores["neighborhood"], point.caution)
        reasons = results["failed"], results.get("suspect", {})  # which results of 0.1.0 do not have
        return cls(point, folder, results["facts"], results["edits"], *reasons, means)

    @property
    def scores(self) -> dict[str, float | None]:
        """Mean scores by name."""
        return {name: getattr(self.means, name) for name in SCORES}

    @property
    def texts(self) -> list[str]:
        """Mean scores as they are shown."""
        return ["-" if score is None else f"{score:.3f}" for score in self.scores.values()]


@dataclass(frozen=True)
class TuningResult:
    """The results of all settings of a grid, and the choice among them."""

    grid: Grid
    trials: tuple[TrialResult, ...]
    choice: TunedChoice

    @classmethod
    def of(cls, grid: Grid, trials: Sequence[TrialResult], most: float, give_up: float) -> TuningResult:
        """Raises ``ExperimentError`` where no setting has a score, saying what failed."""
        try:
            return cls(grid, tuple(trials), choose([trial.means for trial in trials], most, give_up))
        except ExperimentError as error:
            reasons = sum((Counter(trial.failed) for trial in trials), Counter[str]())
            raise ExperimentError("; ".join([f"{grid}: {error}", *failed_lines(reasons)])) from error

    @property
    def best(self) -> TrialResult:
        """The chosen setting's."""
        return self.trials[self.choice.number]

    @property
    def comment(self) -> str:
        """The choice in a line."""
        means = ", ".join(f"{name} {text}" for name, text in zip(SCORES, self.best.texts, strict=True))
        note = "" if self.choice.note is None else f" ({self.choice.note})"
        return (
            f"{self.grid.problem}, {self.grid.setting}: {self.best.point} of {len(self.trials)} settings on "
            f"{self.best.facts} facts: {means}{note}"
        )

    @property
    def record(self) -> dict[str, Any]:
        """The choice for JSON."""
        return {
            "problem": self.grid.problem,
            **self.best.point.setting.configuration,
            "setting": str(self.best.point),
            "means": self.best.scores,
            "facts": self.best.facts,
            "note": self.choice.note,
        }


def tuning_table(results: Sequence[TuningResult], layer: int, path: Path) -> pl.DataFrame:
    """A row for each setting: the hyperparameters that were varied (null for those of other methods), mean scores, and
    whether it is chosen. folder: where its edits are, below ``path``."""
    names = dict.fromkeys(name for result in results for name in result.grid.points[0].values)
    rows = [
        {
            "problem": result.grid.problem,
            "method": trial.point.setting.method,
            "window": trial.point.setting.window,
            "layer": layer,
            "folder": trial.folder.relative_to(path).as_posix(),
            "setting": str(trial.point),
            **{name: trial.point.values.get(name) for name in names},
            "facts": trial.facts,
            "edits": trial.edits,
            "failed": sum(trial.failed.values()),
            "suspect": sum(trial.suspect.values()),
            **trial.scores,
            "chosen": trial is result.best,
        }
        for result in results
        for trial in result.trials
    ]
    numbers = [name for name in names if not any(isinstance(row[name], str) for row in rows)]
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys([*numbers, *SCORES], pl.Float64), infer_schema_length=None)


def score_tables(results: Sequence[TuningResult]) -> list[Table]:
    """Mean scores of all settings, and how many edits are suspect; a table for each problem, the chosen ones marked."""
    tables: dict[str, Table] = {}
    for result in results:
        problem = result.grid.problem
        if problem not in tables:
            title = f"{heading(problem)}: mean scores of {result.best.facts} facts by setting"
            columns = ("method", "setting", "rewrite", "paraphrase", "neighbourhood", "suspect", "chosen")
            tables[problem] = new_table(title, *columns)
        for trial in result.trials:
            style, mark = ("bold", "chosen") if trial is result.best else (None, "")
            suspect = str(sum(trial.suspect.values()) or "")
            row = (str(result.grid.setting), str(trial.point), *trial.texts, suspect, mark)
            tables[problem].add_row(*row, style=style, end_section=trial is result.trials[-1])
    return list(tables.values())


def chosen_preset(
    source: SourceOptions, options: TuningOptions, plan: EditPlan, depth: int, results: Sequence[TuningResult]
) -> str:
    """The text of a preset with the chosen settings; its comments say where they are from. plan: of any problem."""
    begin = "" if options.preset is None else f", begun from the preset {options.preset}"
    comments = [
        f"Tuned on {time.strftime('%Y-%m-%d')} by causalcone tune: the model {source.model}, facts of {source.facts}, "
        f"layer {options.layer + 1} (counted from 1){begin}; rewrite score at most {options.most:g}, of the best "
        f"paraphrase and neighbourhood score {options.give_up:g} given up at most.",
        *(result.comment for result in results),
    ]
    points = [(result.grid.problem, result.best.point) for result in results]
    chosen = [(problem, point.setting, tuple(point.values)) for problem, point in points]
    return preset_text(tuned_preset(options.preset, depth, plan.sigma, plan.aggregate, chosen), comments)
