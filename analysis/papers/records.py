"""Studies on record: final tables of a paper, or of an earlier study, that are set beside a study's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import Traversable
from importlib.resources import files
from pathlib import Path

import polars as pl

from causalcone.analysis.stats.regressions import GROUP
from causalcone.analysis.tables.traces import TableError

ABOUT, ON_RECORD, APART = "study.json", "on record: ", "are of other options, and not set beside"
RECORD = "record_"
"""What the names of its columns begin with, beside those of a study."""


@dataclass(frozen=True)
class Record:
    """A folder of tables in the form that ``causalcone analyze`` writes: NAME.csv, and ``study.json`` with the label
    (whose they are) and the protocol (how they were computed, as the last note of such tables says)."""

    folder: Traversable
    label: str
    protocol: str

    @classmethod
    def open(cls, name: str) -> Record:
        """The study of that name in ``analysis/papers/published``, or in that folder; ``TableError`` where there is
        none."""
        known = files("causalcone.analysis").joinpath("papers/published")
        folder = known / name if (known / name).is_dir() else Path(name)
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            return cls(folder, str(about["label"]), str(about["protocol"]))
        except (OSError, ValueError, KeyError, TypeError):
            names = ", ".join(sorted(each.name for each in known.iterdir()))
            raise TableError(
                f"there are no tables on record of {name!r}; give a folder of tables that 'causalcone analyze' wrote, "
                f"with their {ABOUT}, or choose from {names}"
            ) from None

    def table(self, name: str) -> pl.DataFrame | None:
        """A table; p may be a text like "<1e-4"."""
        file = self.folder / f"{name}.csv"
        return pl.read_csv(file.read_bytes(), infer_schema_length=None) if file.is_file() else None


def beside(frame: pl.DataFrame, name: str, record: Record | None, on: Sequence[str] = GROUP) -> pl.DataFrame:
    """A frame with the values on record of the table of that name in further columns, ``record_`` and their names; its
    rows are told apart by the columns ``on``."""
    table = None if record is None else record.table(name)
    if table is None:
        return frame
    values = [each for each in table.columns if each in frame.columns and each not in (*on, "note")]
    named = table.select(*on, *(pl.col(each).alias(f"{RECORD}{each}") for each in values))
    return frame.join(named, on=on, how="left", maintain_order="left", validate="m:1")
