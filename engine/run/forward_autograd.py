"""A pass under autograd: target probabilities of which the gradient flows back to the given vectors.

Shared rows never carry gradient, varying rows always do, so every stage is two tensors. Weights are frozen; operations
are functional, since what they save for the way back must stay as it was: that is why ``forward.py``, which writes into
buffers that it uses again, is not used.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from causalcone.engine.models.base import Architecture, Block
from causalcone.engine.plan.interventions import CLEAN
from causalcone.engine.plan.plan import Given, LayerPlan, Segment
from causalcone.engine.run.forward import enter, segment_rows
from causalcone.engine.run.packing import Group, PackedStage, Placement, gather_rows, place, place_attention, spread
from causalcone.kernels.attention import attend
from causalcone.kernels.readout import Readout
from causalcone.kernels.row_attention import runs_at_once, visible_keys
from causalcone.kernels.tiles import Tiles, pieces
from causalcone.kernels.transfer import on_device


def run_gradient_pass(
    architecture: Architecture, groups: Sequence[Group], tiles: Tiles, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Log-probabilities (F, J, R, k) float64 of the target tokens, differentiable by the groups' varying vectors."""
    return _AutogradPass(architecture, groups, tiles, dtype, device).run()


class _GradientRows:
    """A stage's rows, those without gradient and those with it; ``position`` finds packed rows in ``joined``."""

    def __init__(self, stage: PackedStage, shared: Tensor, varying: Tensor) -> None:
        self.stage, self.shared, self.varying = stage, shared, varying

    @cached_property
    def position(self) -> Tensor:
        varies = _varies(self.stage)
        return torch.where(varies, len(self.shared) + varies.cumsum(0) - 1, (~varies).cumsum(0) - 1)

    def of_shared(self, packed: Tensor) -> Tensor:
        """Rows of which none varies, without gradient."""
        return self.shared.index_select(0, self.position[packed])

    def of_any(self, packed: Tensor) -> Tensor:
        """Rows with their gradient, where they have one."""
        return _RowGather.apply(self.varying, self.shared, self.position[packed])


class _RowGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, varying: Tensor, shared: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.shared = varying.shape, len(shared)
        if not len(varying):
            return shared.index_select(0, index)
        fixed = (index < len(shared)).nonzero()[:, 0]
        rows = varying.index_select(0, (index - len(shared)).clamp_(min=0))
        return rows.index_copy_(0, fixed, shared.index_select(0, index[fixed]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        varies = (index >= ctx.shared).nonzero()[:, 0]
        rows = grads[0] if len(varies) == len(index) else grads[0].index_select(0, varies)
        return grads[0].new_zeros(ctx.shape).index_add_(0, index[varies] - ctx.shared, rows), None, None


@dataclass(frozen=True)
class _AutogradPass:
    architecture: Architecture
    groups: Sequence[Group]
    tiles: Tiles
    dtype: torch.dtype
    device: torch.device

    def run(self) -> list[Tensor]:
        stage = place(self.groups, [group.plan.layers[0].inputs for group in self.groups], self.device)
        with torch.no_grad():
            entered = enter(self.architecture, self.groups, self.dtype, self.device)
        varies = _varies(stage)
        rows = _GradientRows(stage, entered[~varies], entered[varies])
        for layer in range(self.architecture.sizes.depth):
            with torch.no_grad():
                block = self.architecture.block(layer, self.dtype, self.device)
            rows = self._layer(rows, block, [group.plan.layers[layer] for group in self.groups])
        return self._read_out(rows)

    def _layer(self, rows: _GradientRows, block: Block, plans: Sequence[LayerPlan]) -> _GradientRows:
        attn = self._attention(rows, block, plans)
        mid_stage = place(self.groups, [plan.mid_input.rows for plan in plans], self.device)
        inputs = gather_rows([plan.mid_input for plan in plans], rows.stage)
        attns = gather_rows([plan.mid_attn for plan in plans], attn.stage)
        mid = self._compute(mid_stage, torch.add, [(rows, inputs), (attn, attns)])

        givens = [plan.mlp_given for plan in plans]
        mlp_stage = place(self.groups, [plan.mlp.rows for plan in plans], self.device, givens)
        read = rows if self.architecture.parallel else mid
        index = gather_rows([plan.mlp for plan in plans], read.stage)
        mlp = self._compute(mlp_stage, block.mlp, [(read, index)], givens=givens)

        givens = [plan.out_given for plan in plans]
        out_stage = place(self.groups, [plan.out_mid.rows for plan in plans], self.device, givens)
        mids = gather_rows([plan.out_mid for plan in plans], mid_stage)
        mlps = gather_rows([plan.out_mlp for plan in plans], mlp_stage)
        return self._compute(out_stage, torch.add, [(mid, mids), (mlp, mlps)], givens=givens)

    def _attention(self, rows: _GradientRows, block: Block, plans: Sequence[LayerPlan]) -> _GradientRows:
        key_rows, query_rows = [plan.keys_values.rows for plan in plans], [plan.queries.rows for plan in plans]
        key_stage, query_stage = (place(self.groups, counts, self.device) for counts in (key_rows, query_rows))
        index = gather_rows([plan.keys_values for plan in plans], rows.stage)
        positions = spread([plan.key_tokens for plan in plans], key_rows, self.groups, self.device)
        keys = self._compute(key_stage, block.keys_values, [(rows, index)], positions)
        index = gather_rows([plan.queries for plan in plans], rows.stage)
        positions = spread([plan.query_tokens for plan in plans], query_rows, self.groups, self.device)
        queries = self._compute(query_stage, block.queries, [(rows, index)], positions)
        shared, varying = self._attend(queries, keys, block, plans)
        stage = place_attention(self.groups, plans, self.device)
        assert not stage.mixed, "heads are not overwritten in gradient passes"
        with torch.no_grad():
            fixed = block.attention_output(shared)
        return self._with_given(stage, fixed, block.attention_output(varying), [plan.attn_given for plan in plans])

    def _attend(
        self, queries: _GradientRows, keys: _GradientRows, block: Block, plans: Sequence[LayerPlan]
    ) -> tuple[Tensor, Tensor]:
        """The heads' outputs, segment by segment, without gradient and with it."""
        width = self.architecture.sizes.query_width
        none = torch.empty(0, width, dtype=self.dtype, device=self.device)
        outputs: dict[bool, list[Tensor]] = {False: [none], True: [none]}
        for varying in (False, True):
            works = [
                (visible, *batch)
                for plan, *placements in zip(plans, queries.stage.placements, keys.stage.placements, strict=True)
                for segment in plan.segments
                if segment.varying == varying
                for tokens in [on_device(torch.tensor(segment.tokens), self.device)]
                for visible in [visible_keys(tokens, segment.keys.shape[1], block.window)]
                for batch in self._batches(segment, *placements)
            ]
            if not works:
                continue
            # all batches' rows are gathered at once, since the way back goes through all rows for each gathering
            gathered_queries = self._gathered(varying, queries, [q for _, q, _ in works])
            gathered_keys = self._gathered(varying, keys, [k for _, _, k in works])
            for (visible, q, k), query, key_value in zip(works, gathered_queries, gathered_keys, strict=True):
                keys_of, values_of = key_value.view(*k.shape, 2, -1, block.head_dim).unbind(2)
                heads = query.view(*q.shape, -1, block.head_dim)
                attended = attend(heads, keys_of, values_of, visible, block.scale, block.softcap)
                outputs[varying].append(attended.reshape(-1, width))
        return torch.cat(outputs[False]), torch.cat(outputs[True])

    def _batches(self, segment: Segment, queried: Placement, keys: Placement) -> Iterator[tuple[Tensor, Tensor]]:
        """Query rows (B, m) and key rows (B, K) of a segment, in batches of about as many keys as a tile has."""
        query_rows, key_rows = segment_rows(segment, queried, keys)
        runs = runs_at_once(key_rows.shape[1], self.tiles.keys)
        return zip(query_rows.split(runs), key_rows.split(runs), strict=True)

    @staticmethod
    def _gathered(varying: bool, rows: _GradientRows, packed: list[Tensor]) -> tuple[Tensor, ...]:
        index = torch.cat([batch.flatten() for batch in packed])
        every = rows.of_any(index) if varying else rows.of_shared(index)
        return every.split([batch.numel() for batch in packed])

    def _compute(
        self,
        stage: PackedStage,
        function: Callable[..., Tensor],
        sources: Sequence[tuple[_GradientRows, Tensor]],
        positions: Tensor | None = None,
        givens: Sequence[Given] = (),
    ) -> _GradientRows:
        """A stage's rows as ``function`` of indexed rows of the sources."""
        varies = _varies(stage)[: stage.computed]
        shared, varying = (mask.nonzero()[:, 0] for mask in (~varies, varies))
        rest = [() if positions is None else (positions[rows],) for rows in (shared, varying)]
        with torch.no_grad():
            fixed = function(*(rows.of_shared(index[shared]) for rows, index in sources), *rest[0])
        inputs = [rows.of_any(index[varying]) for rows, index in sources] + list(rest[1])
        sizes = [tile_rows.stop - tile_rows.start for tile_rows in pieces(len(varying), self.tiles.rows)]
        tiles = zip(*(rows.split(sizes) for rows in inputs), strict=True)
        parts = [function(*tile) for tile in tiles] or [fixed[:0]]
        return self._with_given(stage, fixed, torch.cat(parts), givens)

    def _with_given(
        self, stage: PackedStage, shared: Tensor, varying: Tensor, givens: Sequence[Given]
    ) -> _GradientRows:
        """The computed rows of a stage and the given ones after them."""
        stage_rows = [(shared, varying)]
        for group, given in zip(self.groups, givens, strict=False):
            stage_rows.append(group.given_rows(given, shared.shape[1], self.device))
        kinds = zip(*stage_rows, strict=True)
        return _GradientRows(stage, *(torch.cat([rows.to(self.dtype) for rows in kind]) for kind in kinds))

    def _read_out(self, rows: _GradientRows) -> list[Tensor]:
        plans = [group.plan for group in self.groups]
        stage = place(self.groups, [plan.read_rows.rows for plan in plans], self.device)
        index = gather_rows([plan.read_rows for plan in plans], rows.stage)
        states = self._compute(stage, self.architecture.final_norm, [(rows, index)])
        readout = Readout(
            *self.architecture.unembedding(), self.tiles.readout_rows, self.tiles.vocabulary,
            self.architecture.logit_softcap,
        )  # fmt: skip
        read = [on_device(group.plan.read, self.device) for group in self.groups]
        shared, varying = [], []
        for group, placement, ids in zip(self.groups, stage.placements, read, strict=True):
            targets = group.targets
            if targets is None:
                clean = placement.flat(ids[CLEAN], varying=False).flatten(0, 1)
                targets = readout.most_likely(states.of_shared(clean.flatten())).view(clean.shape)
            by_row = group.read_targets(targets, self.device)
            shared.append(by_row[0])
            varying.append(by_row[1])
        log_p = _GradientRows(
            stage,
            readout.target_log_probabilities(states.shared, torch.cat(shared))[:, None],
            readout.log_probability(states.varying, torch.cat(varying))[:, None],
        )
        flat = [placement.flat(ids, varying=True) for placement, ids in zip(stage.placements, read, strict=True)]
        return [log_p.of_any(rows.flatten()).view(rows.shape) for rows in flat]


def _varies(stage: PackedStage) -> Tensor:
    """(R,) which packed rows of a stage differ from sample to sample."""
    device = stage.placements[0].start.device
    varies = torch.zeros(stage.rows, dtype=torch.bool, device=device)
    for placement in stage.placements:
        varies[placement.flat(placement.varying.nonzero()[:, 0], varying=True)] = True
    return varies
