"""Training changes of down-projections: what all fine-tuning is made of, of each request by itself or of all together.

Since a text has few tokens, the gradient of a weight is known from few rows: those that went into its product and the
gradients of those that came out of it. Texts go once as far as the first layer that is changed; all steps begin there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, Dense, Place
from causalcone.engine.edit.methods.method import EditableModel
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.edited_runs import Addition, EditedRuns, Join, Prompts, changed, changing
from causalcone.engine.edit.runs.frozen_prefix import run_unedited
from causalcone.engine.edit.runs.layers import Layers
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.models.base import Block
from causalcone.kernels.adam import AdamState
from causalcone.kernels.backends import Backends
from causalcone.kernels.transfer import fetch, send

_KEPT = ("mid", "keys", "values")


class Lesson(NamedTuple):
    """A request and the texts that it is trained on: its prompt with the target, for each sample of noise."""

    request: Request
    texts: Sequence[Text]

    @property
    def rows(self) -> int:
        return sum(map(len, self.texts))


class TrainingBytes(NamedTuple):
    """Bytes of training a window of layers: change, its changes and what Adam keeps of them; and of one row: kept, what
    is kept at the first layer; passed, what a pass saves; left, what its products leave until a step."""

    change: int
    kept: int
    passed: int
    left: int

    @classmethod
    def of(cls, model: EditableModel, window: Window) -> TrainingBytes:
        sizes, dtype = model.batching.sizes, model.layers.dtype
        wide = torch.promote_types(dtype, torch.float32)
        each = 3 * wide.itemsize + (dtype.itemsize if dtype != wide else 0)
        passed = (sizes.depth - window.layers[0]) * model.batching.saved_row_bytes
        left = len(window.layers) * dtype.itemsize * (sizes.hidden + sizes.inner)
        kept = dtype.itemsize * (2 * sizes.hidden + sizes.inner)
        return cls(len(window.layers) * sizes.hidden * sizes.inner * each, kept, passed, left)


class Trained:
    """The change of one weight: (hidden, inner), and (hidden,) of its bias, zero at first, under Adam, each element
    within ``bound`` (None: any). narrow: the same in the dtype of the pass, as of the last step."""

    def __init__(self, block: Block, layers: Layers, lr: float, bound: float | None) -> None:
        weight, bias = block.down.weight, block.down.bias
        dtype = torch.promote_types(layers.dtype, torch.float32)
        self.lr, self.bound = lr, math.inf if bound is None else bound
        self.backends: Backends = layers.backends
        self.moving = AdamState.zeros_like(weight, dtype)
        self.moving_bias = None if bias is None else AdamState.zeros_like(bias, dtype)
        self.leaf = torch.zeros((), dtype=dtype, device=weight.device, requires_grad=True)
        self.products: list[tuple[Tensor, Tensor]] = []
        self.narrow = self.change.to(weight.device, weight.dtype)

    def add(self, keys: Tensor) -> Tensor:
        """The addition to values (R, hidden), from keys (R, inner), to which gradient flows; ``step`` uses it."""
        return _WeightProduct.apply(keys, self.leaf, self)

    def step(self) -> None:
        """One step of Adam along the gradient of the products since the last, and back within the bounds."""
        keys, slopes = map(torch.cat, zip(*self.products, strict=True))
        self.backends.step_weight(self.moving, slopes, keys, self.lr, self.bound)
        if self.moving_bias is not None:
            self.moving_bias.step(slopes.sum(0).to(self.moving_bias.change.dtype), self.lr)
            self.moving_bias.change.clamp_(-self.bound, self.bound)
        self.narrow = self.change.to(keys.device, keys.dtype)
        self.products.clear()

    def stay(self) -> None:
        """Forget the products since the last step."""
        self.products.clear()

    @property
    def change(self) -> Dense:
        return Dense(self.moving.change, None if self.moving_bias is None else self.moving_bias.change)


TrainedLayers = Mapping[int, Trained]


def delta_of(trained: TrainedLayers) -> Delta:
    return Delta({layer: of_layer.change for layer, of_layer in trained.items()})


class _WeightProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor, leaf: Tensor, trained: Trained) -> Tensor:
        ctx.keys, ctx.trained = keys, trained
        return trained.narrow.product(keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        trained: Trained = ctx.trained
        trained.products.append((ctx.keys, grads[0]))
        return grads[0] @ trained.narrow.weight if ctx.needs_input_grad[0] else None, None, None


@dataclass(frozen=True)
class TrainingTexts:
    """The texts of some lessons, each lesson's by its ``numbers``; rows: what the unedited model makes of all their
    tokens at the layers where changes begin."""

    layers: Layers
    lessons: Sequence[Lesson]
    numbers: Sequence[range]
    prompts: Prompts
    rows: Mapping[tuple[str, int], Tensor]

    @classmethod
    def of(cls, layers: Layers, groups: Sequence[Sequence[Lesson]], first: Collection[int]) -> TrainingTexts:
        """Of lessons in groups that pass through the unedited model together, as far as the last of the layers
        ``first``."""
        lessons = [lesson for group in groups for lesson in group]
        total, start = sum(lesson.rows for lesson in lessons), 0
        rows: dict[tuple[str, int], Tensor] = {}
        for group in groups:
            prompts = _prompts(group)
            wanted = {(name, layer): prompts.tails for layer in first for name in _KEPT}
            of_group = run_unedited(layers, prompts.texts, wanted).rows
            if len(groups) == 1:
                rows = dict(of_group)
                break
            for place, own in of_group.items():
                rows.setdefault(place, own.new_empty(total, own.shape[1]))[start : start + len(own)] = own
            start += sum(lesson.rows for lesson in group)
        ends = np.cumsum([0, *(len(lesson.texts) for lesson in lessons)]).tolist()
        return cls(layers, lessons, list(map(range, ends, ends[1:])), _prompts(lessons), rows)


def _prompts(lessons: Sequence[Lesson]) -> Prompts:
    texts = [text for lesson in lessons for text in lesson.texts]
    read = np.repeat([len(request.target) for request, _ in lessons], [len(texts) for _, texts in lessons])
    return Prompts(texts, np.zeros(len(texts), dtype=np.int64), read)


class TrainingPass:
    """Lessons, by number among ``texts``, each in the model with one of ``changes``, number ``of`` (n,). mean: their
    losses are means over the target's tokens and the texts, not sums."""

    def __init__(
        self, texts: TrainingTexts, lessons: Sequence[int], changes: Sequence[TrainedLayers], of: np.ndarray, mean: bool
    ) -> None:
        self.texts, self.count = texts, len(lessons)
        numbers = [texts.numbers[lesson] for lesson in lessons]
        lesson_of = np.repeat(np.arange(len(lessons)), list(map(len, numbers)))
        first = np.array([min(trained) for trained in changes])
        self.cone = EditedRuns(texts.layers, texts.prompts, first, of[lesson_of], np.concatenate(numbers))
        self.additions: list[dict[Place, Addition]] = [
            {layer: each.add for layer, each in trained.items()} for trained in changes
        ]
        self.changing = changing(self.additions)
        self.leaves = [each.leaf for trained in changes for each in trained.values()]
        requests = [texts.lessons[lesson].request for lesson in lessons]
        owners = lesson_of[self.cone.order]
        targets = np.array([token for owner in owners for token in requests[owner].target])
        of_token = np.repeat(owners, [len(requests[owner].target) for owner in owners])
        shares = np.bincount(of_token)[of_token] if mean else np.ones_like(of_token)
        erases = np.array([request.erases for request in requests])
        sent, self.owner, parts, erasing = send((targets, of_token, shares, erases), texts.layers.device)
        self.targets, self.weights, self.erases = sent.long(), parts.double().reciprocal(), erasing.bool()

    def evaluate(self, share: float = 1.0) -> np.ndarray:
        """The loss of each lesson; the gradients of their sum times ``share`` are left with the changes."""
        with torch.enable_grad():
            states = self.cone.read_out(self._joining, self.changing)
            log_p = self.texts.layers.readout().log_probability(states, self.targets)
            none = torch.zeros(self.count, dtype=torch.float64, device=log_p.device)
            nll = none.index_add(0, self.owner, -log_p * self.weights)
            loss = torch.where(self.erases, torch.exp(-nll), nll)
            torch.autograd.grad(loss.sum() * share, self.leaves, allow_unused=True)  # products keep what they need
        return fetch(loss.detach()).wait()[0].numpy()

    def _joining(self, block: Block, layer: int, join: Join) -> Tensor:
        mid, keys, values = (self.texts.rows[name, layer].index_select(0, join.tails) for name in _KEPT)
        parts = [(count, self.additions[edit][layer]) for edit, count in join.stretches]
        return mid + block.mlp_out(changed(keys, values, parts))
