"""A sequence of edits carried out in a folder, from which it goes on after any end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import pyarrow as pa
from rich.console import Console

from causalcone.engine.edit.editor import Editor
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.scoring.tables import edit_batch
from causalcone.engine.edit.sequences.checkpoints import Checkpoints
from causalcone.engine.edit.sequences.held_out import HeldOut
from causalcone.engine.edit.sequences.sequence import EditSequence, SequenceBatch
from causalcone.engine.errors import ExperimentError
from causalcone.engine.schemas import CHECKPOINT_SCHEMA, SEQUENCE_SCHEMA
from causalcone.runners.edits.settings import Setting
from causalcone.runners.edits.study import EditStudy
from causalcone.runners.inputs.running_text import open_texts
from causalcone.runners.results.store import Store
from causalcone.runners.show.progress import shown_progress

SEQUENCE, CHECKPOINTS, BATCHES = "sequence", "checkpoints", "batches"


@dataclass(frozen=True, kw_only=True)
class StoredSequence:
    """A sequence, measured at checkpoints, with all that it has made kept in a store, below ``root`` in a ``folder`` of
    each table: of every batch a part of the tables ``sequence`` and, where one is due, ``checkpoints``, and its change
    in ``batches``, which is written before the checkpoint. notes: kept in every part."""

    sequence: EditSequence
    checkpoints: Checkpoints
    store: Store
    root: str = ""
    folder: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def carry_out(self, progress: Callable[[int, int], object] = lambda done, total: None) -> int:
        """Make what is not there yet; how many edits that were."""
        total, made = len(self.sequence.requests), 0
        while self.sequence.edits < total:
            number = self.sequence.done
            progress(self.sequence.edits, total)
            if self.store.exists(self.file(BATCHES, number)):
                with self.store.as_file(self.file(BATCHES, number)) as file:
                    self.sequence.restore(file)
            else:
                made += self._make(number)
            if self.checkpoints.due(self.sequence) and self.store.part(self.file(CHECKPOINTS, number)) is None:
                self._write(CHECKPOINTS, number, self.checkpoints.measure(self.sequence))
        progress(total, total)
        return made

    def tables(self) -> dict[str, pa.Table]:
        """What is there of the tables."""
        read = {}
        for table, schema in ((SEQUENCE, SEQUENCE_SCHEMA), (CHECKPOINTS, CHECKPOINT_SCHEMA)):
            names = self.store.names(self._path(table))
            read[table] = pa.concat_tables([schema.empty_table(), *map(self.store.read_table, names)])
        return read

    def file(self, table: str, number: int) -> str:
        ending = "safetensors" if table == BATCHES else "parquet"
        return f"{self._path(table)}/part-{number:05}.{ending}"

    def _path(self, table: str) -> str:
        return "/".join(part for part in (self.root, table, self.folder) if part)

    def _make(self, number: int) -> int:
        started = time.monotonic()
        batch = next(self.sequence)
        self._write(SEQUENCE, number, _rows(batch, self.sequence.size, time.monotonic() - started))
        with TemporaryDirectory() as folder:
            batch.save(file := Path(folder) / "batch.safetensors")
            self.store.put(self.file(BATCHES, number), file)
        return len(batch.edits)

    def _write(self, table: str, number: int, rows: pa.RecordBatch) -> None:
        self.store.write_table(self.file(table, number), pa.Table.from_batches([rows]), self.notes)


class SequenceChoice(Protocol):
    """How edits are made one after another (``SequenceOptions``)."""

    @property
    def batch(self) -> int: ...
    @property
    def checkpoint(self) -> int: ...
    @property
    def sample(self) -> int: ...
    @property
    def history(self) -> bool | None: ...
    @property
    def held_out(self) -> str | None: ...


def stored_sequence(
    editor: Editor,
    requests: Sequence[Request],
    setting: Setting,
    layers: Sequence[int] | str,
    choice: SequenceChoice,
    scoring: Mapping[str, Any],
    store: Store,
    **kept: Any,
) -> StoredSequence:
    """The sequence of a setting, in the window around the one layer; scoring: options of ``Editor.evaluate``; kept:
    further fields of ``StoredSequence``."""
    layers = setting.layers or layers
    if isinstance(layers, str) or len(layers) != 1:
        given = layers if isinstance(layers, str) else ", ".join(map(str, layers))
        raise ExperimentError(
            f"the layers are {given}, and a sequence edits one window; give the layer in its centre, such as --layer 5 "
            "--method memit:5"
        )
    sequence = editor.sequence(
        requests, setting.method, layers, setting.window, setting.hparams, batch=choice.batch, history=choice.history
    )
    texts = None if choice.held_out is None else open_texts(choice.held_out).texts
    checkpoints = Checkpoints(
        evaluate=editor.evaluate,
        every=choice.checkpoint,
        sample=choice.sample,
        seed=editor.seed,
        held_out=HeldOut(editor.session, texts),
        scoring=scoring,
    )
    return StoredSequence(sequence=sequence, checkpoints=checkpoints, store=store, **kept)


@dataclass(frozen=True)
class SequencesDone:
    """Sequences in ``path``: of so many ``edits`` by each of ``methods``, of which ``made`` now, in ``seconds``; notes:
    by method, what it says of itself."""

    path: Path
    edits: int
    methods: Sequence[str]
    made: int
    seconds: float
    notes: Mapping[str, Any]

    @property
    def results(self) -> dict[str, Any]:
        return {"edits": self.edits, "made_now": self.made, "seconds": round(self.seconds, 3), "notes": {**self.notes}}

    def sentence(self) -> str:
        rate = f"{self.made} of them now in {self.seconds:.1f} s"
        return f"sequences of {self.edits} edits by {', '.join(self.methods)}, {rate} -> {self.path}"


def sequences_of(study: EditStudy, choice: SequenceChoice, store: Store) -> Iterator[tuple[Setting, StoredSequence]]:
    """The sequences of a study, one for each of its settings; one that cannot be made is refused when its turn is."""
    for setting in study.plan.settings:
        kept: dict[str, Any] = {"folder": f"{setting.method}-{setting.window}", "notes": study.configuration}
        scored = study.plan.layers, choice, study.evaluate
        yield setting, stored_sequence(study.editor, study.requests, setting, *scored, store, **kept)


def carry_out(study: EditStudy, choice: SequenceChoice, place: Path, console: Console, quiet: bool) -> SequencesDone:
    """Make the sequences of a study in a folder of results, going on with what is there."""
    started, made, notes = time.monotonic(), 0, {}
    store = Store.open(place)
    with store.locked():
        for setting, stored in sequences_of(study, choice, store):
            if said := stored.sequence.notes():
                notes[str(setting)] = said
            with shown_progress(console, f"editing in sequence, {setting}", "edits", quiet) as progress:
                made += stored.carry_out(progress)
    return SequencesDone(
        place, len(study.requests), [*map(str, study.plan.settings)], made, time.monotonic() - started, notes
    )


def _rows(batch: SequenceBatch, size: int, seconds: float) -> pa.RecordBatch:
    count = len(batch.edits)
    first = batch.number * size
    more = [[batch.number] * count, range(first, first + count), [seconds] * count]
    columns = [*edit_batch(batch.edits).columns]
    fields = [SEQUENCE_SCHEMA.field(name) for name in ("batch", "position", "seconds")]
    columns += [pa.array(values, column.type) for values, column in zip(more, fields, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=SEQUENCE_SCHEMA)
