"""A folder of results: the configuration in ``run.json``, tables as Parquet parts that can be read while they grow."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from causalcone.engine.atomic import replacing, write_text
from causalcone.engine.errors import CausalconeError
from causalcone.engine.schemas import SCHEMA_VERSION, VERSION_KEY

PART_ROWS = 50_000
PART_SECONDS = 5.0
PART_SHARE = 0.05
_TABLES = ("traces", "severed", "zeroed", "gradients", "edits", "probes", "metrics", "texts", "sequence", "checkpoints")
_NAMES = (*_TABLES, "batches", "deltas", "plots", "run.json")  # the last to go says that the rest is ours
MOMENTS = "moments.safetensors"
_ANY = ("device", "kernels")
"""May differ where a run goes on: they do not decide the results."""
_LONGEST = 300
"""Characters of a difference that are shown."""


class ResultError(CausalconeError):
    """An output folder that cannot be written or holds another run."""


def refuse_occupied(path: str | os.PathLike[str], overwrite: bool) -> None:
    """``ResultError`` for a file, files of another origin, and another run unless that is to be overwritten."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ResultError(f"{path} is a file; name a folder to write results to")
    if any((path / name).exists() for name in _NAMES):
        if not overwrite:
            raise ResultError(f"{path} already holds a run; choose another folder, or give --overwrite")
        if not (path / "run.json").exists():
            raise ResultError(f"{path} holds files of another origin; choose another folder")


class ResultFolder:
    """``path`` made ready for a run described by ``configuration``; refuses a folder that holds one already, or, where
    a run can ``resume``, one of another configuration."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        configuration: Mapping[str, Any],
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.path = Path(path)
        self.configuration = {**configuration, "schema": SCHEMA_VERSION, "versions": versions()}
        with writing(f"to {self.path}"):
            if resume and not overwrite and self._goes_on():
                self._write_run("running")
                return
            refuse_occupied(self.path, overwrite)
            left = self.path / MOMENTS  # by the run before, unless it is where this one has its moments from
            given = Path(str(configuration.get("moments_given"))).resolve() == left.resolve()
            clear(self.path, _NAMES if given or not (self.path / "run.json").exists() else (MOMENTS, *_NAMES))
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_run("running")

    def _goes_on(self) -> bool:
        """Whether a run of this configuration is there; refuses one of another."""
        try:
            before = json.loads((self.path / "run.json").read_text())
        except (FileNotFoundError, ValueError):
            return False
        now = json.loads(json.dumps(self.configuration))
        if versions := "; ".join(differences(before.get("versions", {}), now.pop("versions"))):
            warnings.warn(f"{self.path} was begun with other versions: {versions}", stacklevel=3)
        old, new = ({key: _numbered(of.get(key)) for key in now if key not in _ANY} for of in (before, now))
        if changes := [line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..." for line in differences(old, new)]:
            raise ResultError(
                "\n  ".join([f"{self.path} holds a run of another configuration:", *changes])
                + "\ngive what it was begun with, choose another folder, or give --overwrite"
            )
        return True

    def __enter__(self) -> ResultFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Record it where the run ended early."""
        if kind is not None:
            with suppress(OSError):  # of the two errors, the one that ended the run is shown
                self._write_run("stopped")

    def table(self, name: str, schema: pa.Schema) -> TableWriter:
        """A writer for the table ``name``, whose parts carry the run's configuration as metadata."""
        return TableWriter(self.path / name, schema, self.configuration)

    def finish(self, **results: Any) -> None:
        """Record that everything asked for is there."""
        with writing(f"to {self.path}", "; its tables are whole"):
            self._write_run("complete", results=results)

    def _write_run(self, status: str, **results: Any) -> None:
        text = json.dumps({**self.configuration, "status": status, **results}, indent=1)
        write_text(self.path / "run.json", text + "\n")


class TableWriter:
    """Appends record batches to ``folder`` as files ``part-00000.parquet`` and so on, each written whole or not at all:
    every ``PART_ROWS`` rows or ``PART_SECONDS`` seconds (later ``PART_SHARE`` of the time so far, so that long runs do
    not leave thousands of files), and at the end whatever ended it: what was finished stays readable."""

    def __init__(self, folder: Path, schema: pa.Schema, notes: Mapping[str, Any]) -> None:
        self.folder, self.schema, self.notes = folder, schema, notes
        self.parts = self.rows = 0
        self._held: list[pa.RecordBatch] = []
        self._started = self._since = time.monotonic()

    def __enter__(self) -> TableWriter:
        with writing(f"to {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def write(self, batch: pa.RecordBatch) -> None:
        self._held.append(batch)
        now = time.monotonic()
        waited = now - self._since >= max(PART_SECONDS, PART_SHARE * (now - self._started))
        if waited or sum(len(held) for held in self._held) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        self._since = time.monotonic()
        if not self._held:
            return
        table = pa.Table.from_batches(self._held).cast(self.schema)
        path = self.folder / f"part-{self.parts:05}.parquet"
        with writing(path, "; finished parts are kept"), replacing(path) as partial:
            write_part(table, self.notes, partial)
        self._held.clear()
        self.parts += 1
        self.rows += len(table)


def write_part(table: pa.Table, notes: Mapping[str, Any], sink: Path | pa.NativeFile) -> None:
    """Write a Parquet file of a table, with notes and the version of its columns in its metadata."""
    metadata = {"causalcone": json.dumps(notes), VERSION_KEY: str(SCHEMA_VERSION)}
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")


@contextmanager
def writing(target: str | Path, rest: str = "") -> Iterator[None]:
    """Raises ``ResultError`` where the system cannot write to a target, with its message and the file that it names."""
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise ResultError(f"cannot write {target}: {error.strerror or error}{file}{rest}") from error


def clear(folder: Path, names: Iterable[str]) -> None:
    """Remove files and folders, those that are there, one after the other."""
    for name in names:
        entry = folder / name
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    names = ("causalcone", "torch", "transformers", "tokenizers", "numpy", "pyarrow")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _numbered(value: Any) -> Any:
    """A list of tables as a table of them by number; all else as it is."""
    tables = isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)
    return {str(number): item for number, item in enumerate(value)} if tables else value


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The differences of tables of tables in words, a line for each key."""
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} before, {new!r} now")
    return lines
