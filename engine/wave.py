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
from causalcone.kernels.attention import attend
from causalcone.kernels.readout import Readout
from causalcone.kernels.tiles import pieces


@dataclass(frozen=True)
class Tiles:
    """How large the pieces are in which a pass walks its stages: rows of a matrix product, key rows gathered for
    attention, and rows x vocabulary of the readout."""

    rows: int = 1024
    keys: int = 4096
    readout_rows: int = 512
    vocabulary: int = 8192


@torch.inference_mode()
def run_pass(
    architecture: Architecture, groups: Sequence[Group], tiles: Tiles, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Log-probabilities of the target tokens in all runs of all groups' facts.

    Returns for each group a float64 tensor (F, J, R, k): fact, sample, run of its plan, target token.
    """
    stage = place(groups, [group.plan.layers[0].inputs for group in groups], device)
    rows = _embed(architecture, groups, dtype, device)
    for layer in range(architecture.sizes.depth):
        block = architecture.block(layer, dtype, device)
        plans = [group.plan.layers[layer] for group in groups]
        rows = _run_layer(rows, stage, block, groups, plans, tiles)
        stage = place(groups, [plan.out_mid.rows for plan in plans], device)
    return _read_out(architecture, rows, stage, groups, tiles)


def _embed(architecture: Architecture, groups: Sequence[Group], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Input rows of the first layer: clean embeddings, and those of the noised tokens in every sample."""
    embedded, positions = [], []
    for group in groups:
        plan, shared = group.plan, group.plan.layers[0].inputs.shared
        embeddings = architecture.embed(group.tokens.flatten()).to(device, dtype).unflatten(0, group.tokens.shape)
        token = torch.from_numpy(plan.input_token).to(device)
        noised = token[shared:]
        noise = group.noise.to(device)[:, noised - plan.shape.noised[0]]
        corrupted = (embeddings[:, None, noised] + noise).to(dtype)
        embedded += [embeddings[:, token[:shared]].flatten(0, 1), corrupted.flatten(0, 2)]
        positions += [token[:shared].repeat(group.facts), noised.repeat(group.facts * group.samples)]
    return architecture.enter(torch.cat(embedded), torch.cat(positions))


def _run_layer(
    rows: Tensor, stage: Stage, block: Block, groups: Sequence[Group], plans: Sequence[LayerPlan], tiles: Tiles
) -> Tensor:
    """One layer: input rows (R, hidden) to output rows. Overwritten values are rows gathered from another run."""
    attn, attn_stage = _attention(rows, stage, block, groups, plans, tiles)
    mid = rows.index_select(0, gather_rows([plan.mid_input for plan in plans], stage))
    del rows
    mid += attn.index_select(0, gather_rows([plan.mid_attn for plan in plans], attn_stage))
    del attn

    device = mid.device
    mid_stage = place(groups, [plan.mid_input.rows for plan in plans], device)
    mlp = _project(block.mlp, mid, gather_rows([plan.mlp for plan in plans], mid_stage), tiles.rows)
    mlp_stage = place(groups, [plan.mlp.rows for plan in plans], device)
    out = mid.index_select(0, gather_rows([plan.out_mid for plan in plans], mid_stage))
    del mid
    out += mlp.index_select(0, gather_rows([plan.out_mlp for plan in plans], mlp_stage))
    return out


def _attention(
    rows: Tensor, stage: Stage, block: Block, groups: Sequence[Group], plans: Sequence[LayerPlan], tiles: Tiles
) -> tuple[Tensor, Stage]:
    """What attention adds to the residual stream, (attention rows, hidden), and where its rows lie."""
    device = rows.device
    keys_values = _project(
        block.keys_values, rows, gather_rows([plan.keys_values for plan in plans], stage), tiles.rows
    )
    queries = _project(block.queries, rows, gather_rows([plan.queries for plan in plans], stage), tiles.rows)
    key_stage = place(groups, [plan.keys_values.rows for plan in plans], device)
    query_stage = place(groups, [plan.queries.rows for plan in plans], device)
    attn_stage = place_attention(groups, plans, device)

    heads = queries.new_empty(attn_stage.rows, queries.shape[1])
    first = 0
    for plan, keys, queried in zip(plans, key_stage.placements, query_stage.placements, strict=True):
        for segment in plan.segments:
            query_rows = queried.flat(torch.from_numpy(segment.queries).to(device), segment.varying)
            key_rows = keys.flat(torch.from_numpy(segment.keys).to(device), segment.varying)
            m, K = segment.queries.shape[1], segment.keys.shape[1]
            visible = torch.arange(K, device=device) <= torch.tensor(segment.tokens, device=device)[:, None]
            runs = max(1, tiles.keys // K)
            for q, k in zip(query_rows.view(-1, m).split(runs), key_rows.view(-1, K).split(runs), strict=True):
                key, value = keys_values.index_select(0, k.flatten()).view(len(k), K, 2, -1, block.head_dim).unbind(2)
                query = queries.index_select(0, q.flatten()).view(len(q), m, -1, block.head_dim)
                heads[first : first + q.numel()] = (
                    attend(query, key, value, visible, block.scale).flatten(2).flatten(0, 1)
                )
                first += q.numel()
    del keys_values, queries
    return _project(block.attention_output, heads, None, tiles.rows), attn_stage


def _project(function: Callable[[Tensor], Tensor], rows: Tensor, index: Tensor | None, tile: int) -> Tensor:
    """``function`` of the indexed rows (all where there is no index), computed in tiles that stay in cache."""
    count = len(rows) if index is None else len(index)
    out: Tensor | None = None
    for part in pieces(count, tile):
        result = function(rows[part] if index is None else rows.index_select(0, index[part]))
        if out is None:
            out = result.new_empty(count, result.shape[1])
        out[part] = result
    assert out is not None, "a pass has rows at every stage"
    return out


def _read_out(
    architecture: Architecture, rows: Tensor, stage: Stage, groups: Sequence[Group], tiles: Tiles
) -> list[Tensor]:
    states = _project(architecture.final_norm, rows, None, tiles.rows)
    readout = Readout(*architecture.unembedding(), tiles.readout_rows, tiles.vocabulary)
    read = [torch.from_numpy(group.plan.read).to(rows.device) for group in groups]

    wanted = []
    for group, placement, ids in zip(groups, stage.placements, read, strict=True):
        targets = group.targets
        if targets is None:
            clean = placement.flat(ids[CLEAN], varying=False).flatten(0, 1)
            targets = readout.most_likely(states[clean.flatten()]).view(clean.shape)
        token = torch.from_numpy(group.plan.read_token).to(rows.device) - group.plan.shape.read[0]
        shared = group.plan.outputs.shared
        of_rows = targets.to(rows.device)[:, token]
        wanted += [of_rows[:, :shared].flatten(), of_rows[:, None, shared:].expand(-1, group.samples, -1).flatten()]

    log_p = readout.target_log_probabilities(states, torch.cat(wanted)).double()
    return [log_p[placement.flat(ids, varying=True)] for placement, ids in zip(stage.placements, read, strict=True)]
