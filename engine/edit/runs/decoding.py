"""Decoding: the tokens that a model continues many texts with, each under a change of weights of its own.

Texts of any lengths grow together. Keys and values of the tokens so far are stored; a step takes one row of each text
through the layers; ``engine/run/forward.py`` names the other passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import (
    PROJECTIONS,
    Delta,
    Dense,
    LowRank,
    Place,
    layer_and_projection,
    place_of,
)
from causalcone.engine.edit.runs.layers import Change, Layers
from causalcone.engine.edit.runs.packed_runs import Runs, Text, spans
from causalcone.engine.errors import ExperimentError, MemoryBudgetError, ModelError
from causalcone.engine.memory import halving
from causalcone.engine.models.base import Block
from causalcone.engine.run.session import Session
from causalcone.kernels.attention import attend
from causalcone.kernels.linear import Linear
from causalcone.kernels.log_sums import capped
from causalcone.kernels.row_attention import visible_keys
from causalcone.kernels.tiles import pieces
from causalcone.kernels.transfer import on_device, send


def continuations(
    session: Session, texts: Sequence[Text], lengths: Sequence[int], **options: Any
) -> list[tuple[int, ...]]:
    """``decode``, which has the options, by a session's model, in its dtype, on its device and within its budget."""
    budget = session.budget()
    layers = Layers(session.architecture, budget.tiles, session.dtype, session.device)
    with session.computing():
        return decode(layers, texts, lengths, **options, memory=max(0, budget.for_rows))


@torch.no_grad()
def decode(
    layers: Layers,
    texts: Sequence[Text],
    lengths: Sequence[int],
    *,
    top_k: int | None = None,
    seeds: Sequence[int] | None = None,
    deltas: Sequence[Delta | None] | None = None,
    memory: int | None = None,
) -> list[tuple[int, ...]]:
    """The token ids that continue each text: exactly ``lengths`` of them, past end-of-text tokens too.

    top_k: None for the most likely token each time, else each is drawn from the distribution over the ``top_k`` most
    likely ones, with ``seeds``, one for each text: step s uses number s of those that ``torch.rand`` gives in float64
    from a generator with that seed, so that (up to rounding of the probabilities) neither the other texts nor
    ``memory`` make a difference, and a longer continuation begins like a shorter one. deltas: changes of weights, one
    or None for each text. Noise is on a text's given tokens alone. memory: bytes for stored keys and values and for
    rows, beside the weights that the products need (a second copy of the model where dtype or device are not its own);
    texts that do not fit together are decoded one group after the other.
    """
    tasks = _tasks(layers, texts, lengths, top_k, seeds, deltas)
    results: list[tuple[int, ...]] = [()] * len(texts)
    if tasks:
        model = _Model.of(layers)
        for group in _groups(layers, tasks, memory):
            decoded = halving(
                group, lambda half: _TextGroup(model, half).grow(top_k), lambda task: f"text {task.number} alone"
            )
            for task, tokens in zip(group, decoded, strict=True):
                results[task.number] = tokens
    return results


def text_seed(seed: int, *names: str | int) -> int:
    """A seed for one of the texts that are drawn under a seed; it depends on that seed and the text's names alone."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True)
class _Task:
    """A text, by its number, to be continued by ``length`` tokens."""

    number: int
    text: Text
    length: int
    seed: int
    delta: Delta | None

    @property
    def room(self) -> int:
        """Tokens that run through the model: the last one is never read again."""
        return len(self.text) + self.length - 1


def _tasks(
    layers: Layers,
    texts: Sequence[Text],
    lengths: Sequence[int],
    top_k: int | None,
    seeds: Sequence[int] | None,
    deltas: Sequence[Delta | None] | None,
) -> list[_Task]:
    """The texts to be continued, the longest continuations first: those that still grow are always the first."""
    for name, column in (("lengths", lengths), ("seeds", seeds), ("deltas", deltas)):
        if column is not None and len(column) != len(texts):
            raise ExperimentError(f"there are {len(texts)} texts and {len(column)} {name}; give one for each text")
    if (top_k is None) != (seeds is None):
        raise ExperimentError("top_k and seeds go together; give both to sample, or neither for the likeliest tokens")
    if top_k is not None and top_k < 1:
        raise ExperimentError(f"top_k is {top_k}; give at least 1")
    positions = layers.architecture.sizes.positions
    tasks = []
    for number, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        if not len(text):
            raise ExperimentError(f"text {number} has no tokens to go on from; begin it with one")
        if length < 0:
            raise ExperimentError(f"text {number} is to be continued by {length} tokens; give a number from 0")
        task = _Task(number, text, length, seeds[number] if seeds else 0, deltas[number] if deltas else None)
        if task.room > positions:
            raise ExperimentError(
                f"text {number} has {len(text)} tokens and is to be continued by {length}, which needs {task.room} "
                f"positions; the model has {positions}. Shorten the text or the continuation"
            )
        if length:
            tasks.append(task)
    return sorted(tasks, key=lambda task: (-task.length, len(task.text)))


def _groups(layers: Layers, tasks: Sequence[_Task], memory: int | None) -> Iterator[list[_Task]]:
    """Consecutive tasks that fit the memory together. All store as many tokens as the longest of their group."""
    sizes, itemsize = layers.architecture.sizes, layers.dtype.itemsize
    kv, heads = 2 * sizes.kv_heads * sizes.head_dim, sizes.heads * sizes.head_dim
    stored = sizes.depth * kv * itemsize
    group: list[_Task] = []
    room = rows = 0
    for task in tasks:
        width = 4 * sizes.hidden + 2 * heads + kv + (0 if task.delta is None else sizes.inner)
        task_rows = len(task.text) * width * itemsize
        if memory is not None and rows + task_rows + (len(group) + 1) * max(room, task.room) * stored > memory:
            alone = task_rows + task.room * stored
            if alone > memory:
                raise MemoryBudgetError(
                    f"text {task.number} needs {alone / 2**20:.1f} MiB to be continued, and {memory / 2**20:.1f} MiB "
                    "are left for it; give more memory"
                )
            yield group
            group, room, rows = [], 0, 0
        group.append(task)
        room, rows = max(room, task.room), rows + task_rows
    yield group


@dataclass(frozen=True)
class _Model:
    """The model prepared for many small steps: layers and unembedding, ``tile`` rows of logits at a time."""

    layers: Layers
    blocks: Sequence[Block]
    unembedding: Linear
    softcap: float | None
    tile: int

    @classmethod
    def of(cls, layers: Layers) -> _Model:
        readout = layers.readout()
        bias = None if readout.bias is None else readout.bias.to(layers.dtype)
        unembedding = Linear(readout.weight.to(layers.dtype), bias)
        tile = max(1, readout.rows * readout.vocabulary // len(readout.weight))
        blocks = [layers.block(layer) for layer in range(layers.depth)]
        return cls(layers, blocks, unembedding, readout.softcap, tile)

    def next_tokens(self, rows: Tensor, top_k: int | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens (n,) after rows (n, hidden) of the last layer, with numbers ``uniform`` (n,) from [0, 1), and
        whether their logits are finite (n,)."""
        states = self.layers.architecture.final_norm(rows)
        tiles = pieces(len(states), self.tile, states.device)
        tokens, finite = zip(*(self._next_tokens(states[tile], top_k, uniform[tile]) for tile in tiles), strict=True)
        return torch.cat(tokens), torch.cat(finite)

    def _next_tokens(self, states: Tensor, top_k: int | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.unembedding(states)
        logits = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.softcap)
        if top_k is None:
            best, tokens = logits.max(-1)
            return tokens, best.isfinite()
        best, tokens = logits.topk(min(top_k, logits.shape[1]), dim=-1)
        return draw(best, tokens, uniform), best.isfinite().all(-1)


def draw(logits: Tensor, tokens: Tensor, uniform: Tensor) -> Tensor:
    """One of the tokens (n, k) of each row (n,), by their logits (n, k) from the largest on: the first whose
    probability, with those of all before it, exceeds ``uniform`` (n,) float64 from [0, 1)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    index = (cumulative <= uniform[:, None]).sum(-1).clamp_(max=logits.shape[1] - 1)  # the last may stay just below 1
    return tokens.gather(1, index[:, None])[:, 0]


class _TextGroup:
    """Texts that grow together. past: by layer, stored keys and values (texts, room, 2 * kv_heads * head_dim)."""

    def __init__(self, model: _Model, tasks: Sequence[_Task]) -> None:
        self.model, self.layers, self.tasks = model, model.layers, tasks
        self.device = self.layers.device
        self.tokens = np.array([len(task.text) for task in tasks])
        self.start = np.cumsum(self.tokens) - self.tokens
        self.lengths = np.array([task.length for task in tasks])
        self.deltas = _Deltas.of([task.delta for task in tasks], model)
        sizes, room = self.layers.architecture.sizes, max(task.room for task in tasks)
        stored = (len(tasks), room, 2 * sizes.kv_heads * sizes.head_dim)
        # zeros: rows that are not written yet take part with weight zero, and must be finite
        self.past = [torch.zeros(stored, dtype=self.layers.dtype, device=self.device) for _ in model.blocks]

    def grow(self, top_k: int | None) -> list[tuple[int, ...]]:
        """The new tokens of each text."""
        steps = int(self.lengths[0])
        uniform = torch.zeros(steps, len(self.tasks), dtype=torch.float64)
        if top_k is not None:
            for column, task in enumerate(self.tasks):
                generator = torch.Generator().manual_seed(task.seed)
                uniform[: task.length, column] = torch.rand(task.length, dtype=torch.float64, generator=generator)
        uniform = on_device(uniform, self.device)
        new = torch.zeros(len(self.tasks), steps, dtype=torch.int64, device=self.device)
        finite = torch.ones(len(self.tasks), dtype=torch.bool, device=self.device)
        length = on_device(self.tokens, self.device)
        rows = self._begin()
        for step in range(steps):
            tokens, are_finite = self.model.next_tokens(rows, top_k, uniform[step, : len(rows)])
            new[: len(rows), step] = tokens
            finite[: len(rows)] &= are_finite
            live = int((self.lengths > step + 1).sum())
            if live:
                rows = self._step(tokens[:live], length[:live] + step, int(self.tokens[:live].max()) + step + 1)
        if not finite.all():
            number = self.tasks[int(finite.int().argmin())].number
            raise ModelError(
                f"text {number}: logits are not finite in {self.layers.dtype}; compute in float32 or bfloat16"
            )
        return [tuple(row[: task.length]) for row, task in zip(new.tolist(), self.tasks, strict=True)]

    def _begin(self) -> Tensor:
        """Rows (texts, hidden) of the last layer at the last token of each text; its keys and values are stored."""
        texts = [task.text for task in self.tasks]
        slots = spans(np.arange(len(texts)) * self.past[0].shape[1], self.tokens)
        runs, slots = send((Runs.whole(self.tokens, np.ones_like(self.tokens)), slots), self.device)
        rows = self.layers.enter(texts)
        for layer, (block, past) in enumerate(zip(self.model.blocks, self.past, strict=True)):
            last = layer == self.layers.depth - 1
            change = self.deltas.change(layer, (lambda target: target.index) if last else self._all_rows)
            passed = self.layers.advance(block, rows, runs, read_only=last, change=change)
            past.flatten(0, 1)[slots] = passed.keys_values
            rows = passed.out
        return rows

    def _all_rows(self, target: _ChangedTexts) -> Tensor:
        """The rows of all tokens of the texts with a change."""
        rows = spans(self.start[target.texts], self.tokens[target.texts])
        return on_device(rows, self.device)

    def _step(self, tokens: Tensor, positions: Tensor, seen: int) -> Tensor:
        """Rows (live, hidden) of the last layer of one more token of each of the first texts, at ``positions`` (live,),
        the largest of which is seen - 1."""
        layers, live = self.layers, len(tokens)
        embeddings = layers.architecture.embed(tokens).to(self.device, layers.dtype)
        rows = layers.architecture.enter(embeddings, positions)
        texts = torch.arange(live, device=self.device)
        for layer, (block, past) in enumerate(zip(self.model.blocks, self.past, strict=True)):
            keys_values = layers.by_tiles(block.keys_values, rows, positions)
            past[texts, positions] = keys_values
            queries = layers.by_tiles(block.queries, rows, positions)
            heads = self._attend(block, queries, past[:live, :seen], positions)
            change = self.deltas.change(layer, lambda target: target.index[: np.searchsorted(target.texts, live)])
            rows = layers.after_attention(block, rows, heads, keys_values, change).out
        return rows

    def _attend(self, block: Block, queries: Tensor, past: Tensor, positions: Tensor) -> Tensor:
        """The heads' outputs (live, heads * head_dim) of one query of each text."""
        query = queries.view(len(queries), 1, -1, block.head_dim)
        keys, values = past.unflatten(2, (2, -1, block.head_dim)).unbind(2)
        visible = visible_keys(positions, past.shape[1], block.window)
        at_once = max(1, self.layers.tiles.keys // past.shape[1])
        tiles = zip(*(whole.split(at_once) for whole in (query, keys, values, visible[:, None])), strict=True)
        heads = [attend(q, k, v, seen, block.scale, block.softcap) for q, k, v, seen in tiles]
        return torch.cat(heads).flatten(1)


@dataclass(frozen=True)
class _ChangedTexts:
    """A change of one weight, and the texts that have it, in order: texts (n,), index (n,) the same on the device."""

    change: LowRank | Dense
    texts: np.ndarray
    index: Tensor


@dataclass(frozen=True)
class _Deltas:
    """The changes of each weight, with the texts that have them."""

    changes: dict[Place, list[_ChangedTexts]]

    @classmethod
    def of(cls, deltas: Sequence[Delta | None], model: _Model) -> _Deltas:
        layers = model.layers
        wide = torch.promote_types(layers.dtype, torch.float32)
        distinct = {id(delta): delta for delta in deltas if delta is not None}
        changes: dict[Place, list[_ChangedTexts]] = {}
        for delta in distinct.values():
            texts = np.array([number for number, other in enumerate(deltas) if other is delta])
            index = torch.from_numpy(texts).to(layers.device)
            for place, change in delta.changes.items():
                layer, name = layer_and_projection(place)
                linear = model.blocks[layer].projection(name) if layer < layers.depth else None
                if linear is None or change.shape != tuple(linear.weight.shape):
                    raise ExperimentError(
                        f"a delta has a change of {change.shape} for layer {layer}, which does not fit the model; use "
                        "deltas of this model"
                    )
                changes.setdefault(place, []).append(_ChangedTexts(change.to(layers.device, wide), texts, index))
        return cls(changes)

    def change(self, layer: int, rows_of: Callable[[_ChangedTexts], Tensor]) -> Change | None:
        """The change of a layer in a pass where ``rows_of`` are the rows of the texts that have it."""

        def add(place: Place, keys: Tensor, values: Tensor) -> Tensor:
            for target in self.changes[place]:
                rows = rows_of(target)
                if len(rows):
                    product = target.change.product(keys.index_select(0, rows))
                    values[rows] = (values[rows] + product).to(values.dtype)
            return values

        places = {name: place_of(layer, name) for name in PROJECTIONS}
        return {name: partial(add, place) for name, place in places.items() if place in self.changes} or None
