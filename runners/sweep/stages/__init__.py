"""The stages of a sweep, in the order in which they are carried out."""

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from pydantic import create_model

from causalcone.engine.edit.requests.requests import FACT_AMPLIFICATION
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Selection
from causalcone.runners.sweep.stages.edit import EditStage
from causalcone.runners.sweep.stages.filter import FilterStage
from causalcone.runners.sweep.stages.localization import GradientStage, SeverStage, TraceStage, ZeroStage
from causalcone.runners.sweep.stages.prepared import ContextsStage, MomentsStage, NoiseStage
from causalcone.runners.sweep.stages.sequence import SequenceStage
from causalcone.runners.sweep.stages.stage import Stage, StageUnits

PREPARED = (NoiseStage, ContextsStage, MomentsStage)
"""Stages that are there when others need them."""

TABLES: tuple[type[Stage[Any]], ...] = (TraceStage, SeverStage, ZeroStage, GradientStage, EditStage, SequenceStage)
"""Stages that are there when the sweep's file has their table."""

GROUP = "causalcone.sweep_stages"
"""The entry points by which other packages add stages, which come after these."""


def stage_types() -> dict[str, type[Stage[Any]]]:
    """All stages that a sweep's file can have a table for, by name."""
    return {stage.name: stage for stage in (*TABLES, *(entry.load() for entry in entry_points(group=GROUP)))}


def as_sweep(table: Mapping[str, Any]) -> Sweep:
    """The sweep of a TOML file's table; zsRE in Meng's form is by default edited towards the true answer. Raises
    pydantic's ``ValidationError``."""
    if table.get("zsre_form") == "meng" and isinstance(table.get("edit"), Mapping):
        table = {**table, "edit": {"problems": [FACT_AMPLIFICATION], **table["edit"]}}
    known = stage_types()
    used = [stage for name, stage in known.items() if stage in TABLES or name in table]
    fields: dict[str, Any] = {stage.name: (stage.table | None, None) for stage in used}
    sweep: Sweep = create_model("Sweep", __base__=Sweep, **fields).model_validate(table)
    return sweep


def stages_of(sweep: Sweep) -> dict[str, Stage[Any]]:
    """The stages of a sweep by name, in their order. Raises ``ExperimentError`` naming the key that is wrong."""
    tables = ((stage, getattr(sweep, name, None)) for name, stage in stage_types().items())
    asked = [stage(sweep, options) for stage, options in tables if options is not None]
    needed = [(stage, [user for user in asked if stage.name in user.needs]) for stage in PREPARED]
    prepared = [stage(sweep, users) for stage, users in needed if users]
    return {stage.name: stage for stage in (FilterStage(sweep, sweep.filter), *prepared, *asked)}


def later_units(stages: Iterable[Stage[Any]], selection: Selection, depth: int) -> list[StageUnits]:
    """Units of all stages after the filter. Raises ``ExperimentError`` for layers that a model of ``depth`` layers does
    not have."""
    return [units for stage in stages if not isinstance(stage, FilterStage) for units in stage.units(selection, depth)]
