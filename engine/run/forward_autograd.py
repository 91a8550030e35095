"""A pass under autograd: target probabilities of which the gradient flows back to the given vectors.

Shared rows never carry gradient, varying rows always do, so every stage is two tensors. Weights are frozen; operations
are functional, since what they save for the way back must stay as it was: that is why ``forward.py``, which writes into
buffers that it uses again, is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.models.base import Architecture, Block
from causalcone.engine.run.forward import enter, read_targets
from causalcone.engine.run.packing import INDEX, Group, PackedStage, place
from causalcone.engine.run.pass_rows import GivenValues, LayerRows, ReadRows, StageRows, layer_rows, read_rows
from causalcone.kernels.gathering import TwoKinds, gather_two, two_kinds
from causalcone.kernels.readout import Readout
from causalcone.kernels.row_attention import (
    PaddedRuns,
    RunRows,
    ScoreRule,
    attend_padded,
    attend_rows,
    by_batch,
    padded,
    run_rows,
)
from causalcone.kernels.tiles import Tiles, pieces
from causalcone.kernels.transfer import Array, Packet, ahead


def run_gradient_pass(
    architecture: Architecture, groups: Sequence[Group], tiles: Tiles, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Log-probabilities (F, J, R, k) float64 of the target tokens, differentiable by the groups' varying vectors."""
    return _AutogradPass(architecture, groups, tiles, dtype, device).run()


class _StageKinds(NamedTuple, Generic[Array]):
    """A stage's shared and varying rows. shared, varying: for each stage that it reads, the rows that they are made
    from; positions: their tokens' positions, where they matter; given: the rows of ``GivenValues`` after them."""

    shared: tuple[Array, ...]
    varying: tuple[TwoKinds[Array], ...]
    positions: tuple[Array, ...]
    given: tuple[Array, ...]


class _LayerKinds(NamedTuple, Generic[Array]):
    """A layer's stages; its runs that are shared, as they lie; and those that vary, with the queries and keys that fill
    their batches."""

    keys: _StageKinds[Array]
    queries: _StageKinds[Array]
    shared_runs: RunRows[Array]
    runs: PaddedRuns[Array]
    run_queries: TwoKinds[Array]
    run_keys: TwoKinds[Array]
    attn_given: tuple[Array, ...]
    mid: _StageKinds[Array]
    mlp: _StageKinds[Array]
    out: _StageKinds[Array]


class _ReadKinds(NamedTuple, Generic[Array]):
    """What is read out: the normed rows, by kind; ``unknown``: those shared ones whose likeliest tokens are targets;
    read: the row of every log-probability that is handed out."""

    rows: ReadRows[Array]
    stage: _StageKinds[Array]
    unknown: Array
    kinds: tuple[Array, Array]
    read: TwoKinds[Array]


class _Kinds:
    """Where a stage's packed rows lie among its shared and its varying ones."""

    def __init__(self, stage: PackedStage) -> None:
        self.varies = varies = stage.varying
        self.place = np.where(varies, varies.cumsum() - 1, (~varies).cumsum() - 1).astype(INDEX)

    def any(self, packed: np.ndarray) -> TwoKinds[np.ndarray]:
        place = self.place[packed]
        return two_kinds(np.where(self.varies[packed], place, -1 - place))

    def split(self, values: np.ndarray, last: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Values of the first packed rows, or of the last ones, of the shared rows and of the varying ones."""
        varies = self.varies[len(self.varies) - len(values) :] if last else self.varies[: len(values)]
        return values[~varies], values[varies]

    def stage(
        self, rows: StageRows[np.ndarray], sources: Sequence[_Kinds], positions: np.ndarray | None = None
    ) -> _StageKinds[np.ndarray]:
        split = [(source, *self.split(index)) for source, index in zip(sources, rows.sources, strict=True)]
        return _StageKinds(
            shared=tuple(source.place[shared] for source, shared, _ in split),
            varying=tuple(source.any(varying) for source, _, varying in split),
            positions=() if positions is None else self.split(positions),
            given=self.given(rows),
        )

    def given(self, rows: StageRows[np.ndarray]) -> tuple[np.ndarray, ...]:
        return self.split(rows.given, last=True) if len(rows.given) else ()


def _layers(groups: Sequence[Group], givens: GivenValues, parallel: bool) -> Iterator[_LayerKinds[np.ndarray]]:
    inputs = _Kinds(place(groups, [group.plan.layers[0].inputs for group in groups]))
    for layer in layer_rows(groups, givens):
        keys, queries, attn, mid, mlp, out = (
            _Kinds(stage.packed) for stage in (layer.keys, layer.queries, layer.attn, layer.mid, layer.mlp, layer.out)
        )
        assert not layer.attn.packed.mixed, "heads are not overwritten in gradient passes"
        run_queries, run_keys, runs = padded(_runs(layer, varying=True))
        yield _LayerKinds(
            keys=keys.stage(layer.keys, [inputs], layer.key_tokens),
            queries=queries.stage(layer.queries, [inputs], layer.query_tokens),
            shared_runs=_runs(layer, varying=False, queries=queries.place, keys=keys.place),
            runs=runs,
            run_queries=queries.any(run_queries),
            run_keys=keys.any(run_keys),
            attn_given=attn.given(layer.attn),
            mid=mid.stage(layer.mid, [inputs, attn]),
            mlp=mlp.stage(layer.mlp, [inputs if parallel else mid]),
            out=out.stage(layer.out, [mid, mlp]),
        )
        inputs = out


def _runs(layer: LayerRows[np.ndarray], varying: bool, **place: np.ndarray) -> RunRows[np.ndarray]:
    """The runs that vary, or those that do not; ``place``: where their queries and keys are then to be found."""
    batches = [batch for batch in by_batch(layer.runs) if batch[0].varying == varying]
    runs = run_rows([(queries, keys, tuple(tokens), varying) for _, queries, keys, tokens in batches])
    return runs._replace(**{name: places[getattr(runs, name)] for name, places in place.items()})


def _read(groups: Sequence[Group], outputs: PackedStage) -> _ReadKinds[np.ndarray]:
    rows = read_rows(groups)
    kinds = _Kinds(rows.stage.packed)
    return _ReadKinds(
        rows=rows,
        stage=kinds.stage(rows.stage, [_Kinds(outputs)]),
        unknown=kinds.place[rows.unknown],
        kinds=kinds.split(np.arange(rows.stage.packed.rows, dtype=INDEX)),
        read=kinds.any(rows.read),
    )


class _Rows(NamedTuple):
    """A stage's rows, those without gradient and those with it."""

    shared: Tensor
    varying: Tensor

    def any(self, index: TwoKinds[Tensor]) -> Tensor:
        """Rows of either kind, with their gradient where they have one."""
        return gather_two(self.varying, self.shared, index)


@dataclass(frozen=True)
class _AutogradPass:
    architecture: Architecture
    groups: Sequence[Group]
    tiles: Tiles
    dtype: torch.dtype
    device: torch.device

    def run(self) -> list[Tensor]:
        stage = place(self.groups, [group.plan.layers[0].inputs for group in self.groups])
        with torch.no_grad():
            entered = enter(self.architecture, self.groups, self.dtype, self.device)
        kinds = _Kinds(stage).split(np.arange(stage.rows, dtype=INDEX))
        rows = _Rows(*(entered.index_select(0, kind) for kind in Packet.of(kinds, self.device).send(self.device)))
        layers = _layers(self.groups, self.givens, self.architecture.parallel)
        packets = (Packet.of(layer, self.device) for layer in layers)
        for number, packet in enumerate(ahead(packets, self.device)):
            with torch.no_grad():
                block = self.architecture.block(number, self.dtype, self.device)
            rows = self._layer(rows, block, packet.send(self.device))
        return self._read_out(rows)

    @cached_property
    def givens(self) -> GivenValues:
        return GivenValues(self.groups, self.dtype, self.device)

    def _layer(self, rows: _Rows, block: Block, layer: _LayerKinds[Tensor]) -> _Rows:
        attn = self._attention(rows, block, layer)
        mid = self._compute(layer.mid, torch.add, rows, attn)
        mlp = self._compute(layer.mlp, block.mlp, rows if self.architecture.parallel else mid)
        return self._compute(layer.out, torch.add, mid, mlp)

    def _attention(self, rows: _Rows, block: Block, layer: _LayerKinds[Tensor]) -> _Rows:
        keys = self._compute(layer.keys, block.keys_values, rows)
        queries = self._compute(layer.queries, block.queries, rows)
        scoring = ScoreRule(block.head_dim, block.scale, block.softcap, block.window)
        with torch.no_grad():
            heads = queries.shared.new_empty(len(layer.shared_runs.queries), queries.shared.shape[1])
            attend_rows(queries.shared, keys.shared, layer.shared_runs, scoring, heads, self.tiles.keys)
            fixed = block.attention_output(heads)
        asking, seen = queries.any(layer.run_queries), keys.any(layer.run_keys)
        varying = block.attention_output(attend_padded(asking, seen, layer.runs, scoring, self.tiles.keys))
        return self._with_given(layer.attn_given, fixed, varying)

    def _compute(self, stage: _StageKinds[Tensor], function: Callable[..., Tensor], *sources: _Rows) -> _Rows:
        """A stage's rows as ``function`` of indexed rows of the sources."""
        positions = stage.positions
        with torch.no_grad():
            indexed = zip(sources, stage.shared, strict=True)
            fixed = function(*(rows.shared.index_select(0, index) for rows, index in indexed), *positions[:1])
        inputs = [rows.any(index) for rows, index in zip(sources, stage.varying, strict=True)] + [*positions[1:]]
        sizes = [piece.stop - piece.start for piece in pieces(len(inputs[0]), self.tiles.rows, self.device)]
        tiles = zip(*(rows.split(sizes) for rows in inputs), strict=True)
        parts = [function(*tile) for tile in tiles] or [fixed[:0]]
        return self._with_given(stage.given, fixed, torch.cat(parts))

    def _with_given(self, given: tuple[Tensor, ...], shared: Tensor, varying: Tensor) -> _Rows:
        """The computed rows of a stage and the given ones after them."""
        if given:
            table = self.givens.table(shared.shape[1])
            shared = torch.cat([shared, table.detach().index_select(0, given[0])])
            varying = torch.cat([varying, table.index_select(0, given[1])])
        return _Rows(shared, varying)

    def _read_out(self, rows: _Rows) -> list[Tensor]:
        plans = [group.plan.layers[-1] for group in self.groups]
        outputs = place(self.groups, [plan.out_mid.rows for plan in plans], [plan.out_given for plan in plans])
        read: _ReadKinds[Tensor] = Packet.of(_read(self.groups, outputs), self.device).send(self.device)
        states = self._compute(read.stage, self.architecture.final_norm, rows)
        readout = Readout(
            *self.architecture.unembedding(), self.tiles.readout_rows, self.tiles.vocabulary,
            self.architecture.logit_softcap,
        )  # fmt: skip
        targets = read_targets(read.rows, readout, states.shared.index_select(0, read.unknown))
        shared = readout.target_log_probabilities(states.shared, targets.index_select(0, read.kinds[0]))
        varying = readout.log_probability(states.varying, targets.index_select(0, read.kinds[1]))
        shapes = [(group.facts, group.samples, *group.plan.read.shape) for group in self.groups]
        log_p = _Rows(shared[:, None], varying[:, None]).any(read.read)
        by_group = log_p.split([prod(shape) for shape in shapes])
        return [values.view(shape) for values, shape in zip(by_group, shapes, strict=True)]
