"""What a plan costs: floating-point operations, and bytes at the widest point of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from causalcone.engine.models.base import Sizes
from causalcone.engine.plan.buffers import SLOTS, slot_uses
from causalcone.engine.plan.plan import LayerPlan, Plan, Rows
from causalcone.kernels.backends import TORCH, Backends
from causalcone.kernels.linear import packs
from causalcone.kernels.tiles import Tiles

INDEX_BYTES = 2 * 4
"""Of an element of index arrays: those of a layer are there, and those of the next are made ahead."""


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
    weights = attention = rows = 0
    for layer in plan.layers:
        queried = layer.queries.rows + layer.attn + layer.mix.base.rows
        weights += layer.keys_values.rows.count(facts, samples) * sizes.key_value_weights
        weights += queried.count(facts, samples) * sizes.query_weights
        weights += layer.mlp.rows.count(facts, samples) * sizes.mlp_weights
        for segment in layer.segments:
            products = segment.queries.size * segment.keys.shape[1] * sizes.query_width
            attention += 2 * facts * (samples if segment.varying else 1) * products
        rows += (layer.out_mid.rows + layer.out_given.rows).count(facts, samples)
    read = plan.read_rows.rows.count(facts, samples) + argmax * facts
    distinct = np.unique(plan.logits)
    shared = int((distinct < plan.read_rows.rows.shared).sum())
    read += Rows(shared, len(distinct) - shared).count(facts, samples)
    weights += read * sizes.hidden * sizes.vocabulary
    return Cost(2 * weights, 2 * attention, rows)


def forward_flops(sizes: Sizes, tokens: int) -> int:
    """FLOPs of one whole forward of a sequence with all its logits; attention products are left out, as in ``cost``."""
    return 2 * tokens * (sizes.depth * sizes.layer_weights + sizes.hidden * sizes.vocabulary)


def bytes_by_use(plan: Plan, sizes: Sizes, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of everything a pass holds, per fact and per fact and sample: two arrays (kinds of memory, uses).

    The kinds are the workspace's slots, index arrays, and what the first and last step need besides. Uses of one kind
    follow each other, so a pass takes the largest sum over its facts of one use, added up over the kinds.
    """
    slots = slot_uses(plan, sizes)
    kinds = [[[(rows, width * itemsize)] for rows, width in slots[slot]] for slot in SLOTS]
    indices = [[(rows, count * INDEX_BYTES) for rows, count in _indices(layer)] for layer in plan.layers]
    read = [
        (plan.read_rows.rows, 2 * sizes.hidden * itemsize + 6 * INDEX_BYTES),
        (Rows(0, plan.read.size), 4 * INDEX_BYTES),
        (Rows(0, plan.captures), 2 * sizes.hidden * itemsize),
        (Rows(0, len(plan.logits)), sizes.vocabulary * 2 * max(4, itemsize)),
    ]
    entered = 3 * sizes.hidden * itemsize + 8 * sizes.hidden
    ends = [[(plan.layers[0].inputs, entered), (Rows(0, plan.captures), sizes.hidden * itemsize)], read]
    kinds += [indices, ends]
    shared, varying = np.zeros((2, len(kinds), max(map(len, kinds))), dtype=np.int64)
    for number, uses in enumerate(kinds):
        for slot, use in enumerate(uses):
            shared[number, slot] = sum(rows.shared * size for rows, size in use)
            varying[number, slot] = sum(rows.varying * size for rows, size in use)
    return shared, varying


def _indices(layer: LayerPlan) -> Iterator[tuple[Rows, int]]:
    """Rows of a layer, and how many index elements each has (``engine/run/pass_rows.py``)."""
    yield layer.keys_values.rows + layer.queries.rows + layer.out_mid.rows, 2
    yield layer.mid_input.rows, 3
    yield layer.mlp.rows + layer.mix.base.rows + layer.attn_given.rows + layer.mlp_given.rows + layer.out_given.rows, 1
    for segment in layer.segments:
        runs, size = len(segment.queries), segment.queries.size + segment.keys.size
        yield Rows(0, size + 4 * runs) if segment.varying else Rows(size + 4 * runs, 0), 1


def weight_bytes(sizes: Sizes, dtype: torch.dtype) -> int:
    """Bytes of the weights of all layers' projections and of the unembedding."""
    return dtype.itemsize * (sizes.depth * sizes.layer_weights + sizes.vocabulary * sizes.hidden)


def fixed_bytes(
    sizes: Sizes,
    tiles: Tiles,
    dtype: torch.dtype,
    device: torch.device,
    shared: bool,
    gradient: bool = False,
    streamed: bool = False,
    backends: Backends = TORCH,
) -> int:
    """Bytes a pass needs whatever it holds: tiles, and copies of one layer's weights. ``shared`` says that the model's
    own weights have the dtype and device of the pass; ``gradient`` that the pass goes back as well: then copies of all
    layers' weights are kept, and rows have their logits over the whole vocabulary; ``streamed`` that slices of the
    unembedding are read from files: the last one, this one and the next are there at once; ``backends`` compute it."""
    itemsize = dtype.itemsize
    heads, kv = sizes.query_width, sizes.key_value_width
    packed = int(packs(torch.empty(0, dtype=dtype, device=device)))
    copied = packed + (not shared)
    layer = copied * itemsize * sizes.layer_weights
    vocabulary = min(tiles.vocabulary, sizes.vocabulary)
    unembedding = (2 * copied + 3 if streamed else copied) * itemsize * vocabulary * sizes.hidden
    gated = sizes.mlp_weights > 2 * sizes.hidden * sizes.inner
    joined = backends.rows == "triton" or packed  # the gate and what it multiplies in place
    inner = (2 if joined or not gated else 3) * sizes.inner
    product = itemsize * tiles.rows * (3 * sizes.hidden + max(inner, kv, heads))
    gathered = backends.attention != "triton"  # which reads rows where they are
    attention = gathered * (itemsize + max(4, itemsize)) * tiles.keys * (kv + 2 * heads)
    logits = tiles.readout_rows * vocabulary * (itemsize + 2 * max(4, itemsize))
    if gradient:
        # keys and values are one product, for which some architectures join two weights
        copies = sizes.depth * itemsize * (sizes.key_value_weights if shared else sizes.layer_weights)
        unembedding = 2 * copied * itemsize * sizes.vocabulary * sizes.hidden
        logits = tiles.readout_rows * sizes.vocabulary * 2 * max(4, itemsize)
        return copies + max(2 * layer, unembedding + logits)
    return max(layer + product + attention, unembedding + logits)


@dataclass(frozen=True)
class Footprint:
    """What a plan's rows weigh in each use of each kind of memory (``bytes_by_use``), per fact and per fact and sample,
    and its widest layer's rows."""

    shared: np.ndarray
    varying: np.ndarray
    rows: Rows

    @classmethod
    def of(cls, plan: Plan, sizes: Sizes, itemsize: int) -> Footprint:
        return cls(*bytes_by_use(plan, sizes, itemsize), _widest(plan))

    @classmethod
    def of_gradient(cls, plan: Plan, sizes: Sizes, itemsize: int) -> Footprint:
        """What a plan's rows weigh in a pass under autograd: what all layers save for the way back, and what the widest
        works with."""
        heads, kv, hidden = sizes.query_width, sizes.key_value_width, sizes.hidden
        inner = sizes.mlp_weights // hidden
        saved, working = [], []
        for layer in plan.layers:
            segments = [segment for segment in layer.segments if segment.varying]
            queried, seen = sum(s.queries.size for s in segments), sum(s.keys.size for s in segments)
            scores = sizes.heads * sum(s.queries.size * s.keys.shape[1] for s in segments)
            saved += [
                (layer.keys_values.rows, 3 * hidden + kv),
                (layer.queries.rows, 3 * hidden + heads),
                (Rows(0, queried), 4 * heads),
                (Rows(0, seen), 2 * kv),
                (Rows(0, scores), 3),
                (layer.mlp.rows, 3 * hidden + inner),
            ]
            rows = layer.keys_values.rows.varying + layer.queries.rows.varying + layer.mlp.rows.varying
            working.append(rows * 2 * (hidden + heads + kv) + layer.mlp.rows.varying * inner + 2 * seen * kv)
        saved += [(plan.read_rows.rows, 3 * hidden), (Rows(0, plan.read.size), 8)]
        shared = sum(rows.shared * width for rows, width in saved) * itemsize
        varying = (sum(rows.varying * width for rows, width in saved) + max(working)) * itemsize
        return cls(np.array([[shared]]), np.array([[varying]]), _widest(plan))

    def bytes(self, samples: int) -> np.ndarray:
        return self.shared + samples * self.varying


def _widest(plan: Plan) -> Rows:
    return max((layer.mid_input.rows for layer in plan.layers), key=lambda rows: rows.varying)


def peak_bytes(held: np.ndarray | int) -> int:
    """Bytes of the largest use of each kind of memory together."""
    return int(np.max(held, axis=1).sum()) if isinstance(held, np.ndarray) else 0
