"""Edits in sequence: batch after batch, each on the model that the ones before left (docs/editing.md, "Sequences")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import reduce
from math import nan
from operator import add
from pathlib import Path
from typing import Any

from torch import Tensor

from causalcone.engine.edit.deltas.delta import NOTHING, Delta, place_name
from causalcone.engine.edit.methods.closed_forms.spread import Spread
from causalcone.engine.edit.methods.edits import Edit, edit_of
from causalcone.engine.edit.methods.least_squares import History
from causalcone.engine.edit.methods.method import EditableModel, Method
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.errors import ExperimentError
from causalcone.engine.tensor_file import Layout

LAYOUT = Layout(
    key="causalcone.batch", noun="batch of edits", remedy="remove it and all later ones, and go on from there"
)


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """Edits that were made together.

    Attributes:
        number: Of the batch, from 0.
        edits: One of each request, with the reason where it failed, without its change.
        delta: What the batch adds to the changes before it.
        keys: (n, inner) by layer, in float64: what later batches preserve; empty without history.
        state: What the method goes on from, by names of its own; empty for most methods.
    """

    number: int
    edits: Sequence[Edit]
    delta: Delta
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write changes, keys and state to a safetensors file, whole or not at all."""
        tensors, description = self.delta.parts()
        kept = {f"keys.{layer}": of_layer.cpu() for layer, of_layer in self.keys.items()}
        kept |= {f"state.{name}": of_name.cpu() for name, of_name in self.state.items()}
        edits = [edit.edit_id for edit in self.edits]
        LAYOUT.write(Path(path), tensors | kept, {**description, "number": self.number, "edits": edits})


@dataclass(kw_only=True)
class EditSequence:
    """A sequence of edits, an iterator over its batches. No weight of the model is written: moments and contexts of the
    unedited model serve all batches.

    Attributes:
        requests: Of all batches, in order.
        window: The layers that are edited.
        size: Requests in a batch.
        history: Keys of earlier batches that later ones preserve, or None.
        delta: The sum of all changes so far, low-rank until a dense one takes less memory.
        done: How many batches are made.
    """

    model: EditableModel
    method: Method
    hparams: Any
    requests: Sequence[Request]
    window: Window
    size: int
    history: History | None
    within: Callable[[], AbstractContextManager[object]]
    delta: Delta = NOTHING
    done: int = 0

    def __iter__(self) -> Iterator[SequenceBatch]:
        return self

    def __next__(self) -> SequenceBatch:
        """Make the edits of the next batch, and add their change."""
        if not (requests := self.of_batch(self.done)):
            raise StopIteration
        keys: Mapping[int, Tensor] = {}
        made: list[Edit] = []
        added = NOTHING
        with self.within():
            for group in [requests] if self._joint else [[request] for request in requests]:
                maker = self._maker(self.delta + added)
                if self.history is not None and isinstance(maker, Spread):
                    (joint,) = maker.joint(group, [self.window])
                    edits = joint.edits()
                    keys = joint.keys if any(edit.delta is not None for edit in edits) else {}
                    maker.remember(self.history, keys)
                else:
                    edits = [edit for batch in maker.batches(group, [self.window]) for edit in batch]
                changes = {id(edit.delta): edit.delta for edit in edits if edit.delta is not None}
                added = reduce(add, changes.values(), added)
                made += edits
        judged = [self.model.judged(replace(edit, method=self.method.name)).dropped() for edit in made]
        self.delta, self.done = self.delta + added, self.done + 1
        return SequenceBatch(self.done - 1, judged, added, keys, dict(self.model.state))

    def of_batch(self, number: int) -> list[Request]:
        return list(self.requests[number * self.size : (number + 1) * self.size])

    def restore(self, path: str | Path) -> SequenceBatch:
        """Take the next batch over from a file that ``SequenceBatch.save`` wrote, instead of making it.

        Returns:
            The batch, without edits.

        Raises:
            ExperimentError: for a file of another batch, or of other edits.
        """
        path = Path(path)
        tensors, description, _ = LAYOUT.read(path)
        edits = [edit.edit_id for edit in self.standing(self.of_batch(self.done))]
        if description.get("number") != self.done or description.get("edits") != edits:
            raise ExperimentError(
                f"{path} is batch {description.get('number')}, of {_few(description.get('edits', []))}; batch "
                f"{self.done} of this sequence is of {_few(edits)}; go on with the same facts, method and batch size, "
                "or choose another folder"
            )
        # copies: those of a file lie anywhere in memory, which products depend on in their last bits
        own = {name: tensor.to(self.model.layers.device, copy=True) for name, tensor in tensors.items()}
        with LAYOUT.reading(path), self.within():
            parts: dict[str, dict[str, Tensor]] = {"layers": {}, "keys": {}, "state": {}}
            for whole, tensor in own.items():
                part, _, name = whole.partition(".")
                parts[part][name] = tensor
            keys = {int(layer): of_layer for layer, of_layer in parts["keys"].items()}
            delta = Delta.of_parts(parts["layers"], description["layers"])
            self.model.state.update(parts["state"])
            if self.history is not None and isinstance(maker := self._maker(self.delta), Spread):
                maker.remember(self.history, keys)
        self.delta, self.done = self.delta + delta, self.done + 1
        return SequenceBatch(self.done - 1, (), delta, keys, parts["state"])

    @property
    def edits(self) -> int:
        """How many requests are edited."""
        return min(self.done * self.size, len(self.requests))

    def standing(self, requests: Sequence[Request]) -> list[Edit]:
        """Edits of requests as they stand now, with the change of all batches so far: what is to be scored."""
        delta = self.delta if self.delta.changes else None
        made: dict[str, Any] = {"steps": 0, "loss": nan, "delta": delta}
        made["reason"] = None if delta else "no edit has succeeded so far"
        return [edit_of(request, self.method.name, self.window, **made) for request in requests]

    def relative_norms(self) -> dict[str, float]:
        """By layer, or ``3.gate``, the norm of the change so far over that of the weights that it changes."""
        changes = self.delta.changes.items()
        return {place_name(place): change.norm / self.model.norm(place, change) for place, change in changes}

    def notes(self) -> dict[str, Any]:
        """What results should say of the method on this model, such as ranks of projectors."""
        return maker.notes(self.window.layers) if isinstance(maker := self._maker(self.delta), Spread) else {}

    @property
    def _joint(self) -> bool:
        return self.method.joint or self.method.together is not None or self.history is not None

    def _maker(self, delta: Delta) -> Any:
        layers = self.model.layers.changed_by(delta) if delta.changes else self.model.layers
        model = replace(self.model, layers=layers, history=self.history, _norms={})  # of other weights
        return (self.method.together or self.method.build)(model, self.hparams)


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "") or "none"
