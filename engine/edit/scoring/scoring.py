"""Reads many edited models in one pass: each edit's runs share every layer below it with the unedited ones, and no
weight is written (METHODS 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.rows import Addition, addition, changed, slices
from causalcone.engine.edit.methods.batching import Batching, edit_name
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.windows import check_layer
from causalcone.engine.edit.runs.edited_runs import EditedRuns, Join, Prompts
from causalcone.engine.edit.runs.layers import Change, Layers, Passed
from causalcone.engine.edit.runs.packed_runs import Runs
from causalcone.engine.edit.scoring.probes import ProbeSet
from causalcone.engine.errors import ExperimentError
from causalcone.engine.models.base import Block, Sizes


@dataclass(frozen=True)
class ProbeResults:
    """log_p (Q,) float64: of each question's answer, summed over its tokens; right (Q,): the share of its tokens that
    are the most likely ones, NaN where that was not asked."""

    log_p: np.ndarray
    right: np.ndarray

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.log_p).all())


@dataclass(frozen=True, eq=False)
class Scored:
    """An edit with its request's questions, and how the model answers them without and with it; None if it failed."""

    edit: Edit
    questions: ProbeSet
    pre: ProbeResults
    post: ProbeResults | None


@dataclass(frozen=True)
class EditScorer:
    """ask: the questions about a request; accuracy: whether the most likely tokens are read as well."""

    layers: Layers
    batching: Batching
    ask: Callable[[Edit], ProbeSet]
    accuracy: bool = False

    def score(self, edits: Sequence[Edit]) -> Iterator[Scored]:
        """Each edit's answers, in order. Edits of one request should follow each other: they share its unedited run."""
        groups = [(self.ask(own[0]), own) for own in (list(own) for _, own in groupby(edits, _same_request))]

        def name(group: tuple[ProbeSet, list[Edit]]) -> str:
            return edit_name(group[0].request)

        for part in self.batching.of_items(self._pieces(groups), self._bytes, name):
            scored = self.batching.run(part, self._together)
            self.layers.forget()
            yield from scored

    def _pieces(self, groups: Sequence[tuple[ProbeSet, list[Edit]]]) -> Iterator[tuple[ProbeSet, list[Edit]]]:
        """Requests with their edits; with as many at once as the budget holds."""
        for questions, own in groups:
            weigh = partial(self._edit_bytes, questions)
            for part in self.batching.of_items(own, weigh, lambda edit: f"the edit {edit.edit_id!r}", 0.5):
                yield questions, part

    def _edit_bytes(self, questions: ProbeSet, edit: Edit) -> int:
        if edit.delta is None:
            return 0
        later = len(edit.delta.changes) > 1
        keys = self.layers.architecture.sizes.inner * self.layers.dtype.itemsize
        return questions.rows * (2 * self.batching.row_bytes + later * keys)

    def _bytes(self, group: tuple[ProbeSet, list[Edit]]) -> int:
        questions, own = group
        keys = self.layers.architecture.sizes.inner * self.layers.dtype.itemsize
        return questions.rows * (2 * self.batching.row_bytes + keys) + sum(
            self._edit_bytes(questions, edit) for edit in own
        )

    def _together(self, groups: list[tuple[ProbeSet, list[Edit]]]) -> list[Scored]:
        return [scored for own in _ScoringPass(self, groups).run() for scored in own]


def check_edits(edits: Sequence[Edit], sizes: Sizes) -> None:
    """Raise ``ExperimentError`` naming an edit that is there twice, or does not fit a model of these sizes."""
    known = set()
    for edit in edits:
        if edit.edit_id in known:
            raise ExperimentError(f"the edit {edit.edit_id!r} is there twice; score it once")
        known.add(edit.edit_id)
        if edit.delta is None and edit.reason is None:
            raise ExperimentError(f"the edit {edit.edit_id!r} was dropped; score edits before they are")
        changes = {} if edit.delta is None else edit.delta.changes
        if edit.delta is not None and not changes:
            raise ExperimentError(f"the edit {edit.edit_id!r} changes no layer; leave it out")
        for layer, change in changes.items():
            check_layer(layer, sizes.depth)
            if change.shape != (sizes.hidden, sizes.inner):
                raise ExperimentError(
                    f"the edit {edit.edit_id!r} changes a weight of {change.shape} in layer {layer}, the model's are "
                    f"{(sizes.hidden, sizes.inner)}; score it on the model that it was made for"
                )


def _same_request(edit: Edit) -> int:
    return id(edit.request)


class _ScoringPass:
    """The unedited runs of some requests, and beside them those of their edits."""

    def __init__(self, scoring: EditScorer, groups: list[tuple[ProbeSet, list[Edit]]]) -> None:
        self.layers, self.accuracy, self.groups = scoring.layers, scoring.accuracy, groups
        texts = [text for questions, _ in groups for text in questions.runs]
        read = np.array([count for questions, _ in groups for count in questions.read])
        lengths = np.array([len(text) for text in texts])
        order = np.lexsort((read, lengths))
        self.order, place = order, np.argsort(order)
        self.prompts = Prompts([texts[i] for i in order], np.zeros_like(lengths), read[order])
        none = np.zeros_like(lengths)
        self.runs = Runs(none, lengths[order], read[order], none, self.layers.device)
        starts = np.cumsum([0, *(len(questions.runs) for questions, _ in groups)])
        self.of_group = [place[starts[i] : starts[i + 1]] for i in range(len(groups))]
        self.edits = [(number, edit.delta) for number, (_, own) in enumerate(groups) for edit in own if edit.delta]
        self.unedited: Passed | None = None

    @torch.no_grad()
    def run(self) -> Iterator[list[Scored]]:
        pre, post = self._answers()
        edited = iter(post)
        for number, (questions, own) in enumerate(self.groups):
            yield [Scored(edit, questions, pre[number], next(edited) if edit.delta else None) for edit in own]

    def _answers(self) -> tuple[list[ProbeResults], list[ProbeResults]]:
        """Of each request without an edit, and of each edit."""
        layers = self.layers
        joined = {min(delta.changes) for _, delta in self.edits}
        rows = layers.enter(self.prompts.texts)
        cone, wave = None, None
        if self.edits:
            cone = self._cone()
            wave = cone.wave(self._joining, self._changing)
        for layer in range(layers.depth):
            block = layers.block(layer)
            last = layer == layers.depth - 1
            # the last layer is computed for what is read out only, but where edits need all of its rows
            whole = last and layer in joined
            self.unedited = layers.advance(
                block, rows, self.runs, read_only=last and not whole, keep_keys=layer in joined
            )
            rows = self.unedited.out.index_select(0, self.runs.read_rows) if whole else self.unedited.out
            if wave is not None and layer >= min(joined):
                wave.advance(layer, block)
        self.unedited = None
        states = layers.architecture.final_norm(rows)
        every = np.arange(len(self.groups))
        members = np.concatenate(self.of_group)
        of = np.repeat(every, [len(own) for own in self.of_group])
        pre = self._read(states, every, np.argsort(members), of, members)
        if cone is None or wave is None:
            return pre, []
        of_edit, texts = self._edit_runs()
        group = np.array([number for number, _ in self.edits])
        return pre, self._read(wave.states(), group, cone.order, of_edit, texts)

    def _edit_runs(self) -> tuple[np.ndarray, np.ndarray]:
        """The edit and the text of each run of each edit."""
        texts = [self.of_group[number] for number, _ in self.edits]
        return np.repeat(np.arange(len(texts)), [len(own) for own in texts]), np.concatenate(texts)

    def _cone(self) -> EditedRuns:
        first = np.array([min(delta.changes) for _, delta in self.edits])
        self.additions = [
            {layer: addition(change, self.layers.device, self.layers.dtype) for layer, change in delta.changes.items()}
            for _, delta in self.edits
        ]
        return EditedRuns(self.layers, self.prompts, first, *self._edit_runs())

    def _joining(self, block: Block, layer: int, join: Join) -> Tensor:
        base = self.unedited
        assert base is not None
        assert base.keys is not None
        values = base.values.index_select(0, join.tails)
        for edit, rows in slices(join.edits, join.rows):
            values[rows] += self.additions[edit][layer](base.keys.index_select(0, join.tails[rows]))
        return base.mid.index_select(0, join.tails) + self.layers.by_tiles(block.mlp_output, values)

    def _changing(self, layer: int, live: Join, read_only: bool) -> Change | None:
        if not any(layer in own for own in self.additions):
            return None
        parts: list[tuple[slice, Addition | None]] = [
            (rows, self.additions[edit].get(layer))
            for edit, rows in slices(live.of, live.runs.read if read_only else live.runs.rows)
        ]
        return lambda keys, values: changed(keys, values, parts)

    def _read(
        self, states: Tensor, group: np.ndarray, order: np.ndarray, of: np.ndarray, texts: np.ndarray
    ) -> list[ProbeResults]:
        """Answers of askers, asker i about the requests of ``group[i]``. ``order``: how the runs, each with its asker
        and its text, follow each other in what is read, ``states`` (n, hidden)."""
        read = self.prompts.read[texts[order]]
        starts = np.empty(len(order), dtype=np.int64)
        starts[order] = np.cumsum(read) - read
        first = np.searchsorted(of, np.arange(len(group)))  # runs come asker by asker
        row, token, question, width = [], [], [], []
        asked = 0
        for asker, number in enumerate(group):
            for each in self.groups[number][0].asked:
                count = len(each.tokens)
                row.append(starts[first[asker] + each.run] + np.arange(count))
                token.append(np.array(each.tokens))
                question.append(np.full(count, asked))
                width.append(count)
                asked += 1
        rows, tokens, questions = (np.concatenate(column) for column in (row, token, question))
        log_p, right = self._token_answers(states, rows, tokens)
        total = np.bincount(questions, log_p, asked)
        shares = np.bincount(questions, right, asked) / np.array(width)
        ends = np.cumsum([len(self.groups[number][0].asked) for number in group])
        return [
            ProbeResults(*pair) for pair in zip(np.split(total, ends[:-1]), np.split(shares, ends[:-1]), strict=True)
        ]

    def _token_answers(self, states: Tensor, rows: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log p and whether it is the most likely one, of tokens (n,) read at ``rows`` (n,) of the states."""
        readout, device = self.layers.readout(), states.device
        # several answers may be read at one row, whose logits are computed once
        by_row = np.argsort(rows, kind="stable")
        distinct, first, count = np.unique(rows[by_row], return_index=True, return_counts=True)
        slot = np.empty_like(rows)
        slot[by_row] = np.arange(len(rows)) - np.repeat(first, count)
        place = np.searchsorted(distinct, rows)
        targets = np.zeros((len(distinct), count.max()), dtype=np.int64)
        targets[place, slot] = tokens
        own = states.index_select(0, torch.from_numpy(distinct).to(device))
        log_p = readout.target_log_probabilities(own, torch.from_numpy(targets).to(device)).cpu().numpy()
        right = np.full(len(rows), np.nan)
        if self.accuracy:
            right = (readout.most_likely(own).cpu().numpy()[place] == tokens).astype(np.float64)
        return log_p[place, slot], right
