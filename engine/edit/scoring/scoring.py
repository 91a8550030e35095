"""Scores of many edited models in one pass: each edit's runs share every layer below it with the unedited ones, and no
weight is written (docs/editing.md, "Scores")."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Dense, LowRank, layer_and_projection
from causalcone.engine.edit.methods.batching import Batching, edit_name
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.windows import check_layer
from causalcone.engine.edit.runs.edited_runs import (
    Addition,
    EditedPass,
    EditedRuns,
    Join,
    Prompts,
    change_at,
    changing,
)
from causalcone.engine.edit.runs.layers import Layers, Passed
from causalcone.engine.edit.runs.packed_runs import Runs
from causalcone.engine.edit.scoring.probes import ProbeSet
from causalcone.engine.errors import ExperimentError
from causalcone.engine.models.base import Architecture, Block
from causalcone.kernels.transfer import fetch, send


@dataclass(frozen=True)
class ProbeResults:
    """log_p (Q,) float64: of each probe's answer, summed over its tokens; right (Q,): the share of its tokens that are
    the most likely ones, NaN where that was not requested; likeliest: the most likely tokens in the place of each
    answer's, empty arrays where that was not requested."""

    log_p: np.ndarray
    right: np.ndarray
    likeliest: Sequence[np.ndarray]

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.log_p).all())


@dataclass(frozen=True, eq=False)
class Scored:
    """An edit with its request's probes, and their results without and with it; None if it failed."""

    edit: Edit
    probes: ProbeSet
    pre: ProbeResults
    post: ProbeResults | None


Group = tuple[ProbeSet, list[Edit]]
"""A request's probes, and edits of it."""


@dataclass(frozen=True)
class EditScorer:
    """probes_of: the probes of an edit's request; accuracy: whether the most likely tokens are read as well."""

    layers: Layers
    batching: Batching
    probes_of: Callable[[Edit], ProbeSet]
    accuracy: bool = False

    def score(self, edits: Sequence[Edit]) -> Iterator[Scored]:
        """Each edit's results, in order. Edits of one request should follow each other: they share its unedited run."""
        by_request = (list(edits) for _, edits in groupby(edits, lambda edit: id(edit.request)))
        groups = [(self.probes_of(edits[0]), edits) for edits in by_request]
        batches = self.batching.of_items(self._fitting(groups), self._bytes, lambda group: edit_name(group[0].request))
        for batch in batches:
            scored = self.batching.run(batch, self._together)
            self.layers.forget()
            yield from scored

    def _together(self, groups: list[Group]) -> list[Scored]:
        return list(_ScoringPass(self, groups).run())

    def _fitting(self, groups: Sequence[Group]) -> Iterator[Group]:
        """Requests with their edits, as many at once as the budget holds."""
        for probes, edits in groups:
            weigh = partial(self._edit_bytes, probes)
            for batch in self.batching.of_items(edits, weigh, lambda edit: f"the edit {edit.edit_id!r}", 0.5):
                yield probes, batch

    def _edit_bytes(self, probes: ProbeSet, edit: Edit) -> int:
        if edit.delta is None:
            return 0
        changes = edit.delta.changes
        wide = 2 if any(isinstance(place, tuple) for place in changes) else len(changes) > 1
        return probes.rows * (2 * self.batching.row_bytes + wide * self._key_bytes)

    def _bytes(self, group: Group) -> int:
        probes, edits = group
        unedited = probes.rows * (2 * self.batching.row_bytes + self._key_bytes)
        return unedited + sum(self._edit_bytes(probes, edit) for edit in edits)

    @property
    def _key_bytes(self) -> int:
        return self.layers.architecture.sizes.inner * self.layers.dtype.itemsize


def check_edits(edits: Sequence[Edit], architecture: Architecture) -> None:
    """Raise ``ExperimentError`` naming an edit that is there twice, or does not fit the model."""
    known, sizes = set(), architecture.sizes
    for edit in edits:
        if edit.edit_id in known:
            raise ExperimentError(f"the edit {edit.edit_id!r} is there twice; score it once")
        known.add(edit.edit_id)
        if edit.delta is None and edit.reason is None:
            raise ExperimentError(f"the edit {edit.edit_id!r} was dropped; score edits before they are")
        changes = {} if edit.delta is None else edit.delta.changes
        if edit.delta is not None and not changes:
            raise ExperimentError(f"the edit {edit.edit_id!r} changes no layer; leave it out")
        for place, change in changes.items():
            layer, projection = layer_and_projection(place)
            check_layer(layer, sizes.depth)
            architecture.projection(projection)
            shape = (sizes.hidden, sizes.inner) if projection == "down" else (sizes.inner, sizes.hidden)
            if change.shape != shape:
                raise ExperimentError(
                    f"the edit {edit.edit_id!r} changes a weight of {change.shape} in layer {layer}, the model's are "
                    f"{shape}; score it on the model that it was made for"
                )


def _addition(change: LowRank | Dense, layers: Layers) -> Addition:
    """The addition of a change to a product; a low-rank one is computed in float32 at least."""
    wide = torch.promote_types(layers.dtype, torch.float32)
    change = change.to(layers.device, wide if isinstance(change, LowRank) else layers.dtype)
    return lambda keys: change.product(keys).to(layers.dtype)


class _ScoringPass:
    """The unedited runs of some requests, and beside them those of their edits."""

    def __init__(self, scorer: EditScorer, groups: Sequence[Group]) -> None:
        self.layers, self.accuracy, self.groups = scorer.layers, scorer.accuracy, groups
        texts = [text for probes, _ in groups for text in probes.runs]
        read = np.array([count for probes, _ in groups for count in probes.read])
        lengths = np.array([len(text) for text in texts])
        order = np.lexsort((read, lengths))
        rank = np.argsort(order)
        self.prompts = Prompts([texts[i] for i in order], np.zeros_like(lengths), read[order])
        self.runs: Runs = send(Runs.whole(lengths[order], read[order]), self.layers.device)
        starts = np.cumsum([0, *(len(probes.runs) for probes, _ in groups)])
        self.of_group = [rank[starts[i] : starts[i + 1]] for i in range(len(groups))]
        self.edits = [(number, edit.delta) for number, (_, edits) in enumerate(groups) for edit in edits if edit.delta]
        self.additions = [
            {place: _addition(change, self.layers) for place, change in delta.changes.items()}
            for _, delta in self.edits
        ]
        self.entering: Tensor | None = None
        self.unedited: Passed | None = None

    @torch.no_grad()
    def run(self) -> Iterator[Scored]:
        pre, post = self._results()
        edited = iter(post)
        for (probes, edits), unedited in zip(self.groups, pre, strict=True):
            for edit in edits:
                yield Scored(edit, probes, unedited, next(edited) if edit.delta else None)

    def _results(self) -> tuple[list[ProbeResults], list[ProbeResults]]:
        """Of each request without an edit, and of each edit."""
        layers = self.layers
        joined = {delta.layers[0] for _, delta in self.edits}
        rows = layers.enter(self.prompts.texts)
        edited = EditedPass(self._edited_runs(), self._joining, changing(self.additions)) if self.edits else None
        for layer in range(layers.depth):
            block = layers.block(layer)
            last = layer == layers.depth - 1
            # the last layer is computed for the rows that are read out, unless edits need all of its rows
            whole = last and layer in joined
            self.entering = rows if layers.architecture.parallel and layer in joined else None
            self.unedited = layers.advance(
                block, rows, self.runs, read_only=last and not whole, keep_keys=layer in joined
            )
            rows = self.unedited.out.index_select(0, self.runs.read_rows) if whole else self.unedited.out
            if edited is not None and layer >= min(joined):
                edited.advance(layer, block)
        self.entering = self.unedited = None
        states = layers.architecture.final_norm(rows)
        groups = np.arange(len(self.groups))
        members = np.concatenate(self.of_group)
        pre = self._read(states, groups, np.argsort(members), *self._runs_of(groups))
        if edited is None:
            return pre, []
        groups = self._group_of_edit
        return pre, self._read(edited.states(), groups, edited.edited.order, *self._runs_of(groups))

    @property
    def _group_of_edit(self) -> np.ndarray:
        return np.array([number for number, _ in self.edits])

    def _runs_of(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For readers of some groups each, the reader and the text of every run."""
        texts = [self.of_group[number] for number in groups]
        return np.repeat(np.arange(len(texts)), list(map(len, texts))), np.concatenate(texts)

    def _edited_runs(self) -> EditedRuns:
        first = np.array([delta.layers[0] for _, delta in self.edits])
        return EditedRuns(self.layers, self.prompts, first, *self._runs_of(self._group_of_edit))

    def _joining(self, block: Block, layer: int, join: Join) -> Tensor:
        base = self.unedited
        assert base is not None
        assert base.keys is not None
        change = change_at(layer, join.stretches, self.additions)
        if change.keys() == {"down"}:  # the unedited keys are there
            values = base.values.index_select(0, join.tails)
            counts = [count for _, count in join.stretches]
            parts = zip(join.stretches, values.split(counts), join.tails.split(counts), strict=True)
            for (edit, _), own, tails in parts:
                own.add_(self.additions[edit][layer](base.keys.index_select(0, tails)))
        else:
            read = self.entering if self.layers.architecture.parallel else base.mid
            assert read is not None
            _, values = self.layers.project(block, read.index_select(0, join.tails), change)
        return base.mid.index_select(0, join.tails) + self.layers.by_tiles(block.mlp_out, values)

    def _read(
        self, states: Tensor, group: np.ndarray, order: np.ndarray, of: np.ndarray, texts: np.ndarray
    ) -> list[ProbeResults]:
        """The results of readers, reader i of the probes of ``group[i]``, from rows (n, hidden) of ordered runs."""
        read = self.prompts.read[texts[order]]
        starts = np.empty(len(order), dtype=np.int64)
        starts[order] = np.cumsum(read) - read
        first = np.searchsorted(of, np.arange(len(group)))  # runs come reader by reader
        sets = [self.groups[number][0].probes for number in group]
        probes = [(run + probe.run, probe.tokens) for run, probes in zip(first, sets, strict=True) for probe in probes]
        width = np.array([len(answer) for _, answer in probes])
        rows = np.concatenate([starts[run] + np.arange(len(answer)) for run, answer in probes])
        tokens = np.concatenate([np.array(answer) for _, answer in probes])
        probe_of_token = np.repeat(np.arange(len(probes)), width)
        log_p, likeliest = self._token_results(states, rows, tokens)
        right = likeliest == tokens if self.accuracy else np.full(len(rows), np.nan)
        total, shares = (np.bincount(probe_of_token, values, len(probes)) for values in (log_p, right))
        each = np.split(likeliest, np.cumsum(width)[:-1]) if self.accuracy else [likeliest] * len(probes)
        ends = np.cumsum(list(map(len, sets)))
        parts = [slice(end - len(probes), end) for end, probes in zip(ends, sets, strict=True)]
        return [ProbeResults(total[part], (shares / width)[part], each[part]) for part in parts]

    def _token_results(self, states: Tensor, rows: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log p of tokens (n,) read at ``rows`` (n,) of the states, and the most likely ones there, if requested."""
        readout = self.layers.readout()
        # several answers may be read at one row, whose logits are computed once
        by_row = np.argsort(rows, kind="stable")
        distinct, first, count = np.unique(rows[by_row], return_index=True, return_counts=True)
        slot = np.empty_like(rows)
        slot[by_row] = np.arange(len(rows)) - np.repeat(first, count)
        index = np.searchsorted(distinct, rows)
        targets = np.zeros((len(distinct), count.max()), dtype=np.int64)
        targets[index, slot] = tokens
        read, sent = send((distinct, targets), states.device)
        states = states.index_select(0, read)
        results = [readout.target_log_probabilities(states, sent.long())]
        results += [readout.most_likely(states)] if self.accuracy else []
        log_p, *likeliest = (tensor.numpy() for tensor in fetch(*results).wait())
        return log_p[index, slot], likeliest[0][index] if self.accuracy else np.zeros(0, dtype=np.int64)
