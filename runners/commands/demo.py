"""The command that shows what the program does on the demo model: ``demo``."""

import sys
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option


def demo(
    out: Annotated[Path, Option(help="Folder for the results.")] = Path("demo-results"),
    facts: Annotated[int, Option(help="How many facts of the demo world to trace.", min=1)] = 60,
    edits: Annotated[int, Option(help="How many facts to edit, by every method at every layer.", min=1)] = 10,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run that the folder holds.")] = False,
) -> None:
    """Train the demo model (once, some minutes), carry the sweep "demo" out on it, and show the findings.

    Traces facts of the demo model's world, edits some of them for every problem by every method, and goes on where it
    was when it ends early.
    """
    from causalcone.runners.commands.demo_run import run_demo

    finished = run_demo(out, facts, edits, Console(), overwrite)
    if finished.code:
        sys.exit(finished.code)


COMMANDS: dict[object, str | None] = {demo: None}
