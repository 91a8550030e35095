"""What a pass computes, as index arrays: compiled from an experiment on facts of one shape by ``compiler.py``.

A plan holds, for one fact and one noise sample, which rows each layer computes and from which rows. Row numbers are
local to a stage: the shared rows (one per fact), the varying rows (one per fact and sample), then the given rows.
``engine/run/packing.py`` lays them out for many facts and samples.
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass

import numpy as np

from causalcone.engine.plan.cone import Entries, Shape

INDEX = np.int32
"""Of rows, local and packed. Kernels widen it before they multiply it by a row's width."""


@dataclass(frozen=True)
class Rows:
    """How many rows a stage computes: per fact, and per fact and sample."""

    shared: int
    varying: int

    @property
    def total(self) -> int:
        return self.shared + self.varying

    def count(self, facts: int, samples: int) -> int:
        return facts * (self.shared + samples * self.varying)

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.shared + other.shared, self.varying + other.varying)


@dataclass(frozen=True)
class Given:
    """Rows of a stage that are overwritten with values from outside the pass (zeros, vectors), after those it computes:
    shared ones first, then varying ones.

    source: for each row ``ZERO`` or the number of a given vector, as ``interventions.given`` counts them.
    """

    rows: Rows
    source: np.ndarray


@dataclass(frozen=True)
class Gather:
    """For each row that a stage computes, shared rows first, the row of an earlier stage that it reads."""

    rows: Rows
    source: np.ndarray


@dataclass(frozen=True)
class Segment:
    """Runs that query for the same tokens, whose attention is one dense batch.

    tokens (m,): the tokens that query; queries (B, m): their query rows; keys (B, K): the rows of tokens 0..K-1.
    Its outputs are the B * m attention rows from ``first`` on.
    """

    varying: bool
    first: int
    tokens: tuple[int, ...]
    queries: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class Mix:
    """Attention rows of which single heads are overwritten: each is a copy of ``base``, and then, patch by patch,
    ``head`` of ``row`` (numbered within the mixes) from the attention row ``source``, or given (negative sources)."""

    base: Gather
    row: np.ndarray
    head: np.ndarray
    source: np.ndarray


@dataclass(frozen=True)
class Captured:
    """Rows of a stage that are handed out: ``number`` of each capture, and its row."""

    number: np.ndarray
    row: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer: inputs -> keys/values and queries -> attention -> residual after it -> MLP -> outputs.

    The rows of attention are ``attn`` that it computes, segment by segment, then ``mix``, then ``attn_given``.
    """

    inputs: Rows
    keys_values: Gather  # of input rows
    key_tokens: np.ndarray
    queries: Gather  # of input rows
    query_tokens: np.ndarray
    attn: Rows
    segments: tuple[Segment, ...]
    mix: Mix
    attn_given: Given
    mid_input: Gather  # mid = input + attention output
    mid_attn: Gather
    mlp: Gather  # of mid rows, or of input rows where attention and MLP are parallel
    mlp_given: Given
    out_mid: Gather  # output = mid + MLP output
    out_mlp: Gather
    out_given: Given
    captured: dict[str, Captured]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layers of an experiment on a shape, and where its runs are read out.

    entries: the embeddings that are the first layer's input rows.
    read_rows: of the last layer's outputs, those that are normed and read; read_place (readouts,): for each of its
    rows, which of the target's tokens it predicts, -1 where only its logits are wanted.
    read (R, k): for each run and target token, the readout row that predicts it; logits (n,): readout rows.
    captures: how many values are handed out.
    """

    shape: Shape
    parallel: bool
    entries: Entries
    layers: tuple[LayerPlan, ...]
    read_rows: Gather
    read_place: np.ndarray
    read: np.ndarray
    logits: np.ndarray
    captures: int


def array_bytes(value: object) -> int:
    """Bytes of the arrays of a plan, or of anything in it."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, tuple):
        return sum(map(array_bytes, value))
    fields = value if isinstance(value, dict) else vars(value) if is_dataclass(value) else {}
    return sum(map(array_bytes, fields.values()))
