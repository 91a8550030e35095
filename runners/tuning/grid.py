"""Grids of settings to try: for each method of each problem, all combinations of the grid's values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import inf
from typing import Any

from causalcone.engine.edit.requests.requests import ERROR_INJECTION
from causalcone.engine.errors import ExperimentError
from causalcone.runners.edits.presets import keys_of
from causalcone.runners.edits.settings import Change, EditPlan, Setting, changed, check_known, plan_of, record
from causalcone.runners.options import TuningOptions

_CAUTIOUS = dict.fromkeys(("kl_factor", "covariance_weight", "weight_decay", "stop_loss"), 1)
_CAUTIOUS |= dict.fromkeys(("norm_constraint", "clamp", "lr", "steps", "epochs"), -1)
"""Whether more of a usual hyperparameter makes an edit more cautious (1) or bolder (-1)."""


@dataclass(frozen=True)
class GridPoint:
    """A setting to try, and the hyperparameters that the grid varies."""

    number: int
    setting: Setting
    values: Mapping[str, int | float | str | None]

    @property
    def caution(self) -> tuple[float, ...]:
        """Larger for a more cautious setting, name by name."""
        signs = {**_CAUTIOUS, **self.setting.definition.caution}
        numbers = ((signs.get(name, 0), value) for name, value in self.values.items() if not isinstance(value, str))
        none = {-1: -inf}  # without a bound; a search that never stops is as one that stops at 0
        return tuple(none.get(sign, 0.0) if value is None else sign * value for sign, value in numbers)

    def __str__(self) -> str:
        texts = {name: "never" if value is None else value for name, value in self.values.items()}
        shown = {name: text if isinstance(text, str) else f"{text:g}" for name, text in texts.items()}
        return ", ".join(f"{name}={value}" for name, value in shown.items()) or "the defaults"


@dataclass(frozen=True)
class Grid:
    """The settings of a method to try for a problem."""

    problem: str
    setting: Setting
    points: tuple[GridPoint, ...]

    def __str__(self) -> str:
        return f"{self.setting} for {self.problem}"


@dataclass(frozen=True)
class ProblemGrids:
    """The grids of a problem: ``plan`` with each of their settings is tried."""

    plan: EditPlan
    grids: tuple[Grid, ...]

    @property
    def configuration(self) -> dict[str, Any]:
        """Everything that decides the results, name by name."""
        points = {
            str(grid.setting): {str(point.number): record(point.setting.hparams) for point in grid.points}
            for grid in self.grids
        }
        return {"sigma": self.plan.sigma, "aggregate": self.plan.aggregate, "grid": points}


def problem_grids(choice: TuningOptions) -> list[ProblemGrids]:
    """The grids that the options ask for. Raises ``ExperimentError`` naming the option that is wrong."""
    problems = choice.problem or [ERROR_INJECTION]
    if len(set(problems)) < len(problems):
        raise ExperimentError(f"a problem is given twice among {', '.join(problems)}; give each once")
    axes = [_Axis.parsed(text) for text in choice.grid or ()]
    plans = [plan_of(choice, problem, (choice.layer,), choice.aggregate) for problem in problems]
    for plan in plans:
        _check(plan.settings, axes, choice.changes or ())
    return [ProblemGrids(plan, tuple(_grid(plan.problem, s, axes) for s in plan.settings)) for plan in plans]


@dataclass(frozen=True)
class _Axis:
    """The values of a hyperparameter, of one method or of all that have it."""

    text: str
    changes: tuple[Change, ...]

    @classmethod
    def parsed(cls, text: str) -> _Axis:
        key, _, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        if not key.strip() or not all(values):
            raise ExperimentError(
                f"--grid {text!r} is not a grid; give NAME=V1,V2,... such as finetune.norm_constraint=1e-2,3e-3"
            )
        return cls(text, tuple(Change.parsed(f"{key}={value}", "--grid") for value in values))

    @classmethod
    def of(cls, name: str, values: Sequence[float]) -> _Axis:
        changes = [Change(f"{name}={value}", None, name, value, "--grid") for value in values]
        return cls(", ".join(change.text for change in changes), tuple(changes))

    @property
    def name(self) -> str:
        return self.changes[0].name

    def is_of(self, setting: Setting) -> bool:
        return self.changes[0].is_of(setting.method, setting.hparams)


def _check(settings: Sequence[Setting], axes: Iterable[_Axis], changes: Iterable[str]) -> None:
    """Refuse grids of nothing, changes of what grids vary, and settings that a preset cannot tell apart."""
    for axis in axes:
        check_known(axis.changes[0], settings)
    for change in map(Change.parsed, changes):
        for setting in settings:
            if change.is_of(setting.method, setting.hparams) and change.name in _names(_axes_of(setting, axes)):
                raise ExperimentError(f"{change}: the grid of {setting} varies that; leave it out, or give --grid")
    for first, second in combinations(settings, 2):
        if keys_of(first) == keys_of(second):
            raise ExperimentError(
                f"a preset has one setting for {first} and {second}; tune one of them, or each into a folder of its own"
            )


def _grid(problem: str, setting: Setting, axes: Iterable[_Axis]) -> Grid:
    applying = _axes_of(setting, axes)
    names = _names(applying)
    if len(set(names)) < len(names):
        raise ExperimentError(f"--grid has {', '.join(names)} for {setting}; give each name once")
    points: list[GridPoint] = []
    for changes in product(*(axis.changes for axis in applying)):
        hparams = changed(setting.method, setting.hparams, changes)
        values = {name: getattr(hparams, name) for name in names}
        if any(point.values == values for point in points):
            raise ExperimentError(
                f"--grid {', '.join(axis.text for axis in applying)}: a value is given twice; give it once"
            )
        points.append(GridPoint(len(points), replace(setting, hparams=hparams), values))
    return Grid(problem, setting, tuple(points))


def _axes_of(setting: Setting, axes: Iterable[_Axis]) -> list[_Axis]:
    """Those given for the setting's method, or by default the method's."""
    usual = [_Axis.of(name, values) for name, values in setting.definition.grid.items()]
    return [axis for axis in axes if axis.is_of(setting)] or usual


def _names(axes: Iterable[_Axis]) -> list[str]:
    return [axis.name for axis in axes]
