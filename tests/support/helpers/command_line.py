"""What tests give to the command line: arguments and running text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

WORDS = (
    "In the city",
    "of Rome",
    "they speak",
    "Latin",
    "Ann Lee plays",
    "the sport of",
    "tennis",
    "golf",
    "Bo",
    "French",
)


def running_text(count: int = 80, seed: int = 0) -> list[str]:
    """Lines of text, enough of them for second moments of the small models."""
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=12)) for _ in range(count)]


def basic(folder: Path, **changes: Any) -> list[Any]:
    """A small study of the facts in ``folder``; options are changed, or left out where they are None."""
    options = {"model": folder / "model", "facts": folder / "facts.jsonl", "state": "hidden:1", "samples": 2, **changes}
    return [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
