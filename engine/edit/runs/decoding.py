"""Decoding: how a model goes on after many texts at once, each with a change of weights of its own.

Texts of any lengths grow together. The keys and values of what is there already are stored; a step takes one row of
each text through the layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, Dense, LowRank
from causalcone.engine.edit.runs.layers import Change, Layers
from causalcone.engine.edit.runs.packed_runs import Runs, Text, spans
from causalcone.engine.errors import ExperimentError, MemoryBudgetError, ModelError
from causalcone.engine.memory import out_of_memory
from causalcone.engine.models.base import Block
from causalcone.engine.run.session import Session
from causalcone.kernels.attention import attend
from causalcone.kernels.linear import Linear
from causalcone.kernels.log_sums import capped
from causalcone.kernels.row_attention import visible_keys
from causalcone.kernels.tiles import pieces


def continuations(
    session: Session,
    texts: Sequence[Text],
    lengths: Sequence[int],
    *,
    top_k: int | None = None,
    seeds: Sequence[int] | None = None,
    deltas: Sequence[Delta | None] | None = None,
) -> list[tuple[int, ...]]:
    """``decode`` by a session's model, in its dtype, on its device and within its budget of memory."""
    budget = session.budget()
    layers = Layers(session.architecture, budget.tiles, session.dtype, session.device)
    with session.computing():
        return decode(layers, texts, lengths, top_k=top_k, seeds=seeds, deltas=deltas, memory=max(0, budget.for_rows))


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
    """The token ids with which each text goes on: exactly ``lengths`` of them, past end-of-text tokens too.

    top_k: None for the most likely token each time, else each token is drawn from the distribution over the ``top_k``
    most likely ones, with ``seeds``, one for each text. Step s of a text uses number s of those that
    ``torch.rand`` gives in float64 from a generator with the text's seed, so that (but for rounding of the
    probabilities) neither the other texts nor ``memory`` make a difference, and a longer continuation begins like a
    shorter one. deltas: changes of weights, one or None for each text; texts may share one. Noise is on a text's own
    tokens alone. memory: bytes for stored keys and values and for rows; texts that do not fit together are decoded one
    group after the other.

    Besides, all layers' weights and the unembedding are held as the products need them: on CPUs in float32 or bfloat16,
    and where dtype or device are not the model's, that is a second copy of the model.

    Raises ``ExperimentError`` for arguments that make no sense, among them a text that outgrows the model's positions,
    ``MemoryBudgetError`` where not even one text fits, and ``ModelError`` where logits are not finite.
    """
    tasks = _tasks(layers, texts, lengths, top_k, seeds, deltas)
    found: list[tuple[int, ...]] = [()] * len(texts)
    if tasks:
        ready = _Ready.of(layers)
        for group in _groups(layers, tasks, memory):
            for task, tokens in zip(group, _run(ready, group, top_k), strict=True):
                found[task.number] = tokens
    return found


def text_seed(seed: int, *names: str | int) -> int:
    """A seed for one of the texts that are drawn under a seed, which depends on the text's own names alone."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True)
class _Task:
    """A text, by its number, that so many tokens are to be added to."""

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
    """What there is to do, the longest continuations first: the texts that still grow are then the first at any time.
    Equal lengths are neighbours."""
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
        delta = None if deltas is None else deltas[number]
        task = _Task(number, text, length, 0 if seeds is None else seeds[number], delta)
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
    group: list[_Task] = []
    room = rows = 0
    for task in tasks:
        room = max(room, task.room)
        width = 4 * sizes.hidden + 2 * heads + kv + (0 if task.delta is None else sizes.inner)
        rows += len(task.text) * width * itemsize
        needed = rows + (len(group) + 1) * room * sizes.depth * kv * itemsize
        if memory is not None and needed > memory:
            alone = len(task.text) * width * itemsize + task.room * sizes.depth * kv * itemsize
            if alone > memory:
                raise MemoryBudgetError(
                    f"text {task.number} needs {alone / 2**20:.1f} MiB to be continued, and {memory / 2**20:.1f} MiB "
                    "are left for it; give more memory"
                )
            yield group
            group, room, rows = [], task.room, len(task.text) * width * itemsize
        group.append(task)
    yield group


def _run(ready: _Ready, group: Sequence[_Task], top_k: int | None) -> list[tuple[int, ...]]:
    """The new tokens of each task; where memory runs out after all, of one half after the other."""
    try:
        return _Growing(ready, group).grow(top_k)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(group) == 1:
            raise MemoryBudgetError(
                f"memory ran out on text {group[0].number} alone; free some memory, or use a smaller dtype"
            ) from error
    if ready.layers.device.type == "cuda":
        torch.cuda.empty_cache()
    middle = len(group) // 2
    return [*_run(ready, group[:middle], top_k), *_run(ready, group[middle:], top_k)]


@dataclass(frozen=True)
class _Ready:
    """The model made ready for many small steps: its layers and its unembedding, ``read`` rows of logits at a time."""

    layers: Layers
    blocks: Sequence[Block]
    unembedding: Linear
    softcap: float | None
    read: int

    @classmethod
    def of(cls, layers: Layers) -> _Ready:
        readout = layers.readout()
        bias = None if readout.bias is None else readout.bias.to(layers.dtype)
        unembedding = Linear(readout.weight.to(layers.dtype), bias)
        read = max(1, readout.rows * readout.vocabulary // len(readout.weight))
        blocks = [layers.block(layer) for layer in range(layers.depth)]
        return cls(layers, blocks, unembedding, readout.softcap, read)

    def choose(self, rows: Tensor, top_k: int | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens (n,) after rows (n, hidden) of the last layer, with numbers ``uniform`` (n,) from [0, 1), and
        whether their logits are finite (n,)."""
        states = self.layers.architecture.final_norm(rows)
        chosen = [self._choose(states[tile], top_k, uniform[tile]) for tile in pieces(len(states), self.read)]
        tokens, finite = zip(*chosen, strict=True)
        return torch.cat(tokens), torch.cat(finite)

    def _choose(self, states: Tensor, top_k: int | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.unembedding(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = capped(logits, self.softcap)
        if top_k is None:
            best, tokens = logits.max(-1)
            return tokens, best.isfinite()
        best, tokens = logits.topk(min(top_k, logits.shape[1]), dim=-1)
        return drawn(best, tokens, uniform), best.isfinite().all(-1)


def drawn(logits: Tensor, tokens: Tensor, uniform: Tensor) -> Tensor:
    """One of the tokens (n, k) of each row (n,), by their logits (n, k) from the largest on: the first whose
    probability, with those of all before it, exceeds ``uniform`` (n,) float64 from [0, 1)."""
    reached = logits.double().softmax(-1).cumsum(-1)
    place = (reached <= uniform[:, None]).sum(-1).clamp_(max=logits.shape[1] - 1)  # the last may stay just below 1
    return tokens.gather(1, place[:, None])[:, 0]


class _Growing:
    """Texts that grow together. past: by layer, stored keys and values (texts, room, 2 * kv_heads * head_dim)."""

    def __init__(self, ready: _Ready, tasks: Sequence[_Task]) -> None:
        self.ready, self.layers, self.tasks = ready, ready.layers, tasks
        self.device = self.layers.device
        self.tokens = np.array([len(task.text) for task in tasks])
        self.start = np.cumsum(self.tokens) - self.tokens
        self.lengths = np.array([task.length for task in tasks])
        self.deltas = _Deltas.of([task.delta for task in tasks], ready)
        sizes, room = self.layers.architecture.sizes, max(task.room for task in tasks)
        stored = (len(tasks), room, 2 * sizes.kv_heads * sizes.head_dim)
        # zeros: what is not written yet takes part with weight zero, and must be finite
        self.past = [torch.zeros(stored, dtype=self.layers.dtype, device=self.device) for _ in ready.blocks]

    def grow(self, top_k: int | None) -> list[tuple[int, ...]]:
        """The new tokens of each text."""
        steps = int(self.lengths[0])
        uniform = torch.zeros(steps, len(self.tasks), dtype=torch.float64)
        if top_k is not None:
            for place, task in enumerate(self.tasks):
                generator = torch.Generator().manual_seed(task.seed)
                uniform[: task.length, place] = torch.rand(task.length, dtype=torch.float64, generator=generator)
        uniform = uniform.to(self.device)
        new = torch.zeros(len(self.tasks), steps, dtype=torch.int64, device=self.device)
        finite = torch.ones(len(self.tasks), dtype=torch.bool, device=self.device)
        length = torch.from_numpy(self.tokens).to(self.device)
        rows = self._begin()
        for step in range(steps):
            tokens, right = self.ready.choose(rows, top_k, uniform[step, : len(rows)])
            new[: len(rows), step] = tokens
            finite[: len(rows)] &= right
            live = int((self.lengths > step + 1).sum())
            if live:
                rows = self._step(tokens[:live], length[:live] + step, int(self.tokens[:live].max()) + step + 1)
        if not finite.all():
            number = self.tasks[int(finite.int().argmin())].number
            raise ModelError(
                f"text {number}: logits are not finite in {self.layers.dtype}; compute in float32 or bfloat16"
            )
        return [tuple(own[: task.length]) for own, task in zip(new.tolist(), self.tasks, strict=True)]

    def _begin(self) -> Tensor:
        """Rows (texts, hidden) of the last layer at the last token of each text; its keys and values are stored."""
        texts = [task.text for task in self.tasks]
        runs = Runs.of_texts(texts, self.device, read=np.ones_like(self.tokens))
        room = self.past[0].shape[1]
        places = torch.from_numpy(spans(np.arange(len(texts)) * room, self.tokens)).to(self.device)
        rows = self.layers.enter(texts)
        for layer, (block, past) in enumerate(zip(self.ready.blocks, self.past, strict=True)):
            last = layer == self.layers.depth - 1
            change = self.deltas.change(layer, (lambda own: own.places) if last else self._all_rows)
            passed = self.layers.advance(block, rows, runs, read_only=last, change=change)
            past.flatten(0, 1)[places] = passed.keys_values
            rows = passed.out
        return rows

    def _all_rows(self, changed: _Changed) -> Tensor:
        """The rows of all tokens of the texts with a change."""
        rows = spans(self.start[changed.texts], self.tokens[changed.texts])
        return torch.from_numpy(rows).to(self.device)

    def _step(self, tokens: Tensor, positions: Tensor, seen: int) -> Tensor:
        """Rows (live, hidden) of the last layer of one more token of each of the first texts, at ``positions`` (live,),
        the largest of which is seen - 1."""
        layers, live = self.layers, len(tokens)
        embeddings = layers.architecture.embed(tokens).to(self.device, layers.dtype)
        rows = layers.architecture.enter(embeddings, positions)
        each = torch.arange(live, device=self.device)
        for layer, (block, past) in enumerate(zip(self.ready.blocks, self.past, strict=True)):
            keys_values = layers.by_tiles(block.keys_values, rows, positions)
            past[each, positions] = keys_values
            queries = layers.by_tiles(block.queries, rows, positions)
            heads = self._attend(block, queries, past[:live, :seen], positions)
            change = self.deltas.change(layer, lambda own: own.places[: np.searchsorted(own.texts, live)])
            rows = layers.behind_attention(block, rows, heads, keys_values, change).out
        return rows

    def _attend(self, block: Block, queries: Tensor, past: Tensor, positions: Tensor) -> Tensor:
        """The heads' outputs (live, heads * head_dim) of one query of each text."""
        query = queries.view(len(queries), 1, -1, block.head_dim)
        keys, values = past.unflatten(2, (2, -1, block.head_dim)).unbind(2)
        visible = visible_keys(positions, past.shape[1], block.window)
        at_once = max(1, self.layers.tiles.keys // past.shape[1])
        parts = zip(*(whole.split(at_once) for whole in (query, keys, values, visible[:, None])), strict=True)
        heads = [attend(q, k, v, seen, block.scale, block.softcap) for q, k, v, seen in parts]
        return torch.cat(heads).flatten(1)


@dataclass(frozen=True)
class _Changed:
    """A change of one layer, and the texts that have it, by number and in order: texts (n,), places (n,) the same on
    the device."""

    change: LowRank | Dense
    texts: np.ndarray
    places: Tensor


@dataclass(frozen=True)
class _Deltas:
    """What is changed in each layer, for which of the texts."""

    changes: dict[int, list[_Changed]]

    @classmethod
    def of(cls, deltas: Sequence[Delta | None], ready: _Ready) -> _Deltas:
        layers = ready.layers
        wide = torch.promote_types(layers.dtype, torch.float32)
        distinct = {id(delta): delta for delta in deltas if delta is not None}
        changes: dict[int, list[_Changed]] = {}
        for delta in distinct.values():
            texts = np.array([number for number, own in enumerate(deltas) if own is delta])
            places = torch.from_numpy(texts).to(layers.device)
            for layer, change in delta.changes.items():
                if layer >= layers.depth or change.shape != tuple(ready.blocks[layer].down.weight.shape):
                    raise ExperimentError(
                        f"a delta has a change of {change.shape} for layer {layer}, which does not fit the model; use "
                        "deltas of this model"
                    )
                changes.setdefault(layer, []).append(_Changed(change.to(layers.device, wide), texts, places))
        return cls(changes)

    def change(self, layer: int, rows_of: Callable[[_Changed], Tensor]) -> Change | None:
        """The change of a layer in a pass where ``rows_of`` are the rows of the texts that have it."""
        if layer not in self.changes:
            return None

        def changed(keys: Tensor, values: Tensor) -> Tensor:
            for own in self.changes[layer]:
                rows = rows_of(own)
                if len(rows):
                    more = own.change.product(keys.index_select(0, rows))
                    values[rows] = (values[rows] + more).to(values.dtype)
            return values

        return changed
