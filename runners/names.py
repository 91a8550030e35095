"""The names that stand for files in options and settings: ``demo`` for the demo world's and its model's, ``smollm2``
for real facts; as a model ``smollm2`` is known to ``engine/run/model_files.py``. Files are made in the
cache folder when they are first asked for.

This module imports nothing that takes time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

Kind = Literal["model", "outline", "facts", "texts", "moments", "snippets"]
"""outline: the model's configuration and tokenizer, for which nothing is trained; snippets: reference texts."""


def path_of(name: str, kind: Kind) -> str:
    """The path of the file that a name stands for, if there is no file called that; else the name itself."""
    make = None if Path(name).exists() else _MAKERS.get(name)
    return str((make and make(kind)) or name)


def title_of(name: str, kind: Kind) -> str | None:
    """The title of such a file in results and messages; None for any other name."""
    if Path(name).exists():
        return None
    from causalcone.runners.demo.world import TITLES
    from causalcone.runners.real.relations import TITLE

    return {("smollm2", "facts"): TITLE, **{("demo", own): title for own, title in TITLES.items()}}.get((name, kind))


def _demo(kind: Kind) -> Path:
    from causalcone.runners.demo.model import demo_file

    return demo_file(kind)


def _real(kind: Kind) -> Path | None:
    from causalcone.runners.real.relations import facts_file

    return facts_file() if kind == "facts" else None


_MAKERS: dict[str, Callable[[Kind], Path | None]] = {"demo": _demo, "smollm2": _real}
