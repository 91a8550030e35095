"""A model's layers over packed runs, forwards or under autograd; ``engine/run/forward.py`` names the other passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import NOTHING, Delta, Dense, LowRank
from causalcone.engine.edit.runs.packed_runs import Runs, Text
from causalcone.engine.models.base import Architecture, Block
from causalcone.kernels.backends import TORCH, Backends
from causalcone.kernels.gathering import gather_two
from causalcone.kernels.linear import Changed, Linear
from causalcone.kernels.readout import Readout
from causalcone.kernels.row_attention import ScoreRule, attend_padded
from causalcone.kernels.tiles import Tiles, pieces
from causalcone.kernels.transfer import on_device

Prepared = TypeVar("Prepared")

Change = Mapping[str, Callable[[Tensor, Tensor], Tensor]]
"""Edited projections of an MLP, ``"down"``, ``"gate"`` and ``"up"``: what comes out (R, out), from what goes in (R, in)
and what comes out of the unedited one, before its activation."""


@dataclass(frozen=True)
class Passed:
    """A layer's rows: keys and values of attention; the residual before the MLP is added; keys (where requested) and
    values of the MLP's down-projection; the layer's output."""

    keys_values: Tensor
    mid: Tensor
    keys: Tensor | None
    values: Tensor
    out: Tensor


@dataclass(frozen=True)
class Layers:
    """A model's layers, in the dtype and on the device of the pass. caches: whether prepared weights are kept for later
    passes, until ``forget``. backends: of blocks, the readout, and steps of fine-tuning. delta: a change that the model
    is seen with, without being written."""

    architecture: Architecture
    tiles: Tiles
    dtype: torch.dtype
    device: torch.device
    caches: bool = False
    backends: Backends = TORCH
    delta: Delta = NOTHING
    _cache: dict[int | str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return self.architecture.sizes.depth

    def block(self, layer: int) -> Block:
        changes = self.delta.at(layer)

        def read() -> Block:
            block = replace(self.architecture.block(layer, self.dtype, self.device), backends=self.backends)
            changed = {name: self._changed(block.projection(name), change) for name, change in changes.items()}
            return block.with_projections(changed) if changed else block

        return self._prepared(layer, read, keep=bool(changes))

    def _changed(self, linear: Linear, change: LowRank | Dense) -> Linear:
        """A projection with its change, summed as where it is written."""
        wide = torch.promote_types(self.dtype, torch.float32)
        change = change.to(self.device, wide)
        weight = (linear.weight.to(wide) + change.rows(slice(None))).to(self.dtype)
        bias, added = linear.bias, change.bias if isinstance(change, Dense) else None
        if bias is not None and added is not None:
            bias = (bias.to(wide) + added).to(self.dtype)
        return Linear(weight, bias, linear.name or linear.activation)

    def changed_by(self, delta: Delta) -> Layers:
        """The layers of the model with a change of its weights."""
        return replace(self, delta=delta, _cache={})

    def readout(self) -> Readout:
        return self._prepared("readout", self._readout)

    def forget(self) -> None:
        """Read the model's weights anew from here on: it may have been edited."""
        self._cache.clear()

    @torch.no_grad()
    def _prepared(self, name: int | str, make: Callable[[], Prepared], keep: bool = False) -> Prepared:
        if not self.caches and not keep:
            return make()
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def _readout(self) -> Readout:
        weight, bias = self.architecture.unembedding()
        weight, bias = weight.detach().to(self.device), None if bias is None else bias.detach().to(self.device)
        rows, vocabulary = self.tiles.readout_rows, self.tiles.vocabulary
        softcap = self.architecture.logit_softcap
        readout = Readout(weight, bias, rows, vocabulary, softcap, backends=self.backends)
        return readout.keeping(self.dtype) if self.caches else readout

    @torch.no_grad()
    def enter(self, texts: Sequence[Text]) -> Tensor:
        """Input rows of the first layer, of all tokens of all texts."""
        tokens = torch.tensor([token for text in texts for token in text.tokens])
        positions = on_device(torch.cat([torch.arange(len(text)) for text in texts]), self.device)
        rows = self.architecture.embed(tokens).to(self.device, self.dtype)
        starts = np.cumsum([0, *map(len, texts)])
        noisy = [(start + t.noised, t.noise) for t, start in zip(texts, starts, strict=False) if t.noise is not None]
        noises = on_device(np.concatenate([noise for _, noise in noisy]), self.device) if noisy else rows[:0]
        for (start, _), noise in zip(noisy, noises.split([len(noise) for _, noise in noisy]), strict=True):
            noised = slice(start, start + len(noise))
            rows[noised] = (rows[noised] + noise).to(self.dtype)
        return self.architecture.enter(rows, positions)

    def advance(
        self,
        block: Block,
        rows: Tensor,
        runs: Runs,
        *,
        past: Tensor | None = None,
        read_only: bool = False,
        change: Change | None = None,
        keep_keys: bool = False,
    ) -> Passed:
        """One layer. past: stored keys and values of attention (S, 2 * kv_heads * head_dim); read_only: only the rows
        that are read out go beyond attention's keys and values, as in the last layer."""
        normed, positions = self.by_tiles(block.attn_in, rows), runs.positions
        keys_values = self.by_tiles(block.keys_values_of, normed, positions)
        if read_only:
            rows, normed, positions = (tensor.index_select(0, runs.read_rows) for tensor in (rows, normed, positions))
        queries = self.by_tiles(block.queries_of, normed, positions)
        heads = self._attend(block, queries, keys_values, runs, past, read_only)
        return self.after_attention(block, rows, heads, keys_values, change, keep_keys)

    def after_attention(
        self,
        block: Block,
        rows: Tensor,
        heads: Tensor,
        keys_values: Tensor,
        change: Change | None = None,
        keep_keys: bool = False,
    ) -> Passed:
        """The rest of a layer, from its input rows (R, hidden) and their heads' outputs (R, heads * head_dim)."""
        mid = rows + self.by_tiles(block.attention_output, heads)
        keys, values = self.project(block, rows if self.architecture.parallel else mid, change, keep_keys)
        return Passed(keys_values, mid, keys, values, mid + self.by_tiles(block.mlp_out, values))

    def project(
        self, block: Block, rows: Tensor, change: Change | None = None, keep_keys: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """Keys, if requested, and values of the down-projection, from the rows that the MLP reads."""
        if not keep_keys and not change:
            return None, self.by_tiles(lambda tile: block.down(block.keys_of_mlp(tile)), rows)
        change = dict(change or {})
        down = change.pop("down", None)
        if change:  # of all rows at once, which the change goes by
            inner = {name: Changed(block.projection(name), each) for name, each in change.items()}
            keys = replace(block.with_projections(inner), backends=TORCH).keys_of_mlp(rows)
        else:
            keys = self.by_tiles(block.keys_of_mlp, rows)
        values = self.by_tiles(block.down, keys)
        return keys, values if down is None else down(keys, values)

    def _attend(
        self, block: Block, queries: Tensor, keys_values: Tensor, runs: Runs, past: Tensor | None, read_only: bool
    ) -> Tensor:
        """The heads' outputs (Q, heads * head_dim)."""
        at = runs.read_attention if read_only else runs.attention
        scoring = ScoreRule(block.head_dim, block.scale, block.softcap, block.window)
        keys = gather_two(keys_values, past, at.keys)
        return attend_padded(queries.index_select(0, at.queries), keys, at.runs, scoring, self.tiles.keys)

    def by_tiles(self, function: Callable[..., Tensor], rows: Tensor, *more: Tensor) -> Tensor:
        """``function`` of rows; without gradient in tiles that stay in cache."""
        if (rows.requires_grad and torch.is_grad_enabled()) or len(rows) <= self.tiles.rows:
            return function(rows, *more)
        tiles = pieces(len(rows), self.tiles.rows, rows.device)
        return torch.cat([function(rows[tile], *(other[tile] for other in more)) for tile in tiles])
