"""The stage "sequence": every method edits the facts one batch after another, each on the model that the ones before
left."""

from collections.abc import Mapping
from math import ceil
from typing import Any

import pyarrow as pa
from pydantic import StrictBool, StrictStr

from causalcone.engine.errors import ExperimentError
from causalcone.engine.schemas import CHECKPOINT_SCHEMA, SEQUENCE_SCHEMA
from causalcone.runners.checked_files import Count
from causalcone.runners.edits.sequences import StoredSequence, stored_sequence
from causalcone.runners.edits.settings import Setting
from causalcone.runners.sweep.inputs.resources import Resources
from causalcone.runners.sweep.inputs.settings import Names, Sweep
from causalcone.runners.sweep.inputs.units import STATE, Selection, Unit
from causalcone.runners.sweep.stages.counts import Counts
from causalcone.runners.sweep.stages.edit import EditCounts, EditSettings, EditStage
from causalcone.runners.sweep.stages.stage import FILE_BYTES, ResultTable, StageCost, StageUnits, errors_of

METRICS = 10
"""Rows of an edit that is scored at a checkpoint."""


class SequenceSettings(EditSettings):
    """As ``EditSettings``, with exactly one layer; batch, checkpoint, sample, history, held_out: as of ``causalcone
    edit --sequential``."""

    methods: Names = ("memit-seq:5", "alphaedit:5")
    essence: StrictBool = False
    batch: Count = 100
    checkpoint: Count = 500
    sample: Count = 100
    history: StrictBool | None = None
    held_out: StrictStr | None = None


class SequenceStage(EditStage):
    name, title, table, item = "sequence", "sequences of edits", SequenceSettings, "edits"
    options: SequenceSettings

    def __init__(self, sweep: Sweep, options: SequenceSettings) -> None:
        super().__init__(sweep, options)
        self.tables = (
            ResultTable("checkpoints", CHECKPOINT_SCHEMA, row_bytes=12),
            ResultTable("sequence", SEQUENCE_SCHEMA, row_bytes=160),
        )

    def units(self, selection: Selection, depth: int) -> list[StageUnits]:
        works = []
        for problem, plan in self.plans.items():
            facts = selection.erasable if problem == "fact_erasure" else selection.known
            facts = facts[: self.options.facts]
            if any(len(self.layers(problem, setting, depth)) != 1 for setting in plan.settings):
                raise ExperimentError(
                    f"sequence.layers are {plan.layers}, and a sequence edits one window; give the layer in its centre"
                )
            units = [unit for group in self.groups_of(problem) for unit in self.cut(group, facts, max(1, len(facts)))]
            works.append(StageUnits(self, f"in sequence, {problem.replace('_', ' ')}", tuple(units), problem))
        return works

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        """Go on with the sequence where it ended, as its files say."""
        problem, setting, editor, requests = self.prepared(unit, resources)
        if not requests:
            return {table.name: table.schema.empty_table() for table in self.tables}
        layers = self.layers(problem, setting, resources.session.sizes.depth)
        kept: dict[str, Any] = {"root": STATE, "folder": unit.group}
        with errors_of("sequence"):
            stored: StoredSequence = stored_sequence(
                editor, requests, setting, layers, self.options, self.scoring(problem), resources.store, **kept
            )
        stored.carry_out()
        return stored.tables()

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        problem = next(problem for problem in self.plans if problem == units.subject)
        edits, options = EditCounts(self, problem, counts), self.options
        total = round(sum(weight for _, weight in edits.facts))
        ends = [*range(options.checkpoint, total, options.checkpoint), total]
        scored = sum(min(options.batch, end) + min(options.sample, max(0, end - options.batch)) for end in ends)
        share = scored / max(1, total)
        flops = edits.before() + sum(edits.making(each) + share * edits.scoring(each) for each in edits.settings)
        checkpoints = sum(METRICS * scored + (1 + each.window) * len(ends) for each in edits.settings)
        rows = {"sequence": len(edits.settings) * total, "checkpoints": checkpoints}
        batches = ceil(total / options.batch)
        state = sum(self._changes(each, total, batches, edits) for each in edits.settings)
        state += len(edits.settings) * (2 * batches + len(ends)) * FILE_BYTES  # beside changes, the tables in parts
        state += sum(table.row_bytes * rows[table.name] for table in self.tables)
        return StageCost(units, flops, rows, other_bytes=state)

    def _changes(self, setting: Setting, total: int, batches: int, edits: EditCounts) -> int:
        """Bytes of the changes of all batches, and of keys for the history."""
        hidden, inner = edits.sizes.hidden, edits.sizes.inner
        dense = setting.definition.rank is None
        return 4 * setting.window * (batches * hidden * inner if dense else total * (hidden + 3 * inner))
