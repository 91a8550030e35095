"""Files and folders that are written whole or not at all, whatever ends the process meanwhile."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

SUFFIX = ".partial"


@contextmanager
def replacing(path: str | Path, beside: Path | None = None) -> Iterator[Path]:
    """Yields a path to write a file to, which takes the place of ``path`` when the block ends without an error. The
    content is on disk before the name is. The folder of ``path`` is made if it is not there. ``beside``: the folder of
    the unfinished file, on the same file system; that of ``path`` by default. Raises ``OSError`` as writing does;
    ``path`` is then what it was, and nothing is left over."""
    path = Path(path)
    partial = _partial(path, beside)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file so."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder to write to, which gets the name ``path`` when the block ends without an error. ``path``
    must not exist, or be an empty folder. Raises ``OSError``; nothing is left over then."""
    path = Path(path)
    partial = _partial(path, None)
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partial(folder: Path, name: str = "") -> None:
    """Removes what killed processes left unfinished in ``folder``, of a file or folder ``name`` if one is given."""
    for left_over in folder.glob(f".{name}*{SUFFIX}"):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def _partial(path: Path, beside: Path | None) -> Path:
    return (beside or path.parent) / f".{path.name}.{uuid4().hex}{SUFFIX}"
