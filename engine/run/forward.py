"""Executes plans: a pass goes once through the layers, with every row of every run of many facts in one tensor.

In buffers that are used again, and in place. ``forward_autograd.py`` does the same in operations that autograd can go
back through. Texts with edits go through ``engine/edit/runs/layers.py``, and token by token through ``decoding.py``
beside it: they have no plan. What a block computes, all four ask of ``Block``; a new kind of block changes each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.models.base import Architecture, Block
from causalcone.engine.plan.buffers import Buffers, slot_elements, slot_uses
from causalcone.engine.plan.interventions import CLEAN
from causalcone.engine.plan.plan import Given, LayerPlan, Mix, Rows, Segment
from causalcone.engine.run.packing import Group, PackedStage, Placement, gather_rows, place, place_attention, spread
from causalcone.kernels.backends import TORCH, Backends
from causalcone.kernels.gathering import RowSum
from causalcone.kernels.norms import Norm, unchanged
from causalcone.kernels.readout import Readout
from causalcone.kernels.row_attention import RunRows, ScoreRule
from causalcone.kernels.tiles import Tiles, pieces
from causalcone.kernels.transfer import on_device


@dataclass(frozen=True)
class PassResult:
    """What a pass gives for a group's facts (F) and samples (J), on its device.

    log_p (F, J, R, k) float64: log-probability of each target token in each run; states (F, J, captures, hidden): the
    values captured; logits (F, J, n, vocabulary), as the pass computes them.
    """

    log_p: Tensor
    states: Tensor
    logits: Tensor


@torch.inference_mode()
def run_pass(
    architecture: Architecture, groups: Sequence[Group], tiles: Tiles, space: Buffers, backends: Backends = TORCH
) -> list[PassResult]:
    """What the plans of all groups read out, computed in the space's dtype."""
    return _ForwardPass(architecture, groups, tiles, space, backends).run()


@dataclass
class _ForwardPass:
    """One pass. Row tensors are (rows, width); a stage says which run's row lies where."""

    architecture: Architecture
    groups: Sequence[Group]
    tiles: Tiles
    space: Buffers
    backends: Backends

    def __post_init__(self) -> None:
        self.dtype, self.device, hidden = self.space.dtype, self.space.device, self.architecture.sizes.hidden
        self.states = [
            torch.empty(group.facts, group.samples, group.plan.captures, hidden, dtype=self.dtype, device=self.device)
            for group in self.groups
        ]

    def run(self) -> list[PassResult]:
        uses = [slot_uses(group.plan, self.architecture.sizes) for group in self.groups]
        self.space.reserve(slot_elements(uses, [(group.facts, group.samples) for group in self.groups]))
        stage = place(self.groups, [group.plan.layers[0].inputs for group in self.groups], self.device)
        rows = enter(self.architecture, self.groups, self.dtype, self.device)
        with closing(self.architecture.blocks(self.dtype, self.device)) as blocks:
            for layer in range(self.architecture.sizes.depth):
                plans = [group.plan.layers[layer] for group in self.groups]
                rows, stage = self._layer(rows, stage, next(blocks), plans)
        return self._read_out(rows, stage)

    def _layer(
        self, rows: Tensor, stage: PackedStage, block: Block, plans: Sequence[LayerPlan]
    ) -> tuple[Tensor, PackedStage]:
        """One layer: input rows to output rows. An overwritten value is a row gathered from another run."""
        hidden = self.architecture.sizes.hidden
        attn, attn_stage = self._attention(rows, stage, block, plans)
        self._give(attn, attn_stage, [plan.attn_given for plan in plans])
        self._capture("attn", attn, attn_stage, plans)

        mid_stage = place(self.groups, [plan.mid_input.rows for plan in plans], self.device)
        mid = self.space.take("heads", mid_stage.rows, hidden)
        inputs = gather_rows([plan.mid_input for plan in plans], stage)
        attns = gather_rows([plan.mid_attn for plan in plans], attn_stage)
        givens = [plan.mlp_given for plan in plans]
        mlp_stage = place(self.groups, [plan.mlp.rows for plan in plans], self.device, givens)
        mlp = self.space.take("keys", mlp_stage.rows, hidden)
        computed = mlp[: mlp_stage.computed]
        read, read_stage = (rows, stage) if self.architecture.parallel else (mid, mid_stage)
        index, terms = gather_rows([plan.mlp for plan in plans], read_stage), RowSum(rows, inputs, attn, attns)
        if not self.architecture.parallel and self.backends.fuses(block.mlp_in, hidden):
            # normed as they are summed, into the rows that the MLP's outputs then take
            self.backends.add_normed(terms, mid, index, block.mlp_in, computed, self.tiles.rows)
            self._project(block.mlp_of, computed, None, computed)
        else:
            self.backends.add_rows(terms, mid, self.tiles.rows)
            self._project(block.mlp_of, read, index, computed, norm=block.mlp_in)
        self._give(mlp, mlp_stage, givens)
        self._capture("mlp", mlp, mlp_stage, plans)

        givens = [plan.out_given for plan in plans]
        out_stage = place(self.groups, [plan.out_mid.rows for plan in plans], self.device, givens)
        out = self.space.take("stream", out_stage.rows, hidden)
        mids = gather_rows([plan.out_mid for plan in plans], mid_stage)
        mlps = gather_rows([plan.out_mlp for plan in plans], mlp_stage)
        self.backends.add_rows(RowSum(mid, mids, mlp, mlps), out[: out_stage.computed], self.tiles.rows)
        self._give(out, out_stage, givens)
        self._capture("hidden", out, out_stage, plans)
        return out, out_stage

    def _attention(
        self, rows: Tensor, stage: PackedStage, block: Block, plans: Sequence[LayerPlan]
    ) -> tuple[Tensor, PackedStage]:
        """What attention adds to the residual stream, and where its rows lie."""
        sizes, groups = self.architecture.sizes, self.groups
        key_rows, query_rows = [plan.keys_values.rows for plan in plans], [plan.queries.rows for plan in plans]
        key_stage = place(groups, key_rows, self.device)
        keys_values = self.space.take("keys", key_stage.rows, sizes.key_value_width)
        index = gather_rows([plan.keys_values for plan in plans], stage)
        positions = spread([plan.key_tokens for plan in plans], key_rows, groups, self.device)
        self._project(block.keys_values_of, rows, index, keys_values, positions, block.attn_in)

        query_stage = place(groups, query_rows, self.device)
        queries = self.space.take("queries", query_stage.rows, sizes.query_width)
        index = gather_rows([plan.queries for plan in plans], stage)
        positions = spread([plan.query_tokens for plan in plans], query_rows, groups, self.device)
        self._project(block.queries_of, rows, index, queries, positions, block.attn_in)

        attn_stage = place_attention(groups, plans, self.device)
        heads = self.space.take("heads", attn_stage.computed + attn_stage.mixed, sizes.query_width)
        self._attend(queries, query_stage, keys_values, key_stage, block, plans, heads)
        if attn_stage.mixed:
            mix_heads(heads, attn_stage, groups, plans, sizes.head_dim)
        attn = self.space.take("queries", attn_stage.rows, sizes.hidden)
        self._project(block.attention_output, heads, None, attn[: len(heads)])
        return attn, attn_stage

    def _attend(
        self,
        queries: Tensor,
        query_stage: PackedStage,
        keys_values: Tensor,
        key_stage: PackedStage,
        block: Block,
        plans: Sequence[LayerPlan],
        out: Tensor,
    ) -> None:
        """The heads' outputs, segment by segment: one dense batch for all runs that query for the same tokens."""
        scoring = ScoreRule(block.head_dim, block.scale, block.softcap, block.window)
        first = 0
        for plan, keys, queried in zip(plans, key_stage.placements, query_stage.placements, strict=True):
            for segment in plan.segments:
                q, k = segment_rows(segment, queried, keys)
                outputs = out[first : first + q.numel()]
                runs = RunRows(q, k, segment.tokens)
                self.backends.attend_rows(queries, keys_values, runs, scoring, outputs, self.tiles.keys)
                first += q.numel()

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
        for piece in pieces(len(out), self.tiles.rows):
            source = rows[piece] if index is None else self.backends.gather_normed(rows, index[piece], norm)
            out[piece] = function(source) if positions is None else function(source, positions[piece])

    def _give(self, out: Tensor, stage: PackedStage, givens: Sequence[Given]) -> None:
        """Fill the rows of a stage that are given, which lie after those that it computes."""
        first = stage.computed + stage.mixed
        for group, given in zip(self.groups, givens, strict=True):
            count = given.rows.count(group.facts, group.samples)
            if count:
                out[first : first + count] = torch.cat(group.given_rows(given, out.shape[1], out.device))
            first += count

    def _capture(self, site: str, rows: Tensor, stage: PackedStage, plans: Sequence[LayerPlan]) -> None:
        """Keep the rows of a stage that are handed out."""
        for states, plan, placement in zip(self.states, plans, stage.placements, strict=True):
            if site in plan.captured:
                captured = plan.captured[site]
                flat = placement.flat(captured.row, varying=True)
                values = rows.index_select(0, flat.flatten()).view(*flat.shape, -1).to(states.dtype)
                states[:, :, on_device(captured.number, self.device)] = values

    def _read_out(self, rows: Tensor, stage: PackedStage) -> list[PassResult]:
        plans = [group.plan for group in self.groups]
        read_stage = place(self.groups, [plan.read_rows.rows for plan in plans], self.device)
        states, index = rows.new_empty(read_stage.rows, rows.shape[1]), gather_rows([p.read_rows for p in plans], stage)
        self._project(self.architecture.final_norm, rows, index, states)
        return read_logits(self.architecture, states, read_stage, self.groups, self.tiles, self.states, self.backends)


def enter(architecture: Architecture, groups: Sequence[Group], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Input rows of the first layer: embeddings of the prompts' tokens, and those that carry noise in every sample."""
    embedded, positions = [], []
    for group in groups:
        entries, shared = group.plan.entries, group.plan.layers[0].inputs.shared
        prompt, token, draw, replaced = (on_device(column, device) for column in vars(entries).values())
        embeddings = architecture.embed(group.tokens.flatten()).to(device, dtype).unflatten(0, group.tokens.shape)
        carried = on_device(group.noise, device)[:, draw[shared:], token[shared:] - group.plan.shape.noised[0]]
        clean = embeddings[:, None, prompt[shared:], token[shared:]]
        corrupted = (clean.where(~replaced[shared:, None], 0) + carried).to(dtype)
        embedded += [embeddings[:, prompt[:shared], token[:shared]].flatten(0, 1), corrupted.flatten(0, 2)]
        positions += [token[:shared].repeat(group.facts), token[shared:].repeat(group.facts * group.samples)]
    return architecture.enter(torch.cat(embedded), torch.cat(positions))


def segment_rows(segment: Segment, queried: Placement, keys: Placement) -> tuple[Tensor, Tensor]:
    """Query rows (B, m) and key rows (B, K) of a segment's runs, for all facts and samples."""
    query_rows, key_rows = queried.flat(segment.queries, segment.varying), keys.flat(segment.keys, segment.varying)
    return query_rows.flatten(0, -2), key_rows.flatten(0, -2)


def _most_likely(readout: Readout, states: Tensor, rows: Sequence[Tensor]) -> Iterator[Tensor]:
    """The most likely token of each row of ``states`` that the index tensors name, in their shapes, by one walk through
    the unembedding."""
    if rows:
        tokens = readout.most_likely(states[torch.cat([index.flatten() for index in rows])])
        parts = tokens.split([index.numel() for index in rows])
        yield from (likely.view(index.shape) for likely, index in zip(parts, rows, strict=True))


def read_logits(
    architecture: Architecture,
    states: Tensor,
    stage: PackedStage,
    groups: Sequence[Group],
    tiles: Tiles,
    captured: Sequence[Tensor],
    backends: Backends,
) -> list[PassResult]:
    """The outcome of normed final rows ``states`` (R, hidden)."""
    device = states.device
    readout = Readout(
        *architecture.unembedding(), tiles.readout_rows, tiles.vocabulary, architecture.logit_softcap, backends=backends
    )
    read = [on_device(group.plan.read, device) for group in groups]
    unknown = [
        placement.flat(ids[CLEAN], varying=False).flatten(0, 1)
        for group, placement, ids in zip(groups, stage.placements, read, strict=True)
        if group.targets is None
    ]
    likely = _most_likely(readout, states, unknown)
    wanted: list[Tensor] = []
    for group in groups:
        wanted += group.read_targets(next(likely) if group.targets is None else group.targets, device)

    log_p = readout.target_log_probabilities(states, torch.cat(wanted))
    outcomes = []
    for group, placement, ids, values in zip(groups, stage.placements, read, captured, strict=True):
        logits = _logits(readout, states, group, placement)
        outcomes.append(PassResult(log_p[placement.flat(ids, varying=True)], values, logits))
    return outcomes


def _logits(readout: Readout, states: Tensor, group: Group, placement: Placement) -> Tensor:
    """The logits that a group's plan hands out (F, J, n, vocabulary), each row's computed once."""
    distinct, number = np.unique(group.plan.logits, return_inverse=True)
    shared = int((distinct < group.plan.read_rows.rows.shared).sum())
    rows = (placement.flat(distinct[:shared], varying=False), placement.flat(distinct[shared:], varying=True))
    computed = readout.logits(states[torch.cat([index.flatten() for index in rows])])
    (packed,) = place([group], [Rows(shared, len(distinct) - shared)], states.device).placements
    return computed[packed.flat(number, varying=True)]


def mix_heads(
    heads: Tensor, stage: PackedStage, groups: Sequence[Group], plans: Sequence[LayerPlan], head_dim: int
) -> None:
    """Fill the mixed rows of ``heads`` (R, H * head_dim), which lie after those that attention computes."""
    for group, plan, placement in zip(groups, plans, stage.placements, strict=True):
        mix, computed = plan.mix, plan.attn.total
        shared = mix.base.rows.shared
        for rows, varying in ((np.arange(shared), False), (np.arange(shared, mix.base.rows.total), True)):
            if len(rows):
                to, source = placement.flat(computed + rows, varying), placement.flat(mix.base.source[rows], varying)
                heads[to.flatten()] = heads[source.flatten()]
                _patch(heads.unflatten(1, (-1, head_dim)), placement, group, mix, computed, rows, varying)


def _patch(
    heads: Tensor, placement: Placement, group: Group, mix: Mix, computed: int, rows: np.ndarray, varying: bool
) -> None:
    """heads (R, H, head_dim): put the overwritten heads of the mixes ``rows`` in their place."""
    inside = np.isin(mix.row, rows)
    for is_given in (False, True):
        patches = inside & ((mix.source < 0) == is_given)
        if not patches.any():
            continue
        to, sources = placement.flat(computed + mix.row[patches], varying), mix.source[patches]
        head = on_device(mix.head[patches], to.device)
        if is_given:
            vectors = [group.vector(source, heads.shape[2], heads.device) for source in sources.tolist()]
            by_sample = [vector if vector.dim() == 3 else vector[:, None] for vector in vectors]  # (F, 1 or J, d)
            values = torch.stack(by_sample, dim=-2)
        else:
            values = heads[placement.flat(sources, varying), head]
        heads[to, head] = values.to(heads.dtype)
