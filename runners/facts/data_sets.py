"""Data sets of Hugging Face's hub or of a folder, read, and downloaded, no further than their rows are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from causalcone.engine.errors import ExperimentError


@dataclass(frozen=True)
class DataSet:
    """The rows of a split, as dictionaries."""

    name: str
    config: str | None
    split: str
    rows: Any

    @classmethod
    def open(cls, name: str, config: str | None, split: str) -> DataSet:
        """Raises ``ExperimentError`` where it cannot be read; so does taking its rows."""
        try:
            from datasets import load_dataset
        except ImportError:
            raise ExperimentError(
                f"the data set {name!r} needs the package datasets (pip install 'causalcone[datasets]'); "
                "without it, give a file"
            ) from None
        rows = _read(name, split, lambda: load_dataset(name, config, split=split, streaming=True))
        return cls(name, config, split, rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self.rows)
        while (row := _read(self.name, self.split, lambda: next(rows, None))) is not None:
            yield row

    def __str__(self) -> str:
        return ", ".join([f"data set {self.name}", *([self.config] if self.config else []), f"split {self.split}"])


def _read(name: str, split: str, read: Callable[[], Any]) -> Any:
    """The result of ``read``; any failure is bad input, since name, network and files are the user's."""
    try:
        return read()
    except Exception as error:
        raise ExperimentError(
            f"the split {split!r} of the data set {name!r} cannot be read: {error}; "
            "check the name, --split and --dataset-config"
        ) from error
