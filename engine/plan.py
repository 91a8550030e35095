"""Compiles an experiment on facts of one shape into the index arrays of a pass.

A plan holds, for one fact and one noise sample, which rows each layer computes and from which rows. Row numbers are
local: first the shared rows (one per fact), then the varying rows (one per fact and sample); ``engine/layout.py`` lays
them out for many facts and samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from causalcone.engine.cone import LayerValues, Shape, find_cone
from causalcone.engine.interventions import Experiment


@dataclass(frozen=True)
class Rows:
    """How many rows a stage has: per fact, and per fact and sample."""

    shared: int
    varying: int

    @property
    def total(self) -> int:
        return self.shared + self.varying

    def count(self, facts: int, samples: int) -> int:
        return facts * (self.shared + samples * self.varying)


@dataclass(frozen=True)
class Gather:
    """For each row of a stage, shared rows first, the row of an earlier stage that it reads."""

    rows: Rows
    source: np.ndarray


@dataclass(frozen=True)
class Segment:
    """Runs whose attention is computed for the same tokens: one dense batch.

    tokens (m,): the tokens that query; queries (B, m): their query rows; keys (B, K): the rows of tokens 0..K-1.
    Its outputs are the B * m attention rows from ``first`` on.
    """

    varying: bool
    first: int
    tokens: tuple[int, ...]
    queries: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class LayerPlan:
    """One layer: inputs -> keys/values and queries -> attention -> residual after it -> MLP -> outputs."""

    inputs: Rows
    keys_values: Gather  # of input rows
    queries: Gather  # of input rows
    attn: Rows
    segments: tuple[Segment, ...]
    mid_input: Gather  # mid = input + attention output
    mid_attn: Gather
    mlp: Gather  # of mid rows
    out_mid: Gather  # output = mid + MLP output
    out_mlp: Gather


@dataclass(frozen=True)
class Plan:
    """The layers of an experiment on a shape, and where its runs are read out.

    input_token (inputs of layer 0,): the token of each embedded row.
    read_token (outputs of the last layer,): the token of each row that is read out.
    read (R, k): for each run and read token, the output row that predicts the next token.
    """

    shape: Shape
    input_token: np.ndarray
    layers: tuple[LayerPlan, ...]
    outputs: Rows
    read_token: np.ndarray
    read: np.ndarray


def compile_plan(shape: Shape, experiment: Experiment, depth: int) -> Plan:
    """Find the cone of an experiment and keep of it what the read-out rows depend on, last layer first."""
    cone = find_cone(shape, experiment, depth)
    read_first, read_end = shape.read
    final = cone.final[:, read_first:read_end]
    last_varies = cone.layers[-1].out_varies
    outputs = _Stage(_marked(len(last_varies), final), last_varies)
    read = outputs.local[final]
    read_token = np.empty(outputs.rows.total, dtype=np.int64)
    read_token[read] = np.arange(read_first, read_end)

    layers: list[LayerPlan] = []
    stage = outputs
    for values in reversed(cone.layers):
        plan, stage = _compile_layer(values, stage)
        layers.append(plan)
    return Plan(shape, cone.input_token[stage.kept], tuple(reversed(layers)), outputs.rows, read_token, read)


class _Stage:
    """The values of a stage that are needed, in row order: shared first, then varying."""

    def __init__(self, needed: np.ndarray, varies: np.ndarray) -> None:
        shared, varying = np.flatnonzero(needed & ~varies), np.flatnonzero(needed & varies)
        self.kept = np.concatenate([shared, varying])
        self.rows = Rows(len(shared), len(varying))
        self.local = np.full(len(needed), -1)
        self.local[self.kept] = np.arange(len(self.kept))

    def gather(self, source: _Stage, value: np.ndarray) -> Gather:
        """Where each row of this stage finds its ``value`` among the source's rows."""
        return Gather(self.rows, source.local[value[self.kept]])


def _marked(size: int, *numbers: np.ndarray) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for number in numbers:
        mask[number] = True
    return mask


def _compile_layer(values: LayerValues, outputs: _Stage) -> tuple[LayerPlan, _Stage]:
    mids, inputs = len(values.mid_varies), len(values.input_varies)
    out_mlp = values.out_mlp[outputs.kept]
    mlp = _Stage(_marked(mids, out_mlp), values.mid_varies)
    mid = _Stage(_marked(mids, values.out_mid[outputs.kept], out_mlp), values.mid_varies)

    attn = _marked(len(values.attn_varies), values.mid_attn[mid.kept])
    query_of = values.state[values.attn_run, values.attn_token]
    queries = _Stage(_marked(inputs, query_of[attn]), values.input_varies)
    keys = _Stage(_marked(inputs, *_keys(values, attn)), values.input_varies)
    needed = _marked(inputs, values.mid_input[mid.kept], queries.kept, keys.kept)
    stage = _Stage(needed, values.input_varies)

    segments, attn_local = _segments(values, attn, query_of, queries, keys)
    identity = np.arange(mids)
    plan = LayerPlan(
        inputs=stage.rows,
        keys_values=keys.gather(stage, np.arange(inputs)),
        queries=queries.gather(stage, np.arange(inputs)),
        attn=Rows(*(int((attn & (values.attn_varies == varies)).sum()) for varies in (False, True))),
        segments=segments,
        mid_input=mid.gather(stage, values.mid_input),
        mid_attn=Gather(mid.rows, attn_local[values.mid_attn[mid.kept]]),
        mlp=mlp.gather(mid, identity),
        out_mid=outputs.gather(mid, values.out_mid),
        out_mlp=outputs.gather(mlp, values.out_mlp),
    )
    return plan, stage


def _querying(values: LayerValues, attn: np.ndarray) -> np.ndarray:
    """(A, T) which of each run's tokens stand for a needed attention output, and which output that is (else -1)."""
    output = np.full(values.state.shape, -1)
    output[values.attn_run[attn], values.attn_token[attn]] = np.flatnonzero(attn)
    return output


def _keys(values: LayerValues, attn: np.ndarray) -> list[np.ndarray]:
    """The input rows whose keys and values the needed attention outputs see: all of a run's up to its last query."""
    querying = _querying(values, attn) >= 0
    seen = np.logical_or.accumulate(querying[:, ::-1], axis=1)[:, ::-1]
    return [values.state[seen]]


def _segments(
    values: LayerValues, attn: np.ndarray, query_of: np.ndarray, queries: _Stage, keys: _Stage
) -> tuple[tuple[Segment, ...], np.ndarray]:
    """Batch runs that query for the same tokens; number the attention rows in the batches' order."""
    local = np.full(len(attn), -1)
    segments: list[Segment] = []
    first = 0
    for varying in (False, True):
        output = _querying(values, attn & (values.attn_varies == varying))
        patterns, which = np.unique(output >= 0, axis=0, return_inverse=True)
        for index, pattern in enumerate(patterns):
            tokens = np.flatnonzero(pattern)
            if not len(tokens):
                continue
            runs = np.flatnonzero(which.ravel() == index)
            outputs = output[np.ix_(runs, tokens)]
            local[outputs] = first + np.arange(outputs.size).reshape(outputs.shape)
            key_rows = keys.local[values.state[runs, : tokens[-1] + 1]]
            segments.append(Segment(varying, first, tuple(tokens.tolist()), queries.local[query_of[outputs]], key_rows))
            first += outputs.size
    return tuple(segments), local


def plan_bytes(plan: Plan) -> int:
    """Bytes of a plan's own index arrays."""
    total = plan.input_token.nbytes + plan.read_token.nbytes + plan.read.nbytes
    for layer in plan.layers:
        total += sum(value.source.nbytes for value in vars(layer).values() if isinstance(value, Gather))
        total += sum(segment.queries.nbytes + segment.keys.nbytes for segment in layer.segments)
    return total
