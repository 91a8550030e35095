"""What a plan costs: floating-point operations, and bytes at the widest point of a pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from causalcone.engine.models.base import Sizes
from causalcone.engine.plan import Plan, Rows
from causalcone.engine.wave import Tiles
from causalcone.engine.workspace import SLOTS, slot_uses
from causalcone.kernels.linear import packs

INDEX_BYTES = 8


@dataclass(frozen=True)
class Cost:
    """Of a plan, for ``facts`` facts with ``samples`` samples each. FLOPs are multiply-adds x 2."""

    flops: int
    attention_flops: int
    rows: int


def cost(plan: Plan, sizes: Sizes, facts: int, samples: int, argmax: bool) -> Cost:
    """FLOPs of all projections and the unembedding as the pass executes them, FLOPs of attention products, and the
    rows that go through the layers (counted at each layer's output). ``argmax`` says that the target is looked up in
    the clean run's logits first."""
    heads, kv = sizes.heads * sizes.head_dim, 2 * sizes.kv_heads * sizes.head_dim
    weights = attention = rows = 0
    for layer in plan.layers:
        weights += layer.keys_values.rows.count(facts, samples) * sizes.hidden * kv
        weights += layer.queries.rows.count(facts, samples) * sizes.hidden * heads
        weights += layer.attn.count(facts, samples) * heads * sizes.hidden
        weights += layer.mlp.rows.count(facts, samples) * sizes.mlp_weights
        for segment in layer.segments:
            batches = facts * (samples if segment.varying else 1)
            attention += 2 * batches * segment.queries.size * segment.keys.shape[1] * heads
        rows += layer.out_mid.rows.count(facts, samples)
    read = plan.outputs.count(facts, samples) + argmax * facts
    weights += read * sizes.hidden * sizes.vocabulary
    return Cost(2 * weights, 2 * attention, rows)


def naive_flops(sizes: Sizes, tokens: int, samples: int, restorations: int) -> int:
    """FLOPs of published code: for every restoration, one forward of the clean and all corrupted sequences with all
    logits; the base runs once. Attention products are left out, as in ``cost``."""
    heads, kv = sizes.heads * sizes.head_dim, 2 * sizes.kv_heads * sizes.head_dim
    layer = sizes.hidden * (kv + 2 * heads) + sizes.mlp_weights
    forward = tokens * (sizes.depth * layer + sizes.hidden * sizes.vocabulary)
    return 2 * (1 + restorations) * (1 + samples) * forward


def bytes_by_use(plan: Plan, sizes: Sizes, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of everything a pass holds, per fact and per fact and sample: two arrays (kinds of memory, uses).

    The kinds are the workspace's slots, index arrays, and what the first and last step need besides. Uses of one kind
    follow each other, so a pass takes the largest sum over its facts of one use, added up over the kinds.
    """
    slots = slot_uses(plan, sizes)
    kinds = [[[(rows, width * itemsize)] for rows, width in slots[slot]] for slot in SLOTS]
    indices: list[list[tuple[Rows, int]]] = []
    for layer in plan.layers:
        widest = max((segment.queries.size + segment.keys.size for segment in layer.segments), default=0)
        indices += [
            [(Rows(0, widest), 2 * INDEX_BYTES), (layer.attn, 3 * INDEX_BYTES)],
            [(layer.keys_values.rows, 2 * INDEX_BYTES), (layer.queries.rows, 2 * INDEX_BYTES)],
            [(layer.mid_input.rows, 4 * INDEX_BYTES), (layer.out_mid.rows, 2 * INDEX_BYTES)],
        ]
    ends = [
        [(plan.layers[0].inputs, 3 * sizes.hidden * itemsize + 8 * sizes.hidden)],
        [(plan.outputs, 2 * sizes.hidden * itemsize + 6 * INDEX_BYTES), (Rows(0, plan.read.size), 4 * INDEX_BYTES)],
    ]
    kinds += [indices, ends]
    bytes_of = np.zeros((2, len(kinds), max(map(len, kinds))), dtype=np.int64)
    for number, uses in enumerate(kinds):
        for place, use in enumerate(uses):
            bytes_of[:, number, place] = [
                sum(rows.shared * size for rows, size in use),
                sum(rows.varying * size for rows, size in use),
            ]
    return bytes_of[0], bytes_of[1]


def fixed_bytes(sizes: Sizes, tiles: Tiles, dtype: torch.dtype, device: torch.device, shared: bool) -> int:
    """Bytes a pass needs whatever it holds: tiles, and copies of one layer's weights. ``shared`` says that the model's
    own weights have the dtype and device of the pass."""
    itemsize = dtype.itemsize
    heads, kv = sizes.heads * sizes.head_dim, 2 * sizes.kv_heads * sizes.head_dim
    copied = packs(torch.empty(0, dtype=dtype, device=device)) + (not shared)
    layer = copied * itemsize * (sizes.hidden * (2 * heads + kv) + sizes.mlp_weights)
    vocabulary = min(tiles.vocabulary, sizes.vocabulary)
    unembedding = copied * itemsize * vocabulary * sizes.hidden
    product = itemsize * tiles.rows * (3 * sizes.hidden + max(2 * sizes.inner, kv, heads))
    attention = (itemsize + max(4, itemsize)) * tiles.keys * (kv + 2 * heads)
    logits = tiles.readout_rows * vocabulary * (itemsize + 2 * max(4, itemsize))
    return max(layer + product + attention, unembedding + logits)
