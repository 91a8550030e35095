"""What a plan costs: floating-point operations, and bytes at the widest point of a pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from causalcone.engine.models.base import Sizes
from causalcone.engine.plan import Plan, Rows
from causalcone.engine.wave import Tiles
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


def bytes_by_phase(plan: Plan, sizes: Sizes, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of live tensors in each phase of each layer, per fact and per fact and sample: two arrays (phases,).

    A pass peaks at the largest sum over its facts of one phase, since all facts go through the layers together.
    """
    D, heads = sizes.hidden * itemsize, sizes.heads * sizes.head_dim * itemsize
    kv = 2 * sizes.kv_heads * sizes.head_dim * itemsize
    phases: list[list[tuple[Rows, int]]] = [[(plan.layers[0].inputs, 3 * D + 8 * sizes.hidden)]]
    for layer in plan.layers:
        mid, out = layer.mid_input.rows, layer.out_mid.rows
        inputs = [(layer.inputs, D)]
        keys = [(layer.keys_values.rows, kv + INDEX_BYTES), (layer.queries.rows, heads + INDEX_BYTES)]
        widest = max((segment.queries.size + segment.keys.size for segment in layer.segments), default=0)
        phases += [
            [*inputs, *keys, (layer.attn, heads), (Rows(0, widest), INDEX_BYTES)],
            [*inputs, (layer.attn, heads + D)],
            [*inputs, (layer.attn, D), (mid, 2 * D + 2 * INDEX_BYTES)],
            [(mid, D), (layer.mlp.rows, D + INDEX_BYTES), (out, 2 * D + 2 * INDEX_BYTES)],
        ]
    runs = Rows(0, plan.read.size)
    phases.append([(plan.outputs, 2 * D + 6 * INDEX_BYTES), (runs, 4 * INDEX_BYTES)])
    shared, varying = (
        np.array([sum(getattr(rows, part) * size for rows, size in phase) for phase in phases], dtype=np.int64)
        for part in ("shared", "varying")
    )
    return shared, varying


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
    attention = itemsize * tiles.keys * (2 * kv + 2 * heads)
    logits = tiles.readout_rows * vocabulary * (itemsize + 2 * max(4, itemsize))
    return max(layer + product + attention, unembedding + logits)
