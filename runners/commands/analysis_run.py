"""Carries out ``causalcone analyze`` and ``report``: tables, figures and a page, and the answer on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.table import Table as TerminalTable

from causalcone.analysis.effects import At, Compat, Denominator
from causalcone.analysis.papers.inputs import AnalysisInputs, AnalysisOptions
from causalcone.analysis.papers.records import ABOUT
from causalcone.analysis.papers.table_files import cells, index, write_table
from causalcone.analysis.papers.tables import MAIN, Table, answer, paper_tables
from causalcone.analysis.scores import Aggregate
from causalcone.analysis.sequences import overview
from causalcone.analysis.sweep_results import State, Study
from causalcone.analysis.tables.names import counted
from causalcone.analysis.tables.traces import TableError
from causalcone.engine.atomic import write_text
from causalcone.engine.errors import ExperimentError
from causalcone.engine.localize.states import HEADS, as_states
from causalcone.runners.options import StudyOptions
from causalcone.runners.results.folder import ResultError

if TYPE_CHECKING:
    from causalcone.runners.sweep.status import Status

_TABLES, _FIGURES = "tables", "figures"
_COLUMNS = ("problem", "method", "window", "r2_layer", "r2_trace", "r2_both", "diff", "p")


def analyze_folder(
    analysis: StudyOptions, out: Path, console: Console, *, mixed: bool, scatter: bool, figures: bool
) -> None:
    """Write tables and figures, and print the answer. Raises ``TableError`` for a folder that is not a sweep's, and
    ``ResultError`` where nothing can be written."""
    study, options = open_study(analysis, mixed)
    tables, missing = paper_tables(study, options)
    if study.sequences is not None:
        tables.append(Table("sequences", "Edits in sequence, by the number of edits made", overview(study.sequences)))
    drawn: list[Path] = []
    with _writing(out):
        for table in tables:
            write_table(table, out / _TABLES)
        if figures:
            from causalcone.analysis.papers.figures import paper_figures

            drawn, undrawn = paper_figures(study, out / _FIGURES, options, every=scatter)
            missing += undrawn
        write_text(out / "tables.md", index(tables, missing))
        with suppress(TableError):  # without traces there is no protocol
            about = {"label": study.title, "protocol": AnalysisInputs(study, options).protocol}
            write_text(out / _TABLES / ABOUT, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    for table in tables:
        if table.name == MAIN:
            console.print(_terminal_table(table))
    sentences = [
        f"{counted(len(tables), 'table')} -> {out / 'tables.md'} (and {out / _TABLES}, as CSV, Markdown and LaTeX)"
    ]
    sentences += [f"{counted(len(drawn) // 2, 'figure')} -> {out / _FIGURES}"] if drawn else []
    _print(console, answer(tables), missing, *sentences)


def write_page(study: Study, options: AnalysisOptions, out: Path, console: Console) -> None:
    """Write the page of a study, and print its answer and what is missing."""
    from causalcone.analysis.page.report import report, report_data

    progress = None if study.run["status"] == "complete" else _progress(study.folder)
    data = report_data(study, options, progress.rows() if progress else ())
    if progress:  # which knows of killed processes
        data.about["status"] = progress.status
    with _writing(out):
        write_text(out, report(data))
    sentence = f"report -> {out} ({out.stat().st_size / 2**20:.1f} MiB; open it in a browser)"
    _print(console, str(data.about["answer"]), data.about["missing"], sentence)


def _progress(folder: Path) -> Status | None:
    """How far the sweep of a folder is; nothing where its stages or settings are not known here."""
    from pydantic import ValidationError

    from causalcone.runners.sweep.status import status_of

    try:
        return status_of(str(folder))
    except (ValidationError, KeyError):
        return None


def open_study(analysis: StudyOptions, mixed: bool = False) -> tuple[Study, AnalysisOptions]:
    """The folder, and the options as they were typed, checked."""
    for name, kind in {"at": At, "denominator": Denominator, "aggregate": Aggregate, "compat": Compat}.items():
        value, known = getattr(analysis, name), get_args(kind)
        if value is not None and value not in known:
            raise ExperimentError(f"--{name} is {value!r}; choose from {', '.join(known)}")
    state: State | None = None
    if analysis.state is not None:
        (parsed,) = as_states((analysis.state,))
        if parsed.kind == HEADS:
            raise ExperimentError(f"--state is {analysis.state!r}; give one state, such as mlp:5 or head.3:1")
        state = (parsed.kind, parsed.window)
    options = AnalysisOptions(
        state=state,
        at=analysis.at,  # type: ignore[arg-type]
        denominator=analysis.denominator,  # type: ignore[arg-type]
        interaction=not analysis.additive,
        draws=analysis.draws,
        mixed=mixed,
        compat=analysis.compat,  # type: ignore[arg-type]
        beside=analysis.beside,
    )
    study = Study(analysis.folder, analysis.aggregate, analysis.answer_score)  # type: ignore[arg-type]
    return study, options


def _terminal_table(table: Table) -> TerminalTable:
    frame = table.frame.select([name for name in _COLUMNS if name in table.frame.columns])
    terminal_table = TerminalTable(
        title=table.title, title_justify="left", caption="; ".join(table.notes), caption_justify="left"
    )
    header, rows = cells(frame)
    for name in header:
        terminal_table.add_column(name, justify="left" if name in ("problem", "method") else "right")
    for row in rows:
        terminal_table.add_row(*row)
    return terminal_table


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResultError(f"cannot write to {out}: {error.strerror or error}") from error


def _print(console: Console, answer: str, missing: Iterable[str], *sentences: str) -> None:
    for line in (answer, *(f"missing: {reason}" for reason in missing), *sentences):
        console.print(line, highlight=False, markup=False)
