"""The cone of vectors that are added at one token: from there on, in the layers after, over a frozen past."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.editing.layers import Layers
from causalcone.engine.editing.packing import Runs, Text, in_order, spans
from causalcone.engine.editing.unedited import Places, Unedited, Wanted
from causalcone.engine.models.base import Block

Site = Literal["values", "out"]
"""What a vector is added to: the output of a layer's down-projection, or the layer's own output."""


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


@dataclass(frozen=True)
class _Join:
    """Runs that join the pass behind a layer: texts (n,) and vectors (n,) by number; tails: their rows among those that
    are kept of the unedited model; lookups (n,): which of these rows their vector is added to; merged: for each row of
    the pass from here on, its place in the rows before and the joining rows behind them; ``runs`` are all from here on.
    """

    texts: Tensor
    vectors: Tensor
    tails: Tensor
    lookups: Tensor
    merged: Tensor
    runs: Runs


class Cone:
    """The runs of vectors: vector ``of[i]`` is added in text ``texts[i]``, behind layer ``layer[of[i]]``.

    What is read out comes in the order of ``order``: run ``order[0]``'s rows, then run ``order[1]``'s, ...
    """

    def __init__(
        self,
        layers: Layers,
        site: Site,
        prompts: Prompts,
        unedited: Unedited,
        layer: np.ndarray,
        of: np.ndarray,
        texts: np.ndarray,
    ) -> None:
        self.layers, self.site, self.prompts, self.unedited = layers, site, prompts, unedited
        past, rows, read = prompts.lookup[texts], prompts.tail_rows[texts], prompts.read[texts]
        self.order = in_order(past, rows, read)
        self.joins = dict(self._joins(layer, of[self.order], texts[self.order]))

    def _joins(self, layer: np.ndarray, of: np.ndarray, texts: np.ndarray) -> list[tuple[int, _Join]]:
        joins: list[tuple[int, _Join]] = []
        device, last = self.layers.device, self.layers.depth - 1
        own, live = layer[of], np.empty(0, dtype=np.int64)
        count = self.prompts.tail_rows[texts]
        read = self.prompts.read[texts]
        for at in np.unique(layer):
            new = np.flatnonzero(own == at)
            kept = count if at < last else read  # behind the last layer only what is read out is there
            first = np.cumsum(np.concatenate([kept[live], count[new]]))
            first -= np.concatenate([kept[live], count[new]])
            if at == last:
                first[len(live) :] += (count - read)[new]
            members = np.concatenate([live, new])
            place = np.argsort(members, kind="stable")
            live = members[place]
            new_start = np.cumsum(count[new]) - count[new]
            joins.append(
                (
                    int(at),
                    _Join(
                        texts=torch.from_numpy(texts[new]).to(device),
                        vectors=torch.from_numpy(of[new]).to(device),
                        tails=torch.from_numpy(spans(self.prompts.tail_start[texts[new]], count[new])).to(device),
                        lookups=torch.from_numpy(new_start).to(device),
                        merged=torch.from_numpy(spans(first[place], kept[live])).to(device),
                        runs=self._runs(texts[live]),
                    ),
                )
            )
        return joins

    def _runs(self, texts: np.ndarray) -> Runs:
        return Runs(
            past=self.prompts.lookup[texts],
            rows=self.prompts.tail_rows[texts],
            read=self.prompts.read[texts],
            stored=self.unedited.start[texts],
            device=self.layers.device,
        )

    def read_out(self, vectors: Tensor) -> Tensor:
        """Final, normed rows (n, hidden) of what is read out, with the vectors (E, hidden) added."""
        rows: Tensor | None = None
        runs: Runs | None = None
        for layer in range(min(self.joins), self.layers.depth):
            block = self.layers.block(layer)
            if rows is not None and runs is not None:
                rows = self.layers.advance(
                    block, rows, runs, past=self.unedited.keys_values[layer], read_only=layer == self.layers.depth - 1
                ).out
            join = self.joins.get(layer)
            if join is not None:
                own = self._joining(block, layer, join, vectors)
                rows = (own if rows is None else torch.cat([rows, own])).index_select(0, join.merged)
                runs = join.runs
        assert rows is not None
        return self.layers.architecture.final_norm(rows)

    def _joining(self, block: Block, layer: int, join: _Join, vectors: Tensor) -> Tensor:
        """The rows of the runs that join behind this layer."""
        kept = self.unedited.kept
        added = vectors.index_select(0, join.vectors)
        rows = kept["out", layer].index_select(0, join.tails)
        if self.site == "out":
            return rows.index_add(0, join.lookups, added.to(rows.dtype))
        values = (kept["values", layer].index_select(0, join.texts) + added).to(rows.dtype)
        edited = kept["mid", layer].index_select(0, join.texts) + block.mlp_output(values)
        return rows.index_copy(0, join.lookups, edited)


def wanted_by_cones(prompts: Prompts, at: Collection[int], site: Site) -> Wanted:
    """What the cones of vectors at the layers ``at`` start from."""
    wanted: dict[tuple[str, int], Places] = {("out", layer): prompts.tails for layer in at}
    if site == "values":
        wanted.update({(name, layer): prompts.lookups for layer in at for name in ("values", "mid")})
    return wanted
