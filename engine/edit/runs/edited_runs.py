"""Runs of edits: of each text the tokens from the lookup on, in the layers after the edit, over a frozen prefix."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import PROJECTIONS, Place, place_of
from causalcone.engine.edit.runs.frozen_prefix import FrozenPrefix, Places
from causalcone.engine.edit.runs.layers import Change, Layers
from causalcone.engine.edit.runs.packed_runs import Runs, Text, in_order, spans
from causalcone.engine.models.base import Block
from causalcone.kernels.transfer import Array, send


@dataclass(frozen=True)
class Prompts:
    """Texts by number: ``lookup`` (N,) is the token that vectors are added at, ``read`` (N,) how many of the last
    tokens are read out."""

    texts: Sequence[Text]
    lookup: np.ndarray
    read: np.ndarray

    @property
    def tails(self) -> Places:
        """All tokens from the lookup on."""
        count = self.tail_rows
        return np.repeat(np.arange(len(count)), count), spans(self.lookup, count)

    @property
    def lookups(self) -> Places:
        return np.arange(len(self.lookup)), self.lookup

    @property
    def tail_rows(self) -> np.ndarray:
        """(N,) how many tokens there are from the lookup on."""
        return np.array([len(text) for text in self.texts]) - self.lookup

    @property
    def tail_start(self) -> np.ndarray:
        """(N,) where each text's rows begin among the tails."""
        return np.cumsum(self.tail_rows) - self.tail_rows


class Join(NamedTuple, Generic[Array]):
    """Runs that join the pass after a layer: texts (n,) and edits (n,) by number, in ``stretches``; tails: the texts'
    rows from the lookup on, among those of all texts; lookups (n,): which of these are lookups; merged: for each row of
    the pass from here on, its index in the rows before, followed by the joining rows; ``runs`` are all from here on,
    ``of`` (N,) their edits."""

    texts: Array
    edits: Array
    stretches: list[tuple[int, int]]
    tails: Array
    lookups: Array
    merged: Array
    runs: Runs[Array]
    of: list[int]


Joining = Callable[[Block, int, Join], Tensor]
"""The rows (n, hidden) of the runs that join after a layer."""

Changing = Callable[[int, "Join", bool], Change | None]
"""The change at a layer of the runs already in the pass; the flag is true when only read-out rows remain."""

Addition = Callable[[Tensor], Tensor]
"""The addition of a change of weights to what comes out of a projection (R, out), from what goes in (R, in)."""


def changing(additions: Sequence[Mapping[Place, Addition]]) -> Changing:
    """The change of runs by the additions of their edits; for all passes of the same runs."""
    known: dict[int, Change] = {}

    def change(layer: int, live: Join, read_only: bool) -> Change | None:
        if layer not in known:
            places = {place_of(layer, name) for name in PROJECTIONS}
            here = np.array([not places.isdisjoint(by_place) for by_place in additions])[live.of]
            owners = np.where(here, live.of, -1)  # neighbours without a change stay together
            parts = stretches(owners, np.array(live.runs.read if read_only else live.runs.rows))
            known[layer] = change_at(layer, parts, additions)
        return known[layer] or None

    return change


def change_at(layer: int, parts: Sequence[tuple[int, int]], additions: Sequence[Mapping[Place, Addition]]) -> Change:
    """The change of a layer by the additions of the edits that ``stretches`` of rows are of, -1 for none."""
    found = {}
    for name in PROJECTIONS:
        place = place_of(layer, name)
        adding = [(count, None if edit < 0 else additions[edit].get(place)) for edit, count in parts]
        if any(add is not None for _, add in adding):
            found[name] = partial(changed, additions=adding)
    return found


def stretches(of: np.ndarray, rows: np.ndarray) -> list[tuple[int, int]]:
    """Runs of one edit that are neighbours: the edit, and how many rows they have, from the edit (N,) and the number of
    rows (N,) of each run."""
    first = np.flatnonzero(np.append(True, of[1:] != of[:-1])[: len(of)])
    return list(zip(of[first].tolist(), np.add.reduceat(rows, first).tolist() if len(of) else [], strict=True))


def changed(keys: Tensor, values: Tensor, additions: Sequence[tuple[int, Addition | None]]) -> Tensor:
    """New values: all rows, stretch by stretch in order, with their additions. Gradient flows."""
    counts = [count for count, _ in additions]
    # split, not sliced: the gradient of a slice goes through all rows
    parts = zip(keys.split(counts), values.split(counts), additions, strict=True)
    return torch.cat([own if add is None else own + add(key) for key, own, (_, add) in parts])


class EditedRuns:
    """The runs of edits: run i is of edit ``of[i]``, in text ``texts[i]``, and differs from the unedited run after
    layer ``layer[of[i]]``, from the text's lookup on. Rows are read out in the runs' ``order``."""

    def __init__(
        self,
        layers: Layers,
        prompts: Prompts,
        layer: np.ndarray,
        of: np.ndarray,
        texts: np.ndarray,
        unedited: FrozenPrefix | None = None,
    ) -> None:
        """``unedited`` holds the keys and values of the tokens before the lookups, where there are any."""
        self.layers, self.prompts = layers, prompts
        self.keys_values = {} if unedited is None else unedited.keys_values
        self.stored = np.zeros(len(prompts.texts), dtype=np.int64) if unedited is None else unedited.start
        past, rows, read = prompts.lookup[texts], prompts.tail_rows[texts], prompts.read[texts]
        self.order = in_order(rows, read, past)
        joins = tuple(self._joins(layer, of[self.order], texts[self.order]))
        self.joins: dict[int, Join] = dict(send(joins, layers.device))

    def _joins(self, layer: np.ndarray, of: np.ndarray, texts: np.ndarray) -> Iterator[tuple[int, Join[np.ndarray]]]:
        last = self.layers.depth - 1
        read_out = max(layer[layer < last], default=last)  # those that are in the pass there leave it at the last layer
        live, first_layer = np.empty(0, dtype=np.int64), layer[of]
        count, read = self.prompts.tail_rows[texts], self.prompts.read[texts]
        runs = np.stack([self.prompts.lookup[texts], count, read, self.stored[texts]])
        for at in np.unique(layer):
            new = np.flatnonzero(first_layer == at)
            rows = count if at < last else read  # after the last layer only read-out rows remain
            sizes = np.concatenate([rows[live], count[new]])
            first = np.cumsum(sizes) - sizes
            if at == last:
                first[len(live) :] += (count - read)[new]
            order = np.argsort(np.concatenate([live, new]), kind="stable")
            live = np.sort(np.concatenate([live, new]))
            join = Join(
                texts=texts[new],
                edits=of[new],
                stretches=stretches(of[new], count[new]),
                tails=spans(self.prompts.tail_start[texts[new]], count[new]),
                lookups=np.cumsum(count[new]) - count[new],
                merged=spans(first[order], rows[live]),
                runs=Runs.of(runs[:, live], attend=at < last - 1, read_out=at == read_out < last),
                of=of[live].tolist(),
            )
            yield int(at), join

    def read_out(self, joining: Joining, changing: Changing | None = None) -> Tensor:
        """Final, normed rows (n, hidden) that are read out."""
        edited = EditedPass(self, joining, changing)
        for layer in range(min(self.joins), self.layers.depth):
            edited.advance(layer, self.layers.block(layer))
        return edited.states()


class EditedPass:
    """The rows of edited runs on their way through the layers, one at a time, so that other runs can go beside them."""

    def __init__(self, edited: EditedRuns, joining: Joining, changing: Changing | None = None) -> None:
        self.edited, self.joining, self.changing = edited, joining, changing
        self.rows: Tensor | None = None
        self.live: Join | None = None

    def advance(self, layer: int, block: Block) -> None:
        """Go through a layer; then the runs that differ after it join."""
        layers, joins = self.edited.layers, self.edited.joins
        if self.rows is not None and self.live is not None:
            last = layer == layers.depth - 1
            change = self.changing(layer, self.live, last) if self.changing else None
            past = self.edited.keys_values.get(layer)
            self.rows = layers.advance(block, self.rows, self.live.runs, past=past, read_only=last, change=change).out
        if layer in joins:
            self.live = joins[layer]
            new = self.joining(block, layer, self.live)
            self.rows = (new if self.rows is None else torch.cat([self.rows, new])).index_select(0, self.live.merged)

    def states(self) -> Tensor:
        assert self.rows is not None
        return self.edited.layers.architecture.final_norm(self.rows)
