"""What a tuning found: scores of all settings, the chosen ones, and the preset that they make."""

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
from causalcone.engine.errors import ExperimentError
from causalcone.runners.edits.presets import preset_text, tuned_preset
from causalcone.runners.options import SourceOptions, TuningOptions
from causalcone.runners.show.edit_tables import failed_lines, scores_of
from causalcone.runners.show.tables import new_table
from causalcone.runners.tuning.grid import Grid, GridPoint, ProblemGrids

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
        losses = [
            max(loss, best - (best if score is None else score)) for loss, score in zip(losses, scores, strict=True)
        ]
    return losses


@dataclass(frozen=True)
class TrialResult:
    """A setting that was tried: what is in its folder."""

    point: GridPoint
    folder: Path
    facts: int
    edits: int
    failed: Mapping[str, int]
    means: Candidate

    @classmethod
    def read(cls, point: GridPoint, folder: Path, aggregate: str) -> TrialResult:
        """Raises ``TableError`` for tables that are damaged."""
        results = json.loads((folder / "run.json").read_text(encoding="utf-8"))["results"]
        means = mean_scores(scores_of(folder, aggregate, essence=False)).filter(pl.col("score").is_in(SCORES))
        scores = dict(means.select("score", "mean").iter_rows())
        candidate = Candidate(scores["rewrite"], scores["paraphrase"], scores["neighborhood"], point.caution)
        return cls(point, folder, results["facts"], results["edits"], results["failed"], candidate)


@dataclass(frozen=True)
class TuningResult:
    """All settings of a grid, and which is chosen."""

    grid: Grid
    tried: tuple[TrialResult, ...]
    choice: TunedChoice

    @classmethod
    def of(cls, grid: Grid, tried: Sequence[TrialResult], most: float, give_up: float) -> TuningResult:
        """Raises ``ExperimentError`` where no setting has a score, saying what failed."""
        try:
            return cls(grid, tuple(tried), choose([each.means for each in tried], most, give_up))
        except ExperimentError as error:
            reasons: Counter[str] = Counter()
            for each in tried:
                reasons.update(each.failed)
            raise ExperimentError("; ".join([f"{grid}: {error}", *failed_lines(reasons)])) from error

    @property
    def chosen(self) -> TrialResult:
        return self.tried[self.choice.number]

    def comment(self) -> str:
        """What was chosen, in a line."""
        chosen = self.chosen
        means = (f"{name} {_shown(getattr(chosen.means, name))}" for name in SCORES)
        note = "" if self.choice.note is None else f" ({self.choice.note})"
        return (
            f"{self.grid.problem}, {self.grid.setting}: {chosen.point} of {len(self.tried)} settings on "
            f"{chosen.facts} facts: {', '.join(means)}{note}"
        )


def tuning_table(tuned: Sequence[TuningResult], layer: int, path: Path) -> pl.DataFrame:
    """A row for each setting: what was varied of it (null where that is of another method), mean scores, and whether it
    is chosen. folder: where its edits are, below ``path``."""
    names = dict.fromkeys(name for each in tuned for name in each.grid.points[0].values)
    rows = [
        {
            "problem": each.grid.problem,
            "method": tried.point.setting.method,
            "window": tried.point.setting.window,
            "layer": layer,
            "folder": tried.folder.relative_to(path).as_posix(),
            "setting": str(tried.point),
            **{name: _number(tried.point.values.get(name)) for name in names},
            "facts": tried.facts,
            "edits": tried.edits,
            "failed": sum(tried.failed.values()),
            **{name: getattr(tried.means, name) for name in SCORES},
            "chosen": tried is each.chosen,
        }
        for each in tuned
        for tried in each.tried
    ]
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys([*names, *SCORES], pl.Float64), infer_schema_length=None)


def score_tables(tuned: Sequence[TuningResult]) -> list[Table]:
    """Mean scores of all settings, a table for each problem; the chosen ones are marked."""
    tables = []
    for problem in dict.fromkeys(each.grid.problem for each in tuned):
        own = [each for each in tuned if each.grid.problem == problem]
        facts = own[0].chosen.facts
        title = f"{problem.replace('_', ' ').capitalize()}: mean scores of {facts} facts by setting"
        table = new_table(title, "method", "setting", "rewrite", "paraphrase", "neighbourhood", "chosen")
        for each in own:
            for tried in each.tried:
                scores = [_shown(getattr(tried.means, name)) for name in SCORES]
                chosen = tried is each.chosen
                row = (str(each.grid.setting), str(tried.point), *scores, "chosen" if chosen else "")
                table.add_row(*row, style="bold" if chosen else None, end_section=tried is each.tried[-1])
        tables.append(table)
    return tables


def chosen_preset(
    source: SourceOptions,
    choice: TuningOptions,
    grids: Sequence[ProblemGrids],
    depth: int,
    tuned: Sequence[TuningResult],
) -> str:
    """The text of a preset with the chosen settings; its comments say where they are from."""
    begun = "" if choice.preset is None else f", begun from the preset {choice.preset}"
    comments = [
        f"Tuned on {time.strftime('%Y-%m-%d')} by causalcone tune: the model {source.model}, facts of {source.facts}, "
        f"layer {choice.layer + 1} (counted from 1){begun}; rewrite score at most {choice.most:g}, of the best "
        f"paraphrase and neighbourhood score {choice.give_up:g} given up at most.",
        *(each.comment() for each in tuned),
    ]
    chosen = [(each.grid.problem, each.chosen.point.setting, tuple(each.chosen.point.values)) for each in tuned]
    plan = grids[0].plan  # all problems have its noise and its prompts
    return preset_text(tuned_preset(choice.preset, depth, plan.sigma, plan.aggregate, chosen), comments)


def told(tuned: Sequence[TuningResult]) -> list[dict[str, Any]]:
    """The choices for JSON."""
    return [
        {
            "problem": each.grid.problem,
            **each.chosen.point.setting.configuration,
            "setting": str(each.chosen.point),
            "means": {name: getattr(each.chosen.means, name) for name in SCORES},
            "facts": each.chosen.facts,
            "note": each.choice.note,
        }
        for each in tuned
    ]


def _number(value: int | float | None) -> float | None:
    return None if value is None else float(value)


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"
