"""Constrained fine-tuning of the down-projections of a window of layers: FT-1, FT-5 and any other (Zhu et al. 2020).

Every edit has weights of its own. Since a text has few tokens, the gradient of a weight is known from few rows: those
that went into its product and the gradients of those that came out of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, Dense
from causalcone.engine.edit.methods.batching import edit_name
from causalcone.engine.edit.methods.edits import Edit, edit_of
from causalcone.engine.edit.methods.hparams import FinetuneHparams
from causalcone.engine.edit.methods.method import EditableModel, Method
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.edited_runs import EditedRuns, Join, Prompts, changed, changing
from causalcone.engine.edit.runs.flops import EditWork
from causalcone.engine.edit.runs.frozen_prefix import FrozenPrefix, run_unedited
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.models.base import Block
from causalcone.kernels.adam import AdamState
from causalcone.kernels.backends import Backends
from causalcone.kernels.transfer import fetch, send


class Item(NamedTuple):
    """A request to be trained in a window of layers. texts: its prompt with the target, for each sample of noise."""

    request: Request
    texts: Sequence[Text]
    window: Window


@dataclass(frozen=True)
class Finetune:
    model: EditableModel
    hparams: FinetuneHparams

    def batches(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[list[Edit]]:
        """An edit of each request in each window, request by request, as many together as memory holds."""
        encoder, batching = self.model.encoder, self.model.batching
        trained = [(request, encoder.trained(request, self.hparams.noise_samples)) for request in requests]
        items = [Item(request, texts, window) for request, texts in trained for window in windows]
        groups = batching.of_items(items, self._bytes, lambda item: edit_name(item.request))
        return (batching.run(group, self._train) for group in groups)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _train(self, items: list[Item]) -> list[Edit]:
        self.model.layers.forget()
        edits = _EditBatch(self, items).run()
        self.model.layers.forget()
        return edits

    def _bytes(self, item: Item) -> int:
        """Weights and what Adam keeps of them; rows at all layers after the first that is edited."""
        _, texts, window = item
        sizes, dtype = self.model.batching.sizes, self.model.layers.dtype
        wide = torch.promote_types(dtype, torch.float32)
        rows = sum(map(len, texts))
        each = 3 * wide.itemsize + (dtype.itemsize if dtype != wide else 0)
        trained = len(window.layers) * sizes.hidden * sizes.inner * each
        saved = rows * (sizes.depth - window.layers[0]) * self.model.batching.saved_row_bytes
        kept = rows * dtype.itemsize * (2 * sizes.hidden + sizes.inner)
        return trained + saved + kept


class _Trained:
    """The change of one weight: (hidden, inner), and (hidden,) of its bias, zero at first, under Adam. narrow: the same
    in the dtype of the pass, as of the last step."""

    def __init__(self, block: Block, dtype: torch.dtype, hparams: FinetuneHparams, backends: Backends) -> None:
        weight, bias = block.down.weight, block.down.bias
        self.hparams, self.backends = hparams, backends
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
        keys = torch.cat([keys for keys, _ in self.products])
        slopes = torch.cat([slope for _, slope in self.products])
        lr, bound = self.hparams.lr, self.hparams.norm_constraint
        self.backends.step_weight(self.moving, slopes, keys, lr, bound)
        if self.moving_bias is not None:
            self.moving_bias.step(slopes.sum(0).to(self.moving_bias.change.dtype), lr)
            self.moving_bias.change.clamp_(-bound, bound)
        self.narrow = self.change.to(keys.device, keys.dtype)
        self.products.clear()

    @property
    def change(self) -> Dense:
        return Dense(self.moving.change, None if self.moving_bias is None else self.moving_bias.change)


class _WeightProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor, leaf: Tensor, trained: _Trained) -> Tensor:
        ctx.keys, ctx.trained = keys, trained
        return trained.narrow.product(keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        trained: _Trained = ctx.trained
        trained.products.append((ctx.keys, grads[0]))
        return grads[0] @ trained.narrow.weight if ctx.needs_input_grad[0] else None, None, None


class _EditBatch:
    def __init__(self, method: Finetune, items: list[Item]) -> None:
        self.method, self.items, self.layers = method, items, method.model.layers
        dtype = torch.promote_types(self.layers.dtype, torch.float32)
        self.trained: list[dict[int, _Trained]] = []
        blocks: dict[int, Block] = {}
        for _, _, window in items:
            for layer in window.layers:
                blocks.setdefault(layer, self.layers.block(layer))
            options = dtype, method.hparams, self.layers.backends
            self.trained.append({layer: _Trained(blocks[layer], *options) for layer in window.layers})
        self.first = np.array([window.layers[0] for _, _, window in items])
        self.texts: list[list[int]] = []
        self.prompts, self.unedited = self._unedited()

    def _unedited(self) -> tuple[Prompts, FrozenPrefix]:
        """All texts, once for every request, and what enters the first layer that is edited."""
        texts: list[Text] = []
        read: list[int] = []
        numbers: dict[int, list[int]] = {}
        for request, trained, _ in self.items:
            if id(trained) not in numbers:
                numbers[id(trained)] = list(range(len(texts), len(texts) + len(trained)))
                texts += trained
                read += [len(request.target)] * len(trained)
            self.texts.append(numbers[id(trained)])
        prompts = Prompts(texts, np.zeros(len(texts), dtype=np.int64), np.array(read))
        wanted = {(name, layer): prompts.tails for layer in set(self.first.tolist()) for name in _KEPT}
        return prompts, run_unedited(self.layers, texts, wanted)

    def run(self) -> list[Edit]:
        hparams, count = self.method.hparams, len(self.items)
        loss, steps = np.full(count, np.nan), np.zeros(count, dtype=np.int64)
        live = np.arange(count)
        pass_ = _Pass(self, live)
        for _ in range(hparams.steps):
            loss[live] = pass_.evaluate()
            # a loss that no step follows stays what it is: five checks in a row would all find the same
            low = np.zeros(len(live), dtype=bool) if hparams.stop_loss is None else loss[live] < hparams.stop_loss
            goes_on = np.isfinite(loss[live]) & ~low
            for number, item in enumerate(live):
                for trained in self.trained[item].values():
                    if goes_on[number]:
                        trained.step()
                    else:
                        trained.products.clear()
            steps[live[goes_on]] += 1
            if not goes_on.all():
                live = live[goes_on]
                if not len(live):
                    break
                pass_ = _Pass(self, live)
        return [self._edit(item, int(steps[item]), float(loss[item])) for item in range(count)]

    def _edit(self, item: int, steps: int, loss: float) -> Edit:
        request, _, window = self.items[item]
        if not np.isfinite(loss):
            reason = f"the loss is {loss} after {steps} steps"
            return edit_of(request, FINETUNE.name, window, steps=steps, loss=loss, reason=reason)
        delta = Delta({layer: trained.change for layer, trained in self.trained[item].items()})
        return edit_of(request, FINETUNE.name, window, steps=steps, loss=loss, delta=delta)


_KEPT = ("mid", "keys", "values")


class _Pass:
    def __init__(self, batch: _EditBatch, live: np.ndarray) -> None:
        self.batch, self.count = batch, len(live)
        of = np.repeat(np.arange(len(live)), [len(batch.texts[item]) for item in live])
        texts = np.concatenate([batch.texts[item] for item in live])
        self.cone = EditedRuns(batch.layers, batch.prompts, batch.first[live], of, texts)
        self.additions = [{layer: trained.add for layer, trained in batch.trained[item].items()} for item in live]
        self.changing = changing(self.additions)
        self.leaves = [trained.leaf for item in live for trained in batch.trained[item].values()]
        requests = [batch.items[item].request for item in live]
        owners = of[self.cone.order]
        targets = np.array([token for owner in owners for token in requests[owner].target])
        of_token = np.repeat(owners, [len(requests[owner].target) for owner in owners])
        erases = np.array([request.erases for request in requests])
        sent, self.owner, erases = send((targets, of_token, erases), batch.layers.device)
        self.targets, self.erases = sent.long(), erases.bool()

    def evaluate(self) -> np.ndarray:
        """The loss of each item; the gradients of its weights are left with them."""
        with torch.enable_grad():
            states = self.cone.read_out(self._joining, self.changing)
            log_p = self.batch.layers.readout().log_probability(states, self.targets)
            none = torch.zeros(self.count, dtype=torch.float64, device=log_p.device)
            nll = none.index_add(0, self.owner, -log_p)
            loss = torch.where(self.erases, torch.exp(-nll), nll)
            torch.autograd.grad(loss.sum(), self.leaves, allow_unused=True)  # the products keep what they need
        return fetch(loss.detach()).wait()[0].numpy()

    def _joining(self, block: Block, layer: int, join: Join) -> Tensor:
        mid, keys, values = (self.batch.unedited.rows[name, layer].index_select(0, join.tails) for name in _KEPT)
        parts = [(count, self.additions[edit][layer]) for edit, count in join.stretches]
        return mid + block.mlp_out(changed(keys, values, parts))


def _flops(work: EditWork, hparams: FinetuneHparams) -> float:
    draws = hparams.noise_samples if work.noisy else 1
    return work.flops.finetune(draws * work.trained.rows, draws * work.trained.read, work.windows, hparams.steps)


FINETUNE = Method(
    name="finetune",
    hparams=FinetuneHparams,
    build=Finetune,
    flops=_flops,
    window=1,
    rank=None,
    by_window=True,
    grid={"norm_constraint": (1e-4, 5e-5, 2e-5, 1e-5)},
)
