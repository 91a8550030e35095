"""The folder of a sweep, on a local disk or any other file system: files that are there whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from causalcone.engine.atomic import replacing
from causalcone.runners.results.folder import ResultError, write_part

LOCK_SECONDS = 30.0
"""How often a lock on a file system without locks is renewed; one that was not for four times as long is none."""

LOCK = "sweep.lock"
"""The file that is there while a process holds the folder."""

LOG = "sweep.log"
"""The file of a sweep's log, beside its results."""

_PARTIAL = ".partial"
_BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class StoredPart:
    """A Parquet file that is whole: its rows, and what was noted in it."""

    rows: int
    notes: Mapping[str, Any]


class Store:
    """Reads and writes named files below ``root`` of a file system. Names are relative, with slashes."""

    def __init__(self, system: pafs.FileSystem, root: str, place: str) -> None:
        self.system, self.root, self.place = system, root.rstrip("/"), place
        self.local = Path(root) if isinstance(system, pafs.LocalFileSystem) else None

    @classmethod
    def open(cls, place: str | os.PathLike[str]) -> Store:
        """The store at a path, or at a URI of any file system that Arrow or fsspec knows (s3://bucket/folder)."""
        text = str(place)
        scheme, separator, _ = text.partition("://")
        if not separator:
            return cls(pafs.LocalFileSystem(), str(Path(text).absolute()), text)
        try:
            system, root = pafs.FileSystem.from_uri(text)
        except (pa.ArrowException, ValueError, OSError) as error:
            system, root = _by_fsspec(scheme, text, error)
        return cls(system, root, text)

    def write_table(self, name: str, table: pa.Table, notes: Mapping[str, Any]) -> None:
        """Write a Parquet file, whole or not at all, in the place of one that is there."""
        self._write(name, lambda sink: write_part(table, notes, sink))

    def write_bytes(self, name: str, content: bytes) -> None:
        self._write(name, lambda sink: sink.write(content))

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def put(self, name: str, file: Path) -> None:
        """Write a copy of a local file."""
        with open(file, "rb") as source:
            self._write(name, lambda sink: copyfileobj(source, sink, _BLOCK_BYTES))

    @contextmanager
    def as_file(self, name: str) -> Iterator[Path]:
        """A local file with the content of one that is there."""
        if self.local is not None:
            yield self.local / name
            return
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            copy = Path(folder) / Path(name).name
            with self.system.open_input_stream(self._path(name)) as source, open(copy, "wb") as sink:
                copyfileobj(source, sink, _BLOCK_BYTES)
            yield copy

    def read_json(self, name: str) -> Any:
        """The value in a JSON file; None where there is none, or half of one."""
        try:
            with self.system.open_input_stream(self._path(name)) as source:
                return json.loads(source.read())
        except (FileNotFoundError, ValueError):
            return None

    def read_table(self, name: str) -> pa.Table:
        with self.system.open_input_file(self._path(name)) as source:
            return pq.read_table(source)

    def part(self, name: str) -> StoredPart | None:
        """The rows of a Parquet file, and what was noted in it; None where there is none, or a damaged one."""
        try:
            with self.system.open_input_file(self._path(name)) as source:
                footer = pq.read_metadata(source)
            notes = json.loads((footer.metadata or {}).get(b"causalcone", b"{}"))
        except (FileNotFoundError, ValueError, pa.ArrowException, OSError):
            return None
        return StoredPart(footer.num_rows, notes)

    def exists(self, name: str) -> bool:
        return self.system.get_file_info(self._path(name)).type == pafs.FileType.File

    def names(self, folder: str = "") -> list[str]:
        """All files below a folder, in order; none where it does not exist."""
        base = self._path(folder) if folder else self.root
        entries = self.system.get_file_info(pafs.FileSelector(base, allow_not_found=True, recursive=True))
        names = (entry.path[len(self.root) + 1 :] for entry in entries if entry.type == pafs.FileType.File)
        return sorted(name for name in names if not name.startswith(_PARTIAL))

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.system.delete_file(self._path(name))

    @contextmanager
    def log_of(self, logger: logging.Logger) -> Iterator[None]:
        """Appends the logger's messages of level INFO and above to the log alone meanwhile, as dated lines."""
        handler, level, propagate = _LogHandler(self), logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.propagate = propagate
            logger.setLevel(level)
            logger.removeHandler(handler)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process; ``ResultError`` where another one holds it."""
        if self.local is not None:
            lock = FileLock(self.local / LOCK, timeout=0.2)  # which ``held`` takes for a moment
            try:
                self.local.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except Timeout:
                raise ResultError(f"another process is at work in {self.place}; wait for it, or stop it") from None
            except OSError as error:
                raise ResultError(f"cannot write to {self.place}: {error.strerror or error}") from error
            try:
                for partial in (self.local / _PARTIAL).glob("*"):  # left by a process that was killed
                    partial.unlink(missing_ok=True)
                yield
            finally:
                lock.release()
            return
        with self._leased():
            yield

    def held(self) -> bool:
        """Whether a process holds the folder, as far as it can be seen."""
        if self.local is None:
            return self._lease() is not None
        if not (self.local / LOCK).exists():
            return False
        try:
            with FileLock(self.local / LOCK, timeout=0):
                return False
        except (Timeout, OSError):
            return True

    def _lease(self) -> dict[str, Any] | None:
        """The process that renewed its lock a short time ago."""
        lease = self.read_json(LOCK)
        return None if lease is None or time.time() - lease["time"] >= 4 * LOCK_SECONDS else lease

    @contextmanager
    def _leased(self) -> Iterator[None]:
        """A lock by a file that is renewed, where a file system has no locks: it does not hold against a second process
        that begins in the same moment."""
        process = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
        held = self._lease()
        if held is not None:
            raise ResultError(
                f"process {held['process']} on {held['host']} is at work in {self.place} (or was "
                f"{time.time() - held['time']:.0f} s ago); wait for it, or for {4 * LOCK_SECONDS:.0f} s after its end"
            )
        done = threading.Event()

        def renew() -> None:
            while not done.wait(LOCK_SECONDS):
                with suppress(ResultError):
                    self.write_json(LOCK, {**process, "time": time.time()})

        self.write_json(LOCK, {**process, "time": time.time()})
        renewing = threading.Thread(target=renew, daemon=True)
        renewing.start()
        try:
            yield
        finally:
            done.set()
            renewing.join()
            self.delete(LOCK)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _write(self, name: str, write: Any) -> None:
        try:
            if self.local is None:  # other file systems show a file when it is closed
                with self.system.open_output_stream(self._path(name)) as sink:
                    write(sink)
            else:
                whole = replacing(self.local / name, beside=self.local / _PARTIAL)
                with whole as partial, open(partial, "wb") as file:
                    write(pa.PythonFile(file, "w"))
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error)
            more = "what is finished is kept, and the same command goes on from there"
            raise ResultError(f"cannot write {name} of {self.place}: {reason}; {more}") from error


class _LogHandler(logging.Handler):
    """Appends to the log. On a file system that cannot append, the file is written anew with all lines."""

    def __init__(self, store: Store) -> None:
        super().__init__(logging.INFO)
        self.store = store
        self.lines: list[str] = []
        if store.local is None and store.exists(LOG):
            with store.as_file(LOG) as file:
                self.lines = file.read_text(encoding="utf-8").splitlines(keepends=True)

    def emit(self, record: logging.LogRecord) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        lines = [f"{stamp} {line}\n" for line in record.getMessage().splitlines()]
        with suppress(OSError, ValueError, ResultError):  # a sweep goes on without its log
            if self.store.local is not None:
                with open(self.store.local / LOG, "a", encoding="utf-8") as file:
                    file.writelines(lines)
            else:
                self.lines += lines
                self.store.write_bytes(LOG, "".join(self.lines).encode())


def _by_fsspec(scheme: str, text: str, error: Exception) -> tuple[pafs.FileSystem, str]:
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(text, use_listings_cache=False)  # others write there too
    except (ImportError, ValueError) as other:
        raise ResultError(
            f"{text} is on no file system that is known here: {error}; {other}. For {scheme}:// files install its "
            "fsspec package"
        ) from other
    return pafs.PyFileSystem(pafs.FSSpecHandler(system)), root
