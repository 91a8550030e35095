"""Computes units of a sweep, and writes the tables of each."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from causalcone.engine.edit.moments.identity import model_fingerprint
from causalcone.engine.errors import CausalconeError
from causalcone.engine.facts import Fact
from causalcone.runners.sweep.inputs.resources import Resources
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Unit
from causalcone.runners.sweep.stages import stages_of


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model as the driver knows it. fingerprint: changes with the weights."""

    model_type: str
    depth: int
    heads: int
    dtype: str
    device: str
    fingerprint: str


class Worker(Resources):
    """Computes units, one at a time."""

    def __init__(self, sweep: Sweep, place: str) -> None:
        super().__init__(sweep, place)
        self.stages = stages_of(sweep)

    def model_info(self) -> ModelInfo:
        session = self.session
        return ModelInfo(
            model_type=session.model.config.model_type,
            depth=session.sizes.depth,
            heads=session.sizes.heads,
            dtype=str(session.dtype).removeprefix("torch."),
            device=str(session.device),
            fingerprint=model_fingerprint(session.architecture),
        )

    def bad_facts(self, facts: Sequence[Fact]) -> list[tuple[str, str]]:
        """Facts that some stage cannot use, by id, with the reason; nothing is computed."""
        checks = [check for stage in self.stages.values() if (check := stage.fact_check(self)) is not None]
        bad = []
        for fact in facts:
            try:
                for check in checks:
                    check(fact)
            except CausalconeError as error:
                bad.append((fact.id, str(error)))
        return bad

    def run(self, unit: Unit) -> float:
        """Compute a unit and write its files; the seconds that it took."""
        started = time.monotonic()
        tables = self.stages[unit.stage].compute(unit, self)
        seconds = round(time.monotonic() - started, 3)
        notes = {"unit": unit.name, "configuration": self.sweep.hash, "items": unit.items, "seconds": seconds}
        for name in unit.tables:
            self.store.write_table(unit.file(name), tables[name], notes)
        return time.monotonic() - started
