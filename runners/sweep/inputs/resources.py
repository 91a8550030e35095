"""The model, facts and results that units of a sweep are computed with."""

from collections.abc import Sequence
from functools import cached_property

import pyarrow as pa

from causalcone.engine.compute import Compute
from causalcone.engine.facts import Fact, Skipped
from causalcone.engine.localize.tracer import Tracer
from causalcone.engine.run.session import Session
from causalcone.engine.schemas import LEFT_OUT_SCHEMA
from causalcone.runners.inputs.inputs import open_model
from causalcone.runners.names import path_of
from causalcone.runners.results.store import Store
from causalcone.runners.sweep.inputs.facts_table import FACTS, facts_of
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Unit

NOISE_FILE = "noise.json"


class Resources:
    """Everything that a unit is computed with; the model and the facts are read at first use."""

    def __init__(self, sweep: Sweep, place: str) -> None:
        self.sweep, self.store = sweep, Store.open(place)

    @cached_property
    def tracer(self) -> Tracer:
        sweep = self.sweep
        compute = Compute.of(sweep.dtype, sweep.device, sweep.memory, sweep.kernels, sweep.tf32)
        return Tracer.on(open_model(path_of(sweep.model, "model"), compute, form=sweep.form))

    @property
    def session(self) -> Session:
        return self.tracer.session

    @cached_property
    def facts(self) -> list[Fact]:
        """All facts of the sweep."""
        return facts_of(self.store.read_table(FACTS))

    def facts_of(self, unit: Unit) -> list[Fact]:
        return [self.facts[number] for number in unit.facts]

    @cached_property
    def noise_level(self) -> float:
        """The prepared standard deviation of noise."""
        return float(self.store.read_json(NOISE_FILE)["sigma"])

    def leave_out(self, unit: Unit, skipped: Sequence[Skipped]) -> None:
        """Note the facts that a unit cannot use."""
        if skipped:
            rows = [{"fact_id": fact.fact_id, "unit": unit.name, "reason": fact.reason} for fact in skipped]
            table = pa.Table.from_pylist(rows, schema=LEFT_OUT_SCHEMA)
            self.store.write_table(unit.left_out, table, {"unit": unit.name})
