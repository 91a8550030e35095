"""The commands of analysis: ``analyze`` and ``report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Argument, Option

from causalcone.runners.options import takes

_ANALYZE = """
[bold]Examples[/bold]

causalcone analyze study

causalcone analyze study --state mlp:10 --at subject_last --additive --out study/other
"""
_REPORT = """
[bold]Examples[/bold]

causalcone report study

causalcone report study --state mlp:10 --out mlp10.html
"""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The folder of a sweep, and how what it holds is analysed."""

    folder: Annotated[Path, Argument(metavar="DIR", help="The folder of a sweep, finished or not.")]
    state: Annotated[
        str | None,
        Option(help="Whose tracing effects, such as mlp:5; the first MLP state of the sweep by default."),
    ] = None
    at: Annotated[str, Option(help="Effects: max over the prompt's tokens, or at subject_last.")] = "max"
    denominator: Annotated[str, Option(help="Of restored fractions: p_high (published) or p_clean.")] = "p_high"
    aggregate: Annotated[
        str | None,
        Option(help="Paraphrases and neighbours: first (published) or mean; as the sweep says by default."),
    ] = None
    additive: Annotated[
        bool, Option("--additive", help="Layer and effect without their interaction (published: with it).")
    ] = False
    compat: Annotated[
        str | None,
        Option(help="published: mean effects by layer are of positive effects only; as the sweep says by default."),
    ] = None
    draws: Annotated[int, Option(help="Draws of the bootstrap and the permutation test.", min=100)] = 1000


def add_to(app: typer.Typer) -> None:
    """Make these commands of the app."""
    app.command(epilog=_ANALYZE)(analyze)
    app.command(epilog=_REPORT)(report)


@takes(StudyOptions)
def analyze(
    analysis: StudyOptions,
    out: Annotated[Path | None, Option(help="Folder for tables and figures; DIR/analysis by default.")] = None,
    mixed: Annotated[
        bool, Option("--mixed", help="Fit mixed-effects models too, with a random intercept per fact (slow).")
    ] = False,
    scatter: Annotated[
        bool, Option("--scatter-all", help="Scatter plots of every problem and method, not only the papers'.")
    ] = False,
    figures: Annotated[bool, Option(help="Draw figures.")] = True,
) -> None:
    """Answer whether localization informs editing: the papers' tables and figures from a sweep's folder.

    Writes each table as CSV, Markdown and LaTeX, all of them on one page (tables.md), and figures as PNG and PDF.
    """
    from causalcone.runners.commands.analyzing import analyze_folder

    place = out or analysis.folder / "analysis"
    analyze_folder(analysis, place, Console(), mixed=mixed, scatter=scatter, figures=figures)


@takes(StudyOptions)
def report(
    analysis: StudyOptions,
    out: Annotated[Path | None, Option(help="The page; DIR/report.html by default.")] = None,
) -> None:
    """Make a page of a sweep's answers: one HTML file that works without a network.

    It has the answer, scores by layer and method, effects by window size, an explorer of single facts, and a table.
    """
    from causalcone.runners.commands.analyzing import report_folder

    report_folder(analysis, out or analysis.folder / "report.html", Console())
