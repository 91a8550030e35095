"""Executes plans: a pass goes once through the layers, with every row of every run of many facts in one tensor.

In buffers that are used again, and in place. ``forward_autograd.py`` does the same in operations that autograd can go
back through. Texts with edits go through ``engine/edit/runs/layers.py``, and token by token through ``decoding.py``
beside it: they have no plan. What a block computes, all four ask of ``Block``; a new kind of block changes each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.models.base import Architecture, Block
from causalcone.engine.plan.buffers import Buffers, slot_elements, slot_uses
from causalcone.engine.run.packing import Group
from causalcone.engine.run.pass_rows import (
    EntryRows,
    GivenValues,
    LayerRows,
    MixRows,
    ReadRows,
    StageRows,
    entry_rows,
    layer_rows,
    noises,
    read_rows,
)
from causalcone.kernels.backends import TORCH, Backends
from causalcone.kernels.gathering import NormedRows, RowSum
from causalcone.kernels.norms import Norm, unchanged
from causalcone.kernels.readout import Readout
from causalcone.kernels.row_attention import ScoreRule
from causalcone.kernels.tiles import Tiles, pieces
from causalcone.kernels.transfer import Packet, ahead, on_device


class GroupResult(NamedTuple):
    """What a pass gives for a group's facts (F) and samples (J).

    log_p (F, J, R, k) float64: log-probability of each target token in each run; states (F, J, captures, hidden): the
    values captured; logits (F, J, n, vocabulary).
    """

    log_p: Tensor
    states: Tensor
    logits: Tensor


class PassResult(NamedTuple):
    """What a pass gives for all groups, one after the other, on its device: each tensor of ``GroupResult`` with all
    dimensions but the last in one, and log p in one altogether."""

    log_p: Tensor
    states: Tensor
    logits: Tensor

    def by_group(self, groups: Sequence[Group]) -> Iterator[GroupResult]:
        first = (0, 0, 0)
        for group in groups:
            plan, facts = group.plan, (group.facts, group.samples)
            shapes = [(*facts, *plan.read.shape), (*facts, plan.captures), (*facts, len(plan.logits))]
            ends = [start + prod(shape) for start, shape in zip(first, shapes, strict=True)]
            parts = zip(self, first, ends, shapes, strict=True)
            log_p, states, logits = (tensor[start:end].unflatten(0, shape) for tensor, start, end, shape in parts)
            yield GroupResult(log_p, states, logits)
            first = (ends[0], ends[1], ends[2])


@torch.inference_mode()
def run_pass(
    architecture: Architecture,
    groups: Sequence[Group],
    tiles: Tiles,
    space: Buffers,
    backends: Backends = TORCH,
    room: float = 1.0,
) -> PassResult:
    """What the plans of all groups read out, computed in the space's dtype. room: how many times what this pass needs
    of memory there is for it."""
    return _ForwardPass(architecture, groups, tiles, space, backends, room).run()


@dataclass
class _ForwardPass:
    """One pass. Row tensors are (rows, width); a stage says which run's row lies where."""

    architecture: Architecture
    groups: Sequence[Group]
    tiles: Tiles
    space: Buffers
    backends: Backends
    room: float

    def __post_init__(self) -> None:
        self.dtype, self.device, hidden = self.space.dtype, self.space.device, self.architecture.sizes.hidden
        captured = sum(group.facts * group.samples * group.plan.captures for group in self.groups)
        self.states = torch.empty(captured, hidden, dtype=self.dtype, device=self.device)
        self.givens = GivenValues(self.groups, self.dtype, self.device)

    def run(self) -> PassResult:
        uses = [slot_uses(group.plan, self.architecture.sizes) for group in self.groups]
        counts = [(group.facts, group.samples) for group in self.groups]
        self.space.reserve(slot_elements(uses, counts), self.room)
        layers = (Packet.of(rows, self.device) for rows in layer_rows(self.groups, self.givens))
        rows = enter(self.architecture, self.groups, self.dtype, self.device)
        with (
            closing(self.architecture.blocks(self.dtype, self.device)) as blocks,
            closing(ahead(layers, self.device)) as packets,
        ):
            for block, packet in zip(blocks, packets, strict=True):
                layer: LayerRows[Tensor] = packet.send(self.device)
                rows = self._layer(rows, replace(block, backends=self.backends), layer)
        return self._read_out(rows)

    def _layer(self, rows: Tensor, block: Block, layer: LayerRows[Tensor]) -> Tensor:
        """One layer: input rows to output rows. An overwritten value is a row gathered from another run."""
        hidden = self.architecture.sizes.hidden
        attn = self._attention(rows, block, layer)
        self._give(attn, layer.attn)
        self._capture(attn, layer.attn)

        mid = self.space.take("heads", layer.mid.packed.rows, hidden)
        mlp = self.space.take("keys", layer.mlp.packed.rows, hidden)
        computed = mlp[: layer.mlp.packed.computed]
        read, (index,) = (rows if self.architecture.parallel else mid), layer.mlp.sources
        inputs, attns = layer.mid.sources
        terms = RowSum(rows, inputs, attn, attns)
        if not self.architecture.parallel and self.backends.fuses(block.mlp_in, hidden):
            # normed as they are summed, into the rows that the MLP's outputs then take
            normed = NormedRows(index, layer.normed, block.mlp_in, computed)
            self.backends.add_normed(terms, mid, normed, self.tiles.rows)
            self._project(block.mlp_of, computed, None, computed)
        else:
            self.backends.add_rows(terms, mid, self.tiles.rows)
            self._project(block.mlp_of, read, index, computed, norm=block.mlp_in)
        self._give(mlp, layer.mlp)
        self._capture(mlp, layer.mlp)

        out = self.space.take("stream", layer.out.packed.rows, hidden)
        mids, mlps = layer.out.sources
        self.backends.add_rows(RowSum(mid, mids, mlp, mlps), out[: layer.out.packed.computed], self.tiles.rows)
        self._give(out, layer.out)
        self._capture(out, layer.out)
        return out

    def _attention(self, rows: Tensor, block: Block, layer: LayerRows[Tensor]) -> Tensor:
        """What attention adds to the residual stream."""
        sizes = self.architecture.sizes
        keys_values = self.space.take("keys", layer.keys.packed.rows, sizes.key_value_width)
        self._project(block.keys_values_of, rows, layer.keys.sources[0], keys_values, layer.key_tokens, block.attn_in)
        queries = self.space.take("queries", layer.queries.packed.rows, sizes.query_width)
        self._project(block.queries_of, rows, layer.queries.sources[0], queries, layer.query_tokens, block.attn_in)

        packed = layer.attn.packed
        heads = self.space.take("heads", packed.computed + packed.mixed, sizes.query_width)
        scoring = ScoreRule(block.head_dim, block.scale, block.softcap, block.window)
        self.backends.attend_rows(queries, keys_values, layer.runs, scoring, heads[: packed.computed], self.tiles.keys)
        if packed.mixed:
            self._mix(heads, packed.computed, layer.mixes)
        attn = self.space.take("queries", packed.rows, sizes.hidden)
        self._project(block.attention_output, heads, None, attn[: len(heads)])
        return attn

    def _mix(self, heads: Tensor, computed: int, mixes: MixRows[Tensor]) -> None:
        """Fill the mixed rows of ``heads``, which lie after those that attention computes."""
        torch.index_select(heads[:computed], 0, mixes.base, out=heads[computed:])
        by_head = heads.unflatten(1, (-1, self.architecture.sizes.head_dim))
        (to, vector_to), (head, vector_head) = mixes.rows, mixes.heads
        if len(to):
            by_head[to, head] = by_head[mixes.sources, head]
        if len(vector_to):
            by_head[vector_to, vector_head] = self.givens.table(by_head.shape[2]).index_select(0, mixes.given)

    def _project(
        self,
        function: Callable[..., Tensor],
        rows: Tensor,
        index: Tensor | None,
        out: Tensor,
        positions: Tensor | None = None,
        norm: Norm = unchanged,
    ) -> None:
        """``out`` = ``function`` of the indexed rows, normed (of all rows as they are where there is no index), in
        tiles that stay in cache."""
        for piece in pieces(len(out), self.tiles.rows, out.device):
            source = rows[piece] if index is None else self.backends.gather_normed(rows, index[piece], norm)
            at, target = () if positions is None else (positions[piece],), out[piece]
            made = function(source, *at, out=target)
            if made is not target:
                target.copy_(made)

    def _give(self, out: Tensor, stage: StageRows[Tensor]) -> None:
        """Fill the rows of a stage that are given, which lie after those that it computes."""
        if len(stage.given):
            values = self.givens.table(out.shape[1])
            torch.index_select(values, 0, stage.given, out=out[len(out) - len(stage.given) :])

    def _capture(self, rows: Tensor, stage: StageRows[Tensor]) -> None:
        """Keep the rows of a stage that are handed out."""
        if len(stage.captured):
            self.states[stage.captures] = rows.index_select(0, stage.captured)

    def _read_out(self, rows: Tensor) -> PassResult:
        read: ReadRows[Tensor] = Packet.of(read_rows(self.groups), self.device).send(self.device)
        states = rows.new_empty(read.stage.packed.rows, rows.shape[1])
        self._project(lambda rows, out: self.architecture.final_norm(rows), rows, read.stage.sources[0], states)
        readout = Readout(
            *self.architecture.unembedding(),
            self.tiles.readout_rows,
            self.tiles.vocabulary,
            self.architecture.logit_softcap,
            backends=self.backends,
        )
        targets = read_targets(read, readout, states.index_select(0, read.unknown))
        log_p = readout.target_log_probabilities(states, targets).index_select(0, read.read)
        logits = readout.logits(states.index_select(0, read.logit_rows)).index_select(0, read.logits)
        return PassResult(log_p, self.states, logits)


def enter(architecture: Architecture, groups: Sequence[Group], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Input rows of the first layer: embeddings of the prompts' tokens, and those that carry noise in every sample."""
    entries: EntryRows[Tensor] = Packet.of(entry_rows(groups), device).send(device)
    tokens = torch.from_numpy(np.concatenate([group.tokens.ravel() for group in groups]))
    rows = architecture.embed(tokens).to(device, dtype).index_select(0, entries.rows)
    if len(entries.noised):
        hidden = architecture.sizes.hidden
        noise = on_device(np.concatenate([noise.reshape(-1, hidden) for noise in noises(groups).values()]), device)
        carried, clean = noise.index_select(0, entries.noise), rows.index_select(0, entries.noised)
        rows[entries.noised] = carried.add_(clean.masked_fill_(entries.replaced[:, None] > 0, 0)).to(dtype)
    return architecture.enter(rows, entries.positions)


def read_targets(read: ReadRows[Tensor], readout: Readout, unknown: Tensor) -> Tensor:
    """The target of each normed row (R,); ``unknown`` are the normed rows whose most likely tokens are targets."""
    targets = read.known.long()
    if len(unknown):
        targets = torch.cat([targets, readout.most_likely(unknown)])
    return targets.index_select(0, read.target)
