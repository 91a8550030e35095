"""The folder of a tuning: a record of what is asked for, and for each setting that is tried a folder of results."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from causalcone.engine.atomic import replacing
from causalcone.runners.edits.study import MOMENTS
from causalcone.runners.results.folder import ResultError, clear, differences, refuse_occupied, versions, writing
from causalcone.runners.tuning.grid import Grid, GridPoint, ProblemGrids

RECORD, TABLE, PRESET, GRID = "tuning.json", "tuning.parquet", "preset.toml", "grid"
PARTIAL = f"{MOMENTS}.partial"
LOCK = "tuning.lock"
RUNNING, STOPPED, COMPLETE = "running", "stopped", "complete"

_FILES = (GRID, TABLE, PRESET, MOMENTS, PARTIAL, RECORD)  # the last to go says that the rest is ours
_ELSEWHERE = ("device", "versions")
"""What may change between the beginning and the end: where results are computed, and by which versions."""


class TuningFolder:
    """A folder in which a tuning is begun or goes on. Nothing is written yet. Raises ``ResultError`` for one that holds
    anything else, unless that is a tuning and to be overwritten."""

    def __init__(self, path: Path, configuration: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path
        self.configuration = _as_json(configuration)
        self._begun, self._lock = False, FileLock(path / LOCK, timeout=0)
        record = self._earlier()
        self._drop = record is not None and overwrite
        self.record: dict[str, Any] = {} if record is None or overwrite else record
        if self.record:
            self._refuse_other(RECORD, self.record["configuration"], self.configuration)
            self._warn_of_versions(self.record["versions"])

    def holds(self, problems: Sequence[ProblemGrids]) -> bool:
        """Whether all settings have been tried, and their results are still there."""
        grids = [grid for posed in problems for grid in posed.grids]
        paths = [self.path_of(grid, point) for grid in grids for point in grid.points]
        return self.record.get("status") == COMPLETE and all((path / "run.json").exists() for path in paths)

    def begin(self, depth: int) -> None:
        """Write the record; depth: layers of the model."""
        if self._begun:
            return
        with writing(f"to {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                raise ResultError(f"another process is at work in {self.path}; wait for it, or stop it") from None
            self._begun = True
            if self._drop:
                clear(self.path, _FILES)
        self.record = {"configuration": self.configuration, "versions": versions(), "depth": depth}
        self.write(RUNNING)

    def release(self) -> None:
        self._lock.release()

    def write(self, status: str, **results: Any) -> None:
        """Write the record, with a status and results."""
        self.record = {**self.record, "status": status, **results}
        self.write_text(RECORD, json.dumps(self.record, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        with self.writing(name) as partial:
            partial.write_text(text, encoding="utf-8")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yields a path to write a file to, which is there whole or not at all."""
        with writing(self.path / name, "; finished settings are kept"), replacing(self.path / name) as partial:
            yield partial

    def stopped(self) -> bool:
        """Note that the tuning ended early; whether it had begun."""
        if self._begun:
            self.write(STOPPED)
        return self._begun

    def path_of(self, grid: Grid, point: GridPoint) -> Path:
        """The folder of a setting's results."""
        setting = grid.setting
        return self.path / GRID / grid.problem / f"{setting.method}-{setting.window}" / str(point.number)

    def is_done(self, path: Path, configuration: Mapping[str, Any]) -> bool:
        """Whether a setting's results are there; refuses those of another configuration."""
        run = _read(path / "run.json")
        if run is None or run.get("status") != COMPLETE:
            return False
        now = _as_json(configuration)
        self._refuse_other(path.relative_to(self.path).as_posix(), {key: run.get(key) for key in now}, now)
        self._warn_of_versions(run["versions"])
        return True

    def _earlier(self) -> dict[str, Any] | None:
        """The record of the folder; refuses a folder of anything else."""
        record = _read(self.path / RECORD)
        if record is None:
            refuse_occupied(self.path, overwrite=False)
            for name in _FILES:
                if (self.path / name).exists():
                    raise ResultError(f"{self.path} holds files of another origin ({name}, ...); choose another folder")
        return record

    def _refuse_other(self, name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if changes := [line for line in differences(before, now) if line.split(":")[0] not in _ELSEWHERE]:
            raise ResultError(
                f"{self.path} holds a tuning of another configuration ({name}):\n  " + "\n  ".join(changes) + "\n"
                "choose another folder, or give --overwrite to drop what is there"
            )

    def _warn_of_versions(self, before: Mapping[str, Any]) -> None:
        if changes := differences(before, versions()):
            warnings.warn(f"{self.path} was begun with other versions: {'; '.join(changes)}", stacklevel=2)


def _as_json(configuration: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(configuration)))


def _read(path: Path) -> dict[str, Any] | None:
    """The record in a file; None where there is none that can be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
