"""The commands of analysis: ``analyze`` and ``report``."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

from causalcone.runners.commands.shared import takes
from causalcone.runners.options import StudyOptions


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
    from causalcone.runners.commands.analysis_run import analyze_folder

    out = out or analysis.folder / "analysis"
    analyze_folder(analysis, out, Console(), mixed=mixed, scatter=scatter, figures=figures)


@takes(StudyOptions)
def report(
    analysis: StudyOptions, out: Annotated[Path | None, Option(help="The page; DIR/report.html by default.")] = None
) -> None:
    """Make a page of a sweep's answers: one HTML file that works without a network.

    It has the answer, scores by layer and method, effects by window size, an explorer of single facts, and a table.
    """
    from causalcone.runners.commands.analysis_run import open_study, write_page

    study, options = open_study(analysis)
    write_page(study, options, out or analysis.folder / "report.html", Console())


COMMANDS = {
    analyze: """
causalcone analyze study
causalcone analyze study --state mlp:10 --at subject_last --additive --out study/other
""",
    report: """
causalcone report study
causalcone report study --state mlp:10 --out mlp10.html
""",
}
