"""Executes plans: a pass is one wave through the layers, with every row of every run of many facts in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalcone.engine.interventions import CLEAN
from causalcone.engine.layout import Group, Stage, gather_rows, place, place_attention
from causalcone.engine.models.base import Architecture, Block
from causalcone.engine.plan import LayerPlan
from causalcone.engine.workspace import Workspace, slot_elements, slot_uses
from causalcone.kernels.attention import attend
from causalcone.kernels.readout import Readout
from causalcone.kernels.tiles import pieces

MAX_RUNS = 16_384
"""Runs in one batch of attention; CUDA grids end at 65,535 blocks in some directions."""


@dataclass(frozen=True)
class Tiles:
    """How large the pieces are in which a pass walks its stages: rows of a matrix product, key rows gathered for
    attention, and rows x vocabulary of the readout."""

    rows: int = 1024
    keys: int = 4096
    readout_rows: int = 512
    vocabulary: int = 8192


@torch.inference_mode()
def run_pass(architecture: Architecture, groups: Sequence[Group], tiles: Tiles, space: Workspace) -> list[Tensor]:
    """Log-probabilities of the target tokens in all runs of all groups' facts, computed in the space's dtype.

    Returns for each group a float64 tensor (F, J, R, k): fact, sample, run of its plan, target token.
    """
    return _Wave(architecture, groups, tiles, space).run()


class _Wave:
    """One pass. Row tensors are (rows, width); a stage says which run's row lies where."""

    def __init__(self, architecture: Architecture, groups: Sequence[Group], tiles: Tiles, space: Workspace) -> None:
        self.architecture, self.groups, self.tiles, self.space = architecture, groups, tiles, space
        self.dtype, self.device = space.dtype, space.device

    def run(self) -> list[Tensor]:
        uses = [slot_uses(group.plan, self.architecture.sizes) for group in self.groups]
        self.space.reserve(slot_elements(uses, [(group.facts, group.samples) for group in self.groups]))
        stage = place(self.groups, [group.plan.layers[0].inputs for group in self.groups], self.device)
        rows = self._embed()
        for layer in range(self.architecture.sizes.depth):
            block = self.architecture.block(layer, self.dtype, self.device)
            plans = [group.plan.layers[layer] for group in self.groups]
            rows, stage = self._layer(rows, stage, block, plans)
        return self._read_out(rows, stage)

    def _embed(self) -> Tensor:
        """Input rows of the first layer: clean embeddings, and those of the noised tokens in every sample."""
        embedded, positions = [], []
        for group in self.groups:
            plan, shared = group.plan, group.plan.layers[0].inputs.shared
            embeddings = self.architecture.embed(group.tokens.flatten()).to(self.device, self.dtype)
            embeddings = embeddings.unflatten(0, group.tokens.shape)
            token = torch.from_numpy(plan.input_token).to(self.device)
            noised = token[shared:]
            noise = group.noise.to(self.device)[:, noised - plan.shape.noised[0]]
            corrupted = (embeddings[:, None, noised] + noise).to(self.dtype)
            embedded += [embeddings[:, token[:shared]].flatten(0, 1), corrupted.flatten(0, 2)]
            positions += [token[:shared].repeat(group.facts), noised.repeat(group.facts * group.samples)]
        return self.architecture.enter(torch.cat(embedded), torch.cat(positions))

    def _layer(self, rows: Tensor, stage: Stage, block: Block, plans: Sequence[LayerPlan]) -> tuple[Tensor, Stage]:
        """One layer: input rows to output rows. An overwritten value is a row gathered from another run."""
        hidden = self.architecture.sizes.hidden
        attn, attn_stage = self._attention(rows, stage, block, plans)

        mid_stage = place(self.groups, [plan.mid_input.rows for plan in plans], self.device)
        mid = self.space.take("heads", mid_stage.rows, hidden)
        inputs = gather_rows([plan.mid_input for plan in plans], stage)
        self._add(rows, inputs, attn, gather_rows([plan.mid_attn for plan in plans], attn_stage), mid)

        mlp_stage = place(self.groups, [plan.mlp.rows for plan in plans], self.device)
        mlp = self.space.take("keys", mlp_stage.rows, hidden)
        self._project(block.mlp, mid, gather_rows([plan.mlp for plan in plans], mid_stage), mlp)

        out_stage = place(self.groups, [plan.out_mid.rows for plan in plans], self.device)
        out = self.space.take("stream", out_stage.rows, hidden)
        mids = gather_rows([plan.out_mid for plan in plans], mid_stage)
        self._add(mid, mids, mlp, gather_rows([plan.out_mlp for plan in plans], mlp_stage), out)
        return out, out_stage

    def _attention(self, rows: Tensor, stage: Stage, block: Block, plans: Sequence[LayerPlan]) -> tuple[Tensor, Stage]:
        """What attention adds to the residual stream, and where its rows lie."""
        sizes = self.architecture.sizes
        key_stage = place(self.groups, [plan.keys_values.rows for plan in plans], self.device)
        keys_values = self.space.take("keys", key_stage.rows, 2 * sizes.kv_heads * sizes.head_dim)
        self._project(block.keys_values, rows, gather_rows([plan.keys_values for plan in plans], stage), keys_values)

        query_stage = place(self.groups, [plan.queries.rows for plan in plans], self.device)
        queries = self.space.take("queries", query_stage.rows, sizes.heads * sizes.head_dim)
        self._project(block.queries, rows, gather_rows([plan.queries for plan in plans], stage), queries)

        attn_stage = place_attention(self.groups, plans, self.device)
        heads = self.space.take("heads", attn_stage.rows, sizes.heads * sizes.head_dim)
        self._attend(queries, query_stage, keys_values, key_stage, block, plans, heads)
        attn = self.space.take("queries", attn_stage.rows, sizes.hidden)
        self._project(block.attention_output, heads, None, attn)
        return attn, attn_stage

    def _attend(
        self,
        queries: Tensor,
        query_stage: Stage,
        keys_values: Tensor,
        key_stage: Stage,
        block: Block,
        plans: Sequence[LayerPlan],
        out: Tensor,
    ) -> None:
        """The heads' outputs, segment by segment: one dense batch for all runs that query for the same tokens."""
        first = 0
        for plan, keys, queried in zip(plans, key_stage.placements, query_stage.placements, strict=True):
            for segment in plan.segments:
                query_rows = queried.flat(torch.from_numpy(segment.queries).to(self.device), segment.varying)
                key_rows = keys.flat(torch.from_numpy(segment.keys).to(self.device), segment.varying)
                m, K = segment.queries.shape[1], segment.keys.shape[1]
                tokens = torch.tensor(segment.tokens, device=self.device)
                visible = torch.arange(K, device=self.device) <= tokens[:, None]
                runs = min(max(1, self.tiles.keys // K), MAX_RUNS)
                for q, k in zip(query_rows.view(-1, m).split(runs), key_rows.view(-1, K).split(runs), strict=True):
                    gathered = keys_values.index_select(0, k.flatten()).view(len(k), K, 2, -1, block.head_dim)
                    query = queries.index_select(0, q.flatten()).view(len(q), m, -1, block.head_dim)
                    attended = attend(query, gathered[:, :, 0], gathered[:, :, 1], visible, block.scale)
                    out[first : first + q.numel()] = attended.flatten(2).flatten(0, 1)
                    first += q.numel()

    def _project(self, function: Callable[[Tensor], Tensor], rows: Tensor, index: Tensor | None, out: Tensor) -> None:
        """``out`` = ``function`` of the indexed rows (all where there is no index), in tiles that stay in cache."""
        for part in pieces(len(out), self.tiles.rows):
            out[part] = function(rows[part] if index is None else rows.index_select(0, index[part]))

    def _add(self, left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor, out: Tensor) -> None:
        """``out`` = indexed rows of ``left`` + indexed rows of ``right``."""
        for part in pieces(len(out), self.tiles.rows):
            torch.add(left.index_select(0, left_index[part]), right.index_select(0, right_index[part]), out=out[part])

    def _read_out(self, rows: Tensor, stage: Stage) -> list[Tensor]:
        states = torch.empty_like(rows)
        self._project(self.architecture.final_norm, rows, None, states)
        readout = Readout(*self.architecture.unembedding(), self.tiles.readout_rows, self.tiles.vocabulary)
        read = [torch.from_numpy(group.plan.read).to(self.device) for group in self.groups]

        wanted = []
        for group, placement, ids in zip(self.groups, stage.placements, read, strict=True):
            targets = group.targets
            if targets is None:
                clean = placement.flat(ids[CLEAN], varying=False).flatten(0, 1)
                targets = readout.most_likely(states[clean.flatten()]).view(clean.shape)
            token = torch.from_numpy(group.plan.read_token).to(self.device) - group.plan.shape.read[0]
            shared = group.plan.outputs.shared
            of_rows = targets.to(self.device)[:, token]
            wanted += [of_rows[:, :shared].flatten(), of_rows[:, None, shared:].expand(-1, group.samples, -1).flatten()]

        log_p = readout.target_log_probabilities(states, torch.cat(wanted))
        return [log_p[placement.flat(ids, varying=True)] for placement, ids in zip(stage.placements, read, strict=True)]
