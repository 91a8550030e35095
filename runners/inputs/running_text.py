"""Running text that second moments are collected over: files, folders of them, and data sets."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from causalcone.engine.edit.moments.sampled import SOURCE
from causalcone.engine.errors import ExperimentError
from causalcone.runners.facts.data_sets import DataSet
from causalcone.runners.names import path_of, title_of

_BATCH = 1000


@dataclass(frozen=True)
class RunningText:
    """Texts, read while they are used, and a name for them; None are those that the model writes itself."""

    texts: Iterable[str] | None
    source: str


def open_texts(
    texts: str | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    column: str = "text",
) -> RunningText:
    """The texts of a file or folder, or of a data set, by default the model's own. Raises ``ExperimentError`` where
    both are given."""
    if dataset is not None and texts is None:
        data_set = DataSet.open(dataset, dataset_config, split)
        return RunningText(_ColumnOf(data_set, column), str(data_set))
    if dataset is not None:
        raise ExperimentError("which texts? Give --texts with a file or folder, or --dataset, one of the two")
    if dataset_config is not None:
        raise ExperimentError("--dataset-config goes with --dataset; name the data set")
    if texts is None:
        return RunningText(None, SOURCE)
    return _texts_at(Path(path_of(texts, "texts")), column, title_of(texts, "texts"))


def _texts_at(path: Path, column: str, title: str | None) -> RunningText:
    """The texts of a file or of a folder's files in the order of their names. A ``.parquet`` file has them in a column,
    a ``.jsonl`` or ``.json`` file in the string of each line, or in its field of that name; any other file has a text a
    line. Empty ones are passed over. Raises ``ExperimentError`` naming the file, and the line or column when it gets
    there."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS and file.is_file())
        if not files:
            raise ExperimentError(f"the folder {path} holds no texts; give one with files {', '.join(_READERS)}")
        return RunningText(_Files(files, column), f"{len(files)} files of {path}")
    if not path.exists():
        raise ExperimentError(f"there are no texts {path}; check the path")
    return RunningText(_Files([path], column), title or str(path))


@dataclass(frozen=True)
class _Files:
    files: list[Path]
    column: str

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            try:
                yield from _READERS.get(file.suffix, _lines)(file, self.column)
            except OSError as error:
                raise ExperimentError(f"cannot read {file}: {error.strerror or error}") from error


def _lines(file: Path, column: str) -> Iterator[str]:
    for _, line in _numbered(file):
        yield line


def _numbered(file: Path) -> Iterator[tuple[int, str]]:
    with open(file, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ExperimentError(f"{file}: line {number} is not UTF-8 text; save it as UTF-8") from error
            if line.strip():
                yield number, line.rstrip("\r\n")


def _json_lines(file: Path, column: str) -> Iterator[str]:
    for number, line in _numbered(file):
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ExperimentError(f"{file} is not JSON lines: line {number} is not JSON ({error})") from error
        text = value.get(column) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ExperimentError(f"{file}: line {number} has no text {column!r}; name the field with --column")
        yield text


def _parquet(file: Path, column: str) -> Iterator[str]:
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column not in names or not any(
                is_text(table.schema_arrow.field(column).type)
                for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
            ):
                raise ExperimentError(
                    f"{file} has no column {column!r} of texts, but {', '.join(names)}; name it with --column"
                )
            for batch in table.iter_batches(_BATCH, columns=[column]):
                yield from filter(None, batch[column].to_pylist())
    except pa.ArrowException as error:
        raise ExperimentError(f"{file} is not Parquet: {error}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}


@dataclass(frozen=True)
class _ColumnOf:
    data_set: DataSet
    column: str

    def __iter__(self) -> Iterator[str]:
        for row in self.data_set:
            if self.column not in row:
                raise ExperimentError(
                    f"the data set {self.data_set.name!r} has no column {self.column!r}, but {', '.join(row)}; "
                    "name it with --column"
                )
            if row[self.column]:
                yield row[self.column]
