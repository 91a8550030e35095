"""FLOPs of editing and scoring, counted from the lengths of texts: nothing is computed.

Counted are multiply-adds x 2 of all products with weights: the projections of the layers, forwards and back, what edits
add to them, and the unembedding. Products of attention, and the solves with second moments, are left out. Lengths of
several requests can be added up: every count is linear in them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Self

from causalcone.engine.models.base import Sizes


@dataclass(frozen=True)
class _Counts:
    """Numbers of several requests together."""

    @classmethod
    def total(cls, weighted: Iterable[tuple[Self, float]]) -> Self:
        """The sum of counts, each times its weight."""
        rows = [[weight * number for number in astuple(counts)] for counts, weight in weighted]
        return cls(*map(sum, zip(*rows, strict=True))) if rows else cls(*[0.0] * len(fields(cls)))


@dataclass(frozen=True)
class Searched(_Counts):
    """The texts of a search: contexts with the target but its last token, and the essence prompt. requests: how many;
    whole: tokens of all; tails: from the lookup on; read: read out; prefixes: up to it; bare: of the bare prompt."""

    requests: float
    whole: float
    tails: float
    read: float
    prefixes: float
    bare: float

    @classmethod
    def of(cls, contexts: Sequence[tuple[int, int]], essence: int, target: int) -> Searched:
        """Of one request: tokens and lookup of each context's prompt, the bare one first; the essence's up to it."""
        whole = sum(tokens + target - 1 for tokens, _ in contexts)
        before = sum(lookup for _, lookup in contexts)
        return cls(
            requests=1,
            whole=whole + essence,
            tails=whole - before + 1,
            read=len(contexts) * target + 1,
            prefixes=before + len(contexts),
            bare=contexts[0][1] + 1,
        )


@dataclass(frozen=True)
class Asked(_Counts):
    """The texts that answers are read from: rows: their tokens; read: rows that answers are read at, answer by answer;
    distinct: the same, where several answers are read at one row."""

    rows: float
    read: float
    distinct: float

    @classmethod
    def after(cls, prompt: int, answers: Iterable[int]) -> Asked:
        """Answers of these lengths after one prompt: one of a single token is read in another's run."""
        longest, *others = sorted(answers, reverse=True)
        runs = [longest, *(answer for answer in others if answer > 1)]
        return cls(sum(prompt + answer - 1 for answer in runs), sum(runs), sum(runs))


@dataclass(frozen=True)
class Grown(_Counts):
    """Texts that a model continues: how many, their tokens, and the new tokens."""

    texts: float
    tokens: float
    new: float


@dataclass(frozen=True)
class Flops:
    """Of a model of ``sizes``. Every edit takes all ``steps``, and each goes forwards and back: none may stop early."""

    sizes: Sizes

    def rome(self, texts: Searched, layers: Collection[int], steps: int) -> float:
        return 2 * self._search(texts, layers, steps)

    def memit(self, texts: Searched, windows: Sequence[Sequence[int]], steps: int) -> float:
        """Every request by itself: in a window's layers all contexts go up to the lookup; then the bare prompt."""
        sizes = [len(window) for window in windows]
        spread = sum((texts.prefixes * size + texts.bare * _pairs(size)) * self._layer for size in sizes)
        return 2 * (self._search(texts, {window[-1] for window in windows}, steps) + spread)

    def memit_joint(self, texts: Searched, windows: Sequence[Sequence[int]], steps: int) -> float:
        """All requests together: layers but the last are gone through once to see the keys, and once changed."""
        total = 0.0
        for window in windows:
            rows = texts.prefixes * (2 * len(window) - 1) + texts.bare * _pairs(len(window))
            change = texts.prefixes * (len(window) - 1) * self._change(texts.requests)
            total += self._search(texts, window[-1:], steps) + rows * self._layer + change
        return 2 * total

    def finetune(
        self, rows: float, read: float, windows: Sequence[Sequence[int]], steps: int, first: int | None = None
    ) -> float:
        """``rows`` tokens, ``read`` of them read out, go once as far as ``first``: the last window's first layer."""
        last = max(window[0] for window in windows) if first is None else first
        trained = sum(self._trained(window, rows, read) for window in windows)
        return 2 * (rows * (last + 1) * self._layer + steps * trained)

    def one_pass(self, rows: float, read: float, windows: Sequence[Sequence[int]]) -> float:
        """As above, without weights of their own: once through each window's first layer, from whose MLP on once more
        and back."""
        before = sum((window[0] + 1) * self._layer + self.sizes.mlp_weights for window in windows)
        after = sum(self._after(window[0], rows, read) + read * self._readout for window in windows)
        return 2 * (rows * before + 2 * after)

    def unedited(self, asked: Asked, whole: bool = False) -> float:
        """Answers of the model as it is; ``whole``: all rows go through the last layer, where one edits it."""
        read = asked.rows if whole else asked.read
        return 2 * (self._after(-1, asked.rows, read) + asked.distinct * self._readout)

    def edited(self, asked: Asked, window: Sequence[int], rank: float | None = 1) -> float:
        """Answers of a model with one edit, whose change of each weight has a ``rank``; None for a dense one."""
        first, *later = window
        last = self.sizes.depth - 1
        changed = asked.rows + sum(asked.read if layer == last else asked.rows for layer in later)
        after = self._after(first, asked.rows, asked.read)
        return 2 * (changed * self._change(rank) + after + asked.distinct * self._readout)

    def decoding(self, texts: Grown, changed: int = 0, rank: float | None = 1) -> float:
        """Continuations of texts, token by token; in a model with ``changed`` edited layers."""
        rows = texts.tokens + texts.new - texts.texts
        layers = rows * self.sizes.depth * self._layer - (texts.tokens - texts.texts) * self._beyond_keys
        return 2 * (layers + texts.new * self._readout + rows * changed * self._change(rank))

    def moments(self, tokens: float, layers: Collection[int]) -> float:
        """Second moments of the layers' keys: a pass up to the last of them, and the upper half of their products."""
        inner = self.sizes.inner
        return 2 * tokens * ((max(layers) + 1) * self._layer + len(layers) * inner * (inner + 1) / 2)

    def _search(self, texts: Searched, layers: Collection[int], steps: int) -> float:
        """The unedited texts, the essence prompt's distribution, and the steps of a vector at each layer."""
        unedited = texts.whole * self.sizes.depth * self._layer + texts.requests * self._readout
        stepped = (self._after(layer, texts.tails, texts.read) + texts.read * self._readout for layer in layers)
        return unedited + 2 * steps * sum(stepped)

    def _trained(self, window: Sequence[int], rows: float, read: float) -> float:
        """One step: rows after the window's first layer, the changes of its weights, and the readout."""
        last = self.sizes.depth - 1
        first, *later = window
        change = 2 * rows  # its product, and its weight's gradient; the first layer's keys need none
        change += sum(3 * (read if layer == last else rows) for layer in later)
        return 2 * (self._after(first, rows, read) + read * self._readout) + change * self._change(None)

    def _after(self, layer: int, rows: float, read: float) -> float:
        """Rows through all layers after this one: in the last, those that are not read give keys and values only."""
        layers = self.sizes.depth - 1 - layer
        return rows * layers * self._layer - (rows - read) * self._beyond_keys if layers else 0

    def _change(self, rank: float | None) -> float:
        """Weights of a change of a down-projection."""
        inner, hidden = self.sizes.inner, self.sizes.hidden
        return inner * hidden if rank is None else rank * (inner + hidden)

    @property
    def _layer(self) -> int:
        """Weights of a layer's projections."""
        sizes = self.sizes
        return sizes.key_value_weights + 2 * sizes.query_weights + sizes.mlp_weights

    @property
    def _beyond_keys(self) -> int:
        """Weights of a layer's projections but those to keys and values."""
        return self._layer - self.sizes.key_value_weights

    @property
    def _readout(self) -> int:
        return self.sizes.hidden * self.sizes.vocabulary


@dataclass(frozen=True, kw_only=True)
class EditWork:
    """Edits of some requests in each of the windows. searched: the texts that a vector is searched on, in the method's
    contexts; trained: the bare prompts with their targets; noisy: whether subjects carry noise (Fact Forcing)."""

    flops: Flops
    windows: Sequence[Sequence[int]]
    searched: Searched
    trained: Asked
    noisy: bool


def _pairs(layers: int) -> int:
    return layers * (layers - 1) // 2
