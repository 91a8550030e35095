"""The pieces of work that a sweep is made of: each computes some facts by one method, and writes files of its own."""

from dataclasses import dataclass

from causalcone.runners.results.store import Store, StoredPart

FAILURES, LEFT_OUT = "failures", "left_out"

STATE = "state"
"""The folder of files that units go on from."""

YOUNGER = ("texts",)
"""Tables that units of earlier versions did not write: they are done without."""


@dataclass(frozen=True)
class Unit:
    """Some facts, by their rows in the table of facts, at one stage of the sweep.

    group: the folder in the stage's tables; number: that of the unit in its group; items: how many facts or edits come
    of it; tables: those it writes, in that order; prepared: the file that it writes instead of tables.
    """

    stage: str
    group: str
    number: int
    facts: tuple[int, ...]
    items: int
    tables: tuple[str, ...] = ()
    prepared: str | None = None

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.stage, self.group, f"{self.number:05}") if part)

    @property
    def files(self) -> tuple[str, ...]:
        """Files that are there when it is done."""
        return (self.prepared,) if self.prepared else tuple(self.file(table) for table in self.tables)

    def file(self, table: str) -> str:
        return "/".join(part for part in (table, self.group, f"part-{self.number:05}.parquet") if part)

    @property
    def failure(self) -> str:
        """The file that says why it failed, if it did."""
        return f"{FAILURES}/{self.name.replace('/', '-')}.parquet"

    @property
    def left_out(self) -> str:
        """The file of the facts that it could not use, if there are any."""
        return f"{LEFT_OUT}/{self.name.replace('/', '-')}.parquet"

    def parts(self, store: Store) -> list[StoredPart] | None:
        """The files that it wrote, if all of them are there, whole, and of this unit."""
        if self.prepared:
            return [StoredPart(0, {})] if store.exists(self.prepared) else None
        parts = {table: store.part(self.file(table)) for table in self.tables}
        found = {table: part for table, part in parts.items() if part is not None or table not in YOUNGER}
        if any(part is None or part.notes.get("unit") != self.name for part in found.values()):
            return None
        return [part for part in found.values() if part is not None]


@dataclass(frozen=True)
class Selection:
    """The facts that go on from the filter, by their rows: all that are traced and edited, and those to be erased."""

    known: tuple[int, ...] = ()
    erasable: tuple[int, ...] = ()
