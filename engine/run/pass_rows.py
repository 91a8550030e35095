"""From which rows every stage of a pass is computed, for all its groups: index arrays, made on the host ahead of the
device, and sent to it in one copy a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.plan.interventions import CLEAN, ZERO, given
from causalcone.engine.plan.plan import Given, LayerPlan, Plan, Segment
from causalcone.engine.run.packing import (
    INDEX,
    Group,
    PackedStage,
    Placement,
    gather_rows,
    joined,
    place,
    place_attention,
    spread,
)
from causalcone.kernels.row_attention import RunRows, run_rows
from causalcone.kernels.transfer import Array, on_device


class StageRows(NamedTuple, Generic[Array]):
    """The rows of a stage, packed as ``packed`` says.

    sources: for each stage that it reads, the row that each row it computes is made from; given: of each row after
    those, the row of ``GivenValues``; captured: the rows handed out, ``captures`` where they go.
    """

    packed: PackedStage
    sources: tuple[Array, ...]
    given: Array
    captured: Array
    captures: Array


class MixRows(NamedTuple, Generic[Array]):
    """Rows of heads that are copies of the rows ``base``, but for heads that are overwritten: ``heads`` of ``rows`` are
    those of the rows ``sources``, and, in second place, the rows ``given`` of ``GivenValues``."""

    base: Array
    rows: tuple[Array, Array]
    heads: tuple[Array, Array]
    sources: Array
    given: Array


class LayerRows(NamedTuple, Generic[Array]):
    """One layer: keys and values, queries, attention's outputs (those of runs, and mixes of their heads), the residual
    after it (``mid``), the MLP, and the outputs. ``normed``: the MLP's row that reads each row of the residual, or -1.
    """

    keys: StageRows[Array]
    key_tokens: Array
    queries: StageRows[Array]
    query_tokens: Array
    runs: RunRows[Array]
    mixes: MixRows[Array]
    attn: StageRows[Array]
    mid: StageRows[Array]
    mlp: StageRows[Array]
    normed: Array
    out: StageRows[Array]


class EntryRows(NamedTuple, Generic[Array]):
    """The first layer's input rows: each is the embedding of token ``rows`` of all facts' prompts, at a position;
    of those that are ``noised``, the row of ``noise_of`` that is added, or takes its place where it is ``replaced``."""

    rows: Array
    positions: Array
    noised: Array
    noise: Array
    replaced: Array


class ReadRows(NamedTuple, Generic[Array]):
    """What is read out. Each row that is normed has one target, numbered among the ``known`` ids and, after them, the
    most likely tokens of the rows ``unknown``. read: the row of every fact's, sample's, run's and target token's log p;
    logit_rows: the distinct rows whose logits are handed out; logits: which of these every fact's and sample's are.
    """

    stage: StageRows[Array]
    known: Array
    unknown: Array
    target: Array
    read: Array
    logit_rows: Array
    logits: Array


class GivenValues:
    """Values from outside a pass: zeros, and the vectors of all groups' facts that their plans use; those of a width in
    one tensor, whose first row is zero."""

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype, device: torch.device) -> None:
        self.groups, self.dtype, self.device = groups, dtype, device
        self._vectors: dict[int, list[Tensor]] = {}
        self._first: list[np.ndarray] = []
        count: dict[int, int] = {}
        for group in groups:
            first = np.zeros((group.facts, len(group.vectors[0]) if group.vectors else 0), dtype=INDEX)
            used = _given_sources(group.plan)
            for fact, vectors in enumerate(group.vectors):
                for number in used:
                    vector = vectors[number]
                    width = vector.shape[-1]
                    first[fact, number] = count.setdefault(width, 1)
                    self._vectors.setdefault(width, []).append(vector.reshape(-1, width))
                    count[width] += vector.numel() // width
            self._first.append(first)
        self._tables: dict[int, Tensor] = {}

    def table(self, width: int) -> Tensor:
        """(N, width) the values."""
        if width not in self._tables:
            values = [vector.to(self.dtype) for vector in self._vectors.get(width, [])]
            if any(vector.device != values[0].device for vector in values):
                values = [on_device(vector, self.device) for vector in values]
            zero = torch.zeros(1, width, dtype=self.dtype, device=values[0].device if values else self.device)
            self._tables[width] = on_device(torch.cat([zero, *values]), self.device)
        return self._tables[width]

    def rows(self, group: int, source: np.ndarray, varying: bool) -> np.ndarray:
        """The row of the sources (n,) for each fact and sample of a group, (F, J, n) or (F, 1, n)."""
        first, vectors = self._first[group], self.groups[group].vectors
        is_zero = source == ZERO
        if not first.shape[1]:
            first, steps = np.zeros((len(first), 1), dtype=INDEX), np.zeros(1, dtype=INDEX)
        else:
            steps = np.array([vector.dim() == 2 for vector in vectors[0]], dtype=INDEX)
        number = np.where(is_zero, 0, given(source))
        start, step = np.where(is_zero, 0, first[:, number]), np.where(is_zero, 0, steps[number])
        sample = np.arange(self.groups[group].samples if varying else 1, dtype=INDEX)
        return start[:, None] + sample[:, None] * step

    def of_stage(self, givens: Sequence[Given]) -> np.ndarray:
        """The rows of the given values of a stage, in its order."""
        parts = []
        for group, stage in enumerate(givens):
            shared, varying = np.split(stage.source, [stage.rows.shared])
            parts += [self.rows(group, shared, False), self.rows(group, varying, True)]
        return joined(parts)


def _given_sources(plan: Plan) -> list[int]:
    """The numbers of the given vectors that a plan uses."""
    sources = [
        source
        for layer in plan.layers
        for source in (layer.attn_given.source, layer.mlp_given.source, layer.out_given.source, layer.mix.source)
    ]
    vectors = given(np.unique(joined(sources)))
    return vectors[vectors >= 0][::-1].tolist()


def noises(groups: Sequence[Group]) -> dict[int, np.ndarray]:
    """The distinct noise arrays of groups, by their identity."""
    return {id(group.noise): group.noise for group in groups}


def entry_rows(groups: Sequence[Group]) -> EntryRows[np.ndarray]:
    """The embeddings of the first layer's input rows, in the order of its stage."""
    parts: list[list[np.ndarray]] = [[] for _ in EntryRows._fields]
    sizes = [noise.size // noise.shape[-1] for noise in noises(groups).values()]
    first_noise = dict(zip(noises(groups), np.cumsum([0, *sizes]), strict=False))
    first = count = 0
    for group in groups:
        (F, P, T), J, entries = group.tokens.shape, group.samples, group.plan.entries
        shared = group.plan.layers[0].inputs.shared
        fact, sample = np.arange(F)[:, None, None], np.arange(J)[:, None]
        row = first + (fact * P + entries.prompt) * T + entries.token  # (F, 1, entries)
        noise = (sample * group.noise.shape[1] + entries.draw) * group.noise.shape[2]
        noise = first_noise[id(group.noise)] + noise + entries.token - group.plan.shape.noised[0]  # (J, entries)
        varying = (F, J, len(entries.token) - shared)
        noised = count + F * shared + np.arange(np.prod(varying))
        for rows, shared_rows, per_sample in (
            (parts[0], row[:, 0, :shared], row[..., shared:]),
            (parts[1], np.broadcast_to(entries.token[:shared], (F, shared)), entries.token[shared:]),
            (parts[3], joined([]), noise[:, shared:]),
            (parts[4], joined([]), entries.replace[shared:]),
        ):
            rows += [shared_rows, np.broadcast_to(per_sample, varying)]
        parts[2].append(noised)
        first, count = first + F * P * T, count + F * shared + noised.size
    return EntryRows(*map(joined, parts))


def layer_rows(groups: Sequence[Group], givens: GivenValues) -> Iterator[LayerRows[np.ndarray]]:
    """The rows of every layer of a pass."""
    inputs = place(groups, [group.plan.layers[0].inputs for group in groups])
    for layer in range(len(groups[0].plan.layers)):
        rows = _LayerIndex(groups, givens, [group.plan.layers[layer] for group in groups], inputs).rows()
        inputs = rows.out.packed
        yield rows


def read_rows(groups: Sequence[Group]) -> ReadRows[np.ndarray]:
    """What is read out of the last layer's outputs."""
    plans = [group.plan for group in groups]
    outputs = place(groups, [p.layers[-1].out_mid.rows for p in plans], [p.layers[-1].out_given for p in plans])
    stage = place(groups, [plan.read_rows.rows for plan in plans])
    known = [group.targets for group in groups if group.targets is not None]
    unknown, target, read, logit_rows, logits = [], [], [], [], []
    first, first_unknown, first_logit = 0, sum(ids.size for ids in known), 0
    for group, plan, placement in zip(groups, plans, stage.placements, strict=True):
        F, J, k = group.facts, group.samples, plan.read.shape[1]
        if group.targets is None:
            unknown.append(placement.flat(plan.read[CLEAN], False))
            start, first_unknown = first_unknown, first_unknown + F * k
        else:
            start, first = first, first + F * k
        shared = plan.read_rows.rows.shared
        number = start + np.arange(F)[:, None, None] * k + np.maximum(plan.read_place, 0)
        target += [number[..., :shared], np.broadcast_to(number[..., shared:], (F, J, len(plan.read_place) - shared))]
        read.append(placement.flat(plan.read, True))
        distinct, which = np.unique(placement.flat(plan.logits, True), return_inverse=True)
        logit_rows.append(distinct)
        logits.append(first_logit + which)
        first_logit += len(distinct)
    gathered = gather_rows([plan.read_rows for plan in plans], outputs)
    return ReadRows(
        stage=StageRows(stage, (gathered,), joined([]), joined([]), joined([])),
        known=joined(known),
        unknown=joined(unknown),
        target=joined(target),
        read=joined(read),
        logit_rows=joined(logit_rows),
        logits=joined(logits),
    )


class _LayerIndex:
    def __init__(
        self, groups: Sequence[Group], values: GivenValues, plans: Sequence[LayerPlan], inputs: PackedStage
    ) -> None:
        self.groups, self.values, self.plans, self.inputs = groups, values, plans, inputs

    def rows(self) -> LayerRows[np.ndarray]:
        groups, plans, inputs = self.groups, self.plans, self.inputs
        parallel = groups[0].plan.parallel
        keys = place(groups, [plan.keys_values.rows for plan in plans])
        queries = place(groups, [plan.queries.rows for plan in plans])
        attn = place_attention(groups, plans)
        mid = place(groups, [plan.mid_input.rows for plan in plans])
        mlp_given, out_given = ([getattr(plan, name) for plan in plans] for name in ("mlp_given", "out_given"))
        mlp = place(groups, [plan.mlp.rows for plan in plans], mlp_given)
        out = place(groups, [plan.out_mid.rows for plan in plans], out_given)
        read = gather_rows([plan.mlp for plan in plans], inputs if parallel else mid)
        normed = np.full(0 if parallel else mid.rows, -1, dtype=INDEX)
        if not parallel:
            normed[read] = np.arange(len(read))
        key_rows, query_rows = [plan.keys_values.rows for plan in plans], [plan.queries.rows for plan in plans]
        return LayerRows(
            keys=self._stage(keys, [("keys_values", inputs)]),
            key_tokens=spread([plan.key_tokens for plan in plans], key_rows, groups),
            queries=self._stage(queries, [("queries", inputs)]),
            query_tokens=spread([plan.query_tokens for plan in plans], query_rows, groups),
            runs=self._runs(queries, keys),
            mixes=self._mixes(attn),
            attn=self._stage(attn, [], "attn", [plan.attn_given for plan in plans]),
            mid=self._stage(mid, [("mid_input", inputs), ("mid_attn", attn)]),
            mlp=self._stage(mlp, [("mlp", inputs if parallel else mid)], "mlp", mlp_given),
            normed=normed,
            out=self._stage(out, [("out_mid", mid), ("out_mlp", mlp)], "hidden", out_given),
        )

    def _stage(
        self,
        packed: PackedStage,
        sources: Sequence[tuple[str, PackedStage]],
        site: str = "",
        givens: Sequence[Given] = (),
    ) -> StageRows[np.ndarray]:
        """A stage of which the rows of each source are found by the field of that name of the plans."""
        gathered = [gather_rows([getattr(plan, name) for plan in self.plans], source) for name, source in sources]
        return StageRows(packed, tuple(gathered), self.values.of_stage(givens), *self._captured(packed, site))

    def _captured(self, packed: PackedStage, site: str) -> tuple[np.ndarray, np.ndarray]:
        rows, places, first = [], [], 0
        for group, plan, placement in zip(self.groups, self.plans, packed.placements, strict=True):
            count = group.plan.captures
            if site in plan.captured:
                captured = plan.captured[site]
                trial = np.arange(group.facts * group.samples).reshape(group.facts, group.samples, 1)
                rows.append(placement.flat(captured.row, True))
                places.append(first + trial * count + captured.number)
            first += group.facts * group.samples * count
        return joined(rows), joined(places)

    def _runs(self, queries: PackedStage, keys: PackedStage) -> RunRows[np.ndarray]:
        placed = zip(self.plans, queries.placements, keys.placements, strict=True)
        segments = [(segment, asking, seen) for plan, asking, seen in placed for segment in plan.segments]
        return run_rows(
            [
                (*segment_rows(segment, asking, seen), segment.tokens, segment.varying)
                for segment, asking, seen in segments
            ]
        )

    def _mixes(self, attn: PackedStage) -> MixRows[np.ndarray]:
        computed_ones: list[tuple[np.ndarray, ...]] = []  # rows, heads, and the rows that these are from
        given_ones: list[tuple[np.ndarray, ...]] = []
        for number, (plan, placement) in enumerate(zip(self.plans, attn.placements, strict=True)):
            mix, first, shared = plan.mix, plan.attn.total, plan.mix.base.rows.shared
            for varying, is_given in product((False, True), (False, True)) if attn.mixed else ():
                patches = ((mix.row >= shared) == varying) & ((mix.source < 0) == is_given)
                to = placement.flat(first + mix.row[patches], varying)
                heads, source = np.broadcast_to(mix.head[patches], to.shape), mix.source[patches]
                if is_given:
                    given_ones.append((to, heads, self.values.rows(number, source, varying)))
                else:
                    computed_ones.append((to, heads, placement.flat(source, varying)))
        base = gather_rows([plan.mix.base for plan in self.plans], attn)
        columns = (
            [joined([patch[i] for patch in patches]) for i in range(3)] for patches in (computed_ones, given_ones)
        )
        (to, heads, sources), (given_to, given_heads, given_rows) = columns
        return MixRows(base, (to, given_to), (heads, given_heads), sources, given_rows)


def segment_rows(segment: Segment, queried: Placement, keys: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Query rows (B, m) and key rows (B, K) of a segment's runs, for all facts and samples."""
    rows = (queried.flat(segment.queries, segment.varying), keys.flat(segment.keys, segment.varying))
    return rows[0].reshape(-1, segment.queries.shape[1]), rows[1].reshape(-1, segment.keys.shape[1])
