"""A run that makes one table: its results stream to disk fact by fact, and can be read meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from causalcone.runners.results.folder import ResultFolder
from causalcone.runners.show.progress import shown_progress


@dataclass(frozen=True)
class TableRun:
    """A table called ``table`` that is yet to be computed: ``batches``, one for each of ``facts`` facts."""

    title: str
    table: str
    schema: pa.Schema
    facts: int
    batches: Iterator[pa.RecordBatch]

    def carry_out(self, folder: ResultFolder, console: Console, quiet: bool = False, keep: int = 0) -> RunSummary:
        """Compute the table into a folder; the first ``keep`` facts' batches are kept for figures. Whatever ends it
        early, the facts finished by then are in the table."""
        first: list[pa.RecordBatch] = []
        finished, started = 0, time.monotonic()
        progress_bar = shown_progress(console, self.title, quiet=quiet)
        with progress_bar as progress, folder.table(self.table, self.schema) as table:
            progress(0, self.facts)
            for finished, batch in enumerate(self.batches, start=1):
                table.write(batch)
                if finished <= keep:
                    first.append(batch)
                progress(finished, self.facts)
        return RunSummary(folder.path / self.table, finished, table.rows, time.monotonic() - started, tuple(first))


@dataclass(frozen=True)
class RunSummary:
    """The table that a run has written to ``path`` in ``seconds``; ``first`` are the batches of the first facts."""

    path: Path
    facts: int
    rows: int
    seconds: float
    first: tuple[pa.RecordBatch, ...]

    @property
    def results(self) -> dict[str, Any]:
        """The numbers for ``run.json``."""
        return {"facts": self.facts, "rows": self.rows, "seconds": round(self.seconds, 3)}

    def sentence(self) -> str:
        rate = f"{self.seconds:.1f} s ({self.facts / self.seconds:.2f} facts/s)"
        return f"{self.facts} facts, {self.rows} rows in {rate} -> {self.path}"
