"""The pieces of work that a sweep is made of: each computes some facts by one method, and writes files of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from causalcone.engine.edit.requests.requests import FACT_ERASURE, NOISY
from causalcone.engine.edit.requests.windows import as_layers, as_windows
from causalcone.engine.errors import ExperimentError
from causalcone.runners.results.store import Store, StoredPart
from causalcone.runners.sweep.config import Sweep

FILTER, NOISE, CONTEXTS, MOMENTS = "filter", "noise", "contexts", "moments"
TRACE, SEVER, ZERO, GRADIENTS, EDIT = "trace", "sever", "zero", "gradients", "edit"

PREPARED = {NOISE: "noise.json", CONTEXTS: "contexts.json", MOMENTS: "moments.safetensors"}
"""What is prepared once for all other work, and the file that it is kept in."""

TABLES = {
    FILTER: ("filter",),
    TRACE: ("traces",),
    SEVER: ("traces",),
    ZERO: ("traces",),
    GRADIENTS: ("gradients",),
    EDIT: ("probes", "metrics", "edits"),  # the last, so that no edit stands there without its scores
}
"""The tables that a stage writes, in the order in which a unit does."""

FAILURES, LEFT_OUT = "failures", "left_out"


@dataclass(frozen=True)
class Unit:
    """Some facts, by their places in the table of facts, at one stage of the sweep; group: the folder in its tables;
    number: its own among the units of the group; items: how many facts or edits are to come of it."""

    stage: str
    group: str
    number: int
    facts: tuple[int, ...]
    items: int
    problem: str | None = None
    setting: int | None = None

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.stage, self.group, f"{self.number:05}") if part)

    @property
    def files(self) -> tuple[str, ...]:
        """What is there when it is done."""
        if self.stage in PREPARED:
            return (PREPARED[self.stage],)
        return tuple(self.file(table) for table in TABLES[self.stage])

    def file(self, table: str) -> str:
        return "/".join(part for part in (table, self.group, f"part-{self.number:05}.parquet") if part)

    @property
    def failure(self) -> str:
        """The file that says why it failed, where it did."""
        return f"{FAILURES}/{self.name.replace('/', '-')}.parquet"

    @property
    def left_out(self) -> str:
        """The file of the facts that it could not use, where there are any."""
        return f"{LEFT_OUT}/{self.name.replace('/', '-')}.parquet"

    def parts(self, store: Store) -> list[StoredPart] | None:
        """The files that it wrote, if all of them are there and whole, and its own."""
        if self.stage in PREPARED:
            return [StoredPart(0, {})] if store.exists(self.files[0]) else None
        parts = [store.part(file) for file in self.files]
        if any(part is None or part.notes.get("unit") != self.name for part in parts):
            return None
        return [part for part in parts if part is not None]


@dataclass(frozen=True)
class Stage:
    """Units of one kind. unit: what their items are."""

    name: str
    title: str
    unit: str
    units: tuple[Unit, ...]

    @property
    def items(self) -> int:
        return sum(unit.items for unit in self.units)


@dataclass(frozen=True)
class Chosen:
    """Which facts go on from the filter, by their places: all that are traced and edited, and those that are erased."""

    known: tuple[int, ...]
    erasable: tuple[int, ...]


def filter_stage(sweep: Sweep, facts: int) -> Stage:
    """What the model knows of all facts."""
    units = _cut(FILTER, "", range(facts), sweep.units.facts)
    return Stage(FILTER, "what the model knows", "facts", tuple(units))


def later_stages(sweep: Sweep, chosen: Chosen, depth: int) -> list[Stage]:
    """All stages behind the filter, in the order in which they are carried out."""
    stages = [_prepared(name) for name in _preparations(sweep)]
    stages += [stage for stage in _localization(sweep, chosen) if stage.units]
    if sweep.edit is not None:
        stages += [_editing(sweep, chosen, problem, depth) for problem in sweep.edit.problems]
    return stages


def edit_layers(sweep: Sweep, problem: str, depth: int) -> tuple[int, ...]:
    """The layers, or centres of windows, that a problem's edits are made at. Raises ``ExperimentError`` for one that
    the model does not have."""
    try:
        return as_layers(sweep.plan(problem).layers, depth)
    except ExperimentError as error:
        raise ExperimentError(f"edit.layers: {error}") from error


def moment_layers(sweep: Sweep, depth: int) -> list[int]:
    """The layers that edits need second moments of."""
    found: set[int] = set()
    for problem in sweep.edit.problems if sweep.edit else ():
        for setting in sweep.plan(problem).of_moments:
            for window in as_windows(edit_layers(sweep, problem, depth), setting.window, depth):
                found |= set(window.layers)
    return sorted(found)


def _preparations(sweep: Sweep) -> Iterator[str]:
    edits = sweep.edit
    if sweep.trace or sweep.sever or (edits and any(problem in NOISY for problem in edits.problems)):
        yield NOISE
    plan = None if edits is None else sweep.plan(edits.problems[0])
    if plan is not None and plan.of_contexts:
        yield CONTEXTS
    if plan is not None and plan.of_moments:
        yield MOMENTS


def _prepared(name: str) -> Stage:
    titles = {NOISE: "level of noise", CONTEXTS: "contexts", MOMENTS: "second moments"}
    return Stage(name, titles[name], "files", (Unit(name, "", 0, (), 1),))


def _localization(sweep: Sweep, chosen: Chosen) -> Iterator[Stage]:
    size = sweep.units.facts
    if sweep.trace is not None:
        units = _cut(TRACE, "restore", chosen.known[: sweep.trace.facts], size)
        yield Stage(TRACE, "causal tracing", "facts", tuple(units))
    if sweep.sever is not None:
        own = chosen.known[: sweep.sever.facts]
        parts = [unit for part in sweep.sever.parts for unit in _cut(SEVER, f"sever_{part}", own, size)]
        yield Stage(SEVER, "severed tracing", "facts", tuple(parts))
    if sweep.zero is not None:
        units = _cut(ZERO, "zero", chosen.known[: sweep.zero.facts], size)
        yield Stage(ZERO, "zeroing", "facts", tuple(units))
    if sweep.gradients is not None:
        units = _cut(GRADIENTS, "", chosen.known[: sweep.gradients.facts], size)
        yield Stage(GRADIENTS, "integrated gradients", "facts", tuple(units))


def _editing(sweep: Sweep, chosen: Chosen, problem: str, depth: int) -> Stage:
    assert sweep.edit is not None
    facts = (chosen.erasable if problem == FACT_ERASURE else chosen.known)[: sweep.edit.facts]
    layers = len(edit_layers(sweep, problem, depth))
    units: list[Unit] = []
    for number, setting in enumerate(sweep.plan(problem).settings):
        size = max(1, len(facts)) if setting.definition.joint else max(1, sweep.units.edits // layers)
        group = f"{problem}/{setting.method}-{setting.window}"
        units += _cut(EDIT, group, facts, size, layers, problem, number)
    return Stage(EDIT, problem.replace("_", " "), "edits", tuple(units))


def _cut(
    stage: str,
    group: str,
    facts: Sequence[int],
    size: int,
    each: int = 1,
    problem: str | None = None,
    setting: int | None = None,
) -> list[Unit]:
    """Units of so many facts, one after the other, each fact giving so many items."""
    starts = range(0, len(facts), size)
    return [
        Unit(stage, group, number, own := tuple(facts[start : start + size]), each * len(own), problem, setting)
        for number, start in enumerate(starts)
    ]
