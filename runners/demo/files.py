"""The files that ``demo`` stands for in options and settings: the demo world's and its model's, in the cache folder.

This module imports nothing that takes time; files are made when they are first asked for.
"""

from pathlib import Path
from typing import Literal

DEMO = "demo"
Kind = Literal["model", "outline", "facts", "texts", "moments", "snippets"]
"""outline: the model's configuration and tokenizer, for which nothing is trained; snippets: reference texts."""


def path_of(name: str, kind: Kind) -> str:
    """The path of a demo file if ``name`` is ``demo`` and there is no file called that; else the name itself."""
    if not _is_demo(name):
        return name
    from causalcone.runners.demo.model import demo_file

    return str(demo_file(kind))


def title_of(name: str, kind: Kind) -> str | None:
    """The name of such a demo file in results and messages; None for any other name."""
    if not _is_demo(name):
        return None
    from causalcone.runners.demo.world import TITLES

    return TITLES[kind]


def _is_demo(name: str) -> bool:
    return name == DEMO and not Path(name).exists()
