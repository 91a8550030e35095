"""One tracing run from start to folder: streams a tracer's results to disk and draws what was asked for."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from causalcone.engine.facts import Fact
from causalcone.engine.states import State
from causalcone.engine.tables import TRACE_SCHEMA
from causalcone.engine.tracing import Tracer
from causalcone.runners.progress import fact_progress
from causalcone.runners.results import ResultFolder


@dataclass(frozen=True)
class TraceOptions:
    """What ``Tracer.stream`` is asked for; ``sigma`` is a number by now."""

    states: tuple[State, ...]
    samples: int
    sigma: float
    seed: int
    target: str
    tokens: str | tuple[int, ...]
    on_error: str = "raise"

    def configuration(self) -> dict[str, Any]:
        return {**asdict(self), "states": [str(state) for state in self.states]}


@dataclass(frozen=True)
class TraceResult:
    """What a run wrote: ``folder`` with ``facts`` traced in ``seconds``, and the figures drawn."""

    folder: Path
    facts: int
    rows: int
    seconds: float
    plots: tuple[Path, ...]

    @property
    def traces(self) -> Path:
        return self.folder / "traces"


def run_trace(
    tracer: Tracer,
    facts: Sequence[Fact],
    options: TraceOptions,
    folder: ResultFolder,
    console: Console,
    plots: int = 0,
    quiet: bool = False,
) -> TraceResult:
    """Trace ``facts`` into ``folder`` and draw the first ``plots`` of them, and the average indirect effect.

    Whatever ends the run early, the facts finished by then are in the folder's ``traces``.
    """
    drawn: list[pa.RecordBatch] = []
    finished = 0
    started = time.monotonic()
    with (
        fact_progress(console, "tracing", quiet) as progress,
        folder.table("traces", TRACE_SCHEMA) as table,
    ):
        for batch in tracer.stream(facts, progress=progress, **vars(options)):
            table.write(batch)
            if finished < plots:
                drawn.append(batch)
            finished += 1
    seconds = time.monotonic() - started
    figures = draw(folder.path, drawn) if plots else ()
    folder.finish(facts=finished, rows=table.rows, seconds=round(seconds, 3))
    return TraceResult(folder.path, finished, table.rows, seconds, figures)


def draw(folder: Path, batches: Sequence[pa.RecordBatch]) -> tuple[Path, ...]:
    """Heat maps of each batch's fact, and the average indirect effect of all of the folder's facts."""
    from causalcone.analysis import plot

    plots = folder / "plots"
    paths = []
    for number, batch in enumerate(batches):
        fact_id = batch["fact_id"][0].as_py()
        path = plots / f"{number:03}-{re.sub(r'[^A-Za-z0-9_-]+', '_', fact_id)[:60]}.png"
        plot.heatmaps(pa.Table.from_batches([batch]), fact_id, path=path)
        paths.append(path)
    average = plots / "average_indirect_effect.png"
    plot.indirect_effect(folder / "traces", path=average)
    return (*paths, average)
