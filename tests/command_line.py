"""Arguments of the command line in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def basic(folder: Path, **changes: Any) -> list[Any]:
    """A small study of the facts in ``folder``; options are changed, or left out where they are None."""
    options = {"model": folder / "model", "facts": folder / "facts.jsonl", "state": "hidden:1", "samples": 2, **changes}
    return [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
