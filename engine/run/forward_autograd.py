"""A pass under autograd: target probabilities of which the gradient flows back to the given vectors.

Shared rows never carry gradient, varying rows always do, so every stage is two tensors. Weights are frozen; operations
are functional, since what they save for the way back must stay as it was: that is why ``forward.py``, which writes into
buffers that it uses again, is not used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.models.base import Architecture, Block
from causalcone.engine.run.forward import enter, read_targets
from causalcone.engine.run.packing import INDEX, Group, PackedStage, place
from causalcone.engine.run.pass_rows import GivenValues, LayerRows, StageRows, layer_rows, read_rows
from causalcone.kernels.attention import attend
from causalcone.kernels.readout import Readout
from causalcone.kernels.row_attention import BatchShape, RunRows, by_batch, runs_at_once, visible_keys
from causalcone.kernels.tiles import Tiles, pieces
from causalcone.kernels.transfer import Packet, ahead


def run_gradient_pass(
    architecture: Architecture, groups: Sequence[Group], tiles: Tiles, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Log-probabilities (F, J, R, k) float64 of the target tokens, differentiable by the groups' varying vectors."""
    return _AutogradPass(architecture, groups, tiles, dtype, device).run()


class _GradientRows:
    """A stage's rows, those without gradient and those with it; packed rows, on the host, are found among them."""

    def __init__(self, stage: PackedStage, shared: Tensor, varying: Tensor) -> None:
        self.stage, self.shared, self.varying = stage, shared, varying

    @cached_property
    def place(self) -> np.ndarray:
        """(R,) where each packed row lies among those of its kind."""
        varies = self.stage.varying
        return np.where(varies, varies.cumsum() - 1, (~varies).cumsum() - 1).astype(INDEX)

    def of_shared(self, packed: np.ndarray) -> Tensor:
        """Rows of which none varies, without gradient."""
        (index,) = _sent(self.shared.device, self.place[packed])
        return self.shared.index_select(0, index)

    def of_any(self, packed: np.ndarray) -> Tensor:
        """Rows with their gradient, where they have one."""
        varies, place = self.stage.varying[packed], self.place[packed]
        fixed, moving = np.flatnonzero(~varies), np.flatnonzero(varies)
        index = (np.where(varies, place, 0), fixed, place[fixed], moving, place[moving])
        return _RowGather.apply(self.varying, self.shared, *_sent(self.shared.device, *index))


def _sent(device: torch.device, *index: np.ndarray) -> tuple[Tensor, ...]:
    return Packet.of(tuple(array.astype(INDEX, copy=False) for array in index), device).send(device)


class _RowGather(torch.autograd.Function):
    """Varying rows at ``index``, but for those at ``fixed``, which are the shared ``fixed_rows``; gradient flows from
    those at ``moving`` back to the varying ``moving_rows``."""

    @staticmethod
    def forward(
        ctx: Any, varying: Tensor, shared: Tensor, index: Tensor, fixed: Tensor, fixed_rows: Tensor, *moving: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*moving)
        ctx.shape = varying.shape
        if not len(varying):
            return shared.index_select(0, fixed_rows)
        rows = varying.index_select(0, index)
        if len(fixed):
            rows[fixed] = shared.index_select(0, fixed_rows)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        moving, moving_rows = ctx.saved_tensors
        rows = grads[0] if len(moving) == len(grads[0]) else grads[0].index_select(0, moving)
        return grads[0].new_zeros(ctx.shape).index_add_(0, moving_rows, rows), *(None,) * 6


@dataclass(frozen=True)
class _AutogradPass:
    architecture: Architecture
    groups: Sequence[Group]
    tiles: Tiles
    dtype: torch.dtype
    device: torch.device

    def run(self) -> list[Tensor]:
        stage = place(self.groups, [group.plan.layers[0].inputs for group in self.groups])
        with torch.no_grad():
            entered = enter(self.architecture, self.groups, self.dtype, self.device)
        split = _sent(self.device, np.flatnonzero(~stage.varying), np.flatnonzero(stage.varying))
        rows = _GradientRows(stage, *(entered.index_select(0, kind) for kind in split))
        for number, layer in enumerate(ahead(layer_rows(self.groups, self.givens), self.device)):
            with torch.no_grad():
                block = self.architecture.block(number, self.dtype, self.device)
            rows = self._layer(rows, block, layer)
        return self._read_out(rows)

    @cached_property
    def givens(self) -> GivenValues:
        return GivenValues(self.groups, self.dtype, self.device)

    def _layer(self, rows: _GradientRows, block: Block, layer: LayerRows[np.ndarray]) -> _GradientRows:
        attn = self._attention(rows, block, layer)
        mid = self._compute(layer.mid, torch.add, rows, attn)
        mlp = self._compute(layer.mlp, block.mlp, rows if self.architecture.parallel else mid)
        return self._compute(layer.out, torch.add, mid, mlp)

    def _attention(self, rows: _GradientRows, block: Block, layer: LayerRows[np.ndarray]) -> _GradientRows:
        keys = self._compute(layer.keys, block.keys_values, rows, positions=layer.key_tokens)
        queries = self._compute(layer.queries, block.queries, rows, positions=layer.query_tokens)
        assert not layer.attn.packed.mixed, "heads are not overwritten in gradient passes"
        with torch.no_grad():
            fixed = block.attention_output(self._attend(False, queries, keys, block, layer.runs))
        varying = block.attention_output(self._attend(True, queries, keys, block, layer.runs))
        return self._with_given(layer.attn, fixed, varying)

    def _attend(
        self, varying: bool, queries: _GradientRows, keys: _GradientRows, block: Block, runs: RunRows[np.ndarray]
    ) -> Tensor:
        """The heads' outputs of runs without gradient, or with it, segment by segment."""
        width = self.architecture.sizes.query_width
        batches = [parts for parts in by_batch(runs) if parts[0].varying == varying]
        outputs = [torch.empty(0, width, dtype=self.dtype, device=self.device)]
        if batches:
            # all batches' rows are gathered at once, since the way back goes through all rows for each gathering
            asking, seen = [query.ravel() for _, query, *_ in batches], [key.ravel() for _, _, key, _ in batches]
            gathered = (
                (rows.of_any if varying else rows.of_shared)(np.concatenate(of_batches)).split([*map(len, of_batches)])
                for rows, of_batches in ((queries, asking), (keys, seen))
            )
            tokens = _sent(self.device, *(parts[3] for parts in batches))
            for (batch, *_), querying, query, key_value in zip(batches, tokens, *gathered, strict=True):
                outputs += self._attend_batch(batch, querying, query, key_value, block)
        return torch.cat(outputs)

    def _attend_batch(
        self, batch: BatchShape, tokens: Tensor, queries: Tensor, keys_values: Tensor, block: Block
    ) -> list[Tensor]:
        """The heads' outputs of a batch, in portions of about as many keys as a tile has."""
        visible, count = visible_keys(tokens, batch.keys, block.window), runs_at_once(batch.keys, self.tiles.keys)
        keys, values = keys_values.view(batch.runs, batch.keys, 2, -1, block.head_dim).unbind(2)
        heads = queries.view(batch.runs, len(tokens), -1, block.head_dim)
        return [
            attend(query, key, value, visible, block.scale, block.softcap).reshape(-1, queries.shape[1])
            for query, key, value in zip(*(rows.split(count) for rows in (heads, keys, values)), strict=True)
        ]

    def _compute(
        self,
        stage: StageRows[np.ndarray],
        function: Callable[..., Tensor],
        *sources: _GradientRows,
        positions: np.ndarray | None = None,
    ) -> _GradientRows:
        """A stage's rows as ``function`` of indexed rows of the sources."""
        varies = stage.packed.varying[: stage.packed.computed]
        indexed = list(zip(sources, stage.sources, strict=True))
        places = () if positions is None else _sent(self.device, positions[~varies], positions[varies])
        with torch.no_grad():
            fixed = function(*(rows.of_shared(index[~varies]) for rows, index in indexed), *places[:1])
        inputs = [rows.of_any(index[varies]) for rows, index in indexed] + list(places[1:])
        sizes = [piece.stop - piece.start for piece in pieces(int(varies.sum()), self.tiles.rows, self.device)]
        tiles = zip(*(rows.split(sizes) for rows in inputs), strict=True)
        parts = [function(*tile) for tile in tiles] or [fixed[:0]]
        return self._with_given(stage, fixed, torch.cat(parts))

    def _with_given(self, stage: StageRows[np.ndarray], shared: Tensor, varying: Tensor) -> _GradientRows:
        """The computed rows of a stage and the given ones after them."""
        if len(stage.given):
            table, varies = self.givens.table(shared.shape[1]), stage.packed.varying[-len(stage.given) :]
            given = _sent(self.device, stage.given[~varies], stage.given[varies])
            shared = torch.cat([shared, table.detach().index_select(0, given[0])])
            varying = torch.cat([varying, table.index_select(0, given[1])])
        return _GradientRows(stage.packed, shared, varying)

    def _read_out(self, rows: _GradientRows) -> list[Tensor]:
        read = read_rows(self.groups)
        states = self._compute(read.stage, self.architecture.final_norm, rows)
        readout = Readout(
            *self.architecture.unembedding(), self.tiles.readout_rows, self.tiles.vocabulary,
            self.architecture.logit_softcap,
        )  # fmt: skip
        (sent,) = Packet.of((read,), self.device).send(self.device)
        targets = read_targets(sent, readout, states.of_shared(read.unknown))
        varies = read.stage.packed.varying
        kinds = _sent(self.device, np.flatnonzero(~varies), np.flatnonzero(varies))
        log_p = _GradientRows(
            read.stage.packed,
            readout.target_log_probabilities(states.shared, targets.index_select(0, kinds[0]))[:, None],
            readout.log_probability(states.varying, targets.index_select(0, kinds[1]))[:, None],
        )
        shapes = [(group.facts, group.samples, *group.plan.read.shape) for group in self.groups]
        by_group = log_p.of_any(read.read).split([prod(shape) for shape in shapes])
        return [values.view(shape) for values, shape in zip(by_group, shapes, strict=True)]
