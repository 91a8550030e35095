"""Fine-tuning of the down-projections of a window of layers, of each request by itself: constrained (FT-1, FT-5; Zhu et
al. 2020), or on the mean over the target's tokens (FT-M). Every edit has weights of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from causalcone.engine.edit.methods.batching import edit_name
from causalcone.engine.edit.methods.edits import Edit, edit_of
from causalcone.engine.edit.methods.fine_tuning.training import (
    Lesson,
    Trained,
    TrainedLayers,
    TrainingBytes,
    TrainingPass,
    TrainingTexts,
    delta_of,
)
from causalcone.engine.edit.methods.hparams import FinetuneHparams, FtmHparams
from causalcone.engine.edit.methods.method import EditableModel, Method
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.flops import EditWork
from causalcone.engine.models.base import Block


class Item(NamedTuple):
    """A lesson in a window of layers."""

    lesson: Lesson
    window: Window


@dataclass(frozen=True)
class Finetune:
    """mean: the loss is the mean over the target's tokens, not the sum."""

    model: EditableModel
    hparams: FinetuneHparams
    mean: bool = False

    def batches(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[list[Edit]]:
        """An edit of each request in each window, request by request, as many together as memory holds."""
        encoder, batching = self.model.encoder, self.model.batching
        lessons = [Lesson(request, encoder.trained(request, self.hparams.noise_samples)) for request in requests]
        items = [Item(lesson, window) for lesson in lessons for window in windows]
        groups = batching.of_items(items, self._bytes, lambda item: edit_name(item.lesson.request))
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
        of = TrainingBytes.of(self.model, item.window)
        return of.change + item.lesson.rows * (of.kept + of.passed)


class _EditBatch:
    def __init__(self, method: Finetune, items: list[Item]) -> None:
        self.method, self.items, self.layers = method, items, method.model.layers
        hparams = method.hparams
        self.trained: list[TrainedLayers] = []
        blocks: dict[int, Block] = {}
        for _, window in items:
            for layer in window.layers:
                blocks.setdefault(layer, self.layers.block(layer))
            options = self.layers, hparams.lr, hparams.norm_constraint
            self.trained.append({layer: Trained(blocks[layer], *options) for layer in window.layers})
        self.texts = self._unedited()

    def _unedited(self) -> TrainingTexts:
        """All texts, once for every request, and what enters the first layer that is edited."""
        distinct = {id(lesson): lesson for lesson, _ in self.items}
        number = {key: number for number, key in enumerate(distinct)}
        self.lesson = [number[id(lesson)] for lesson, _ in self.items]
        return TrainingTexts.of(self.layers, [[*distinct.values()]], {window.layers[0] for _, window in self.items})

    def run(self) -> list[Edit]:
        hparams, count = self.method.hparams, len(self.items)
        loss, steps = np.full(count, np.nan), np.zeros(count, dtype=np.int64)
        live = np.arange(count)
        pass_ = self._pass(live)
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
                        trained.stay()
            steps[live[goes_on]] += 1
            if not goes_on.all():
                live = live[goes_on]
                if not len(live):
                    break
                pass_ = self._pass(live)
        return [self._edit(item, int(steps[item]), float(loss[item])) for item in range(count)]

    def _pass(self, live: np.ndarray) -> TrainingPass:
        lessons, trained = [self.lesson[item] for item in live], [self.trained[item] for item in live]
        return TrainingPass(self.texts, lessons, trained, np.arange(len(live)), self.method.mean)

    def _edit(self, item: int, steps: int, loss: float) -> Edit:
        (request, _), window = self.items[item]
        if not np.isfinite(loss):
            reason = f"the loss is {loss} after {steps} steps"
            return edit_of(request, FINETUNE.name, window, steps=steps, loss=loss, reason=reason)
        return edit_of(request, FINETUNE.name, window, steps=steps, loss=loss, delta=delta_of(self.trained[item]))


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
FT_M = replace(
    FINETUNE,
    name="ft-m",
    preset_name="ft-m",
    hparams=FtmHparams,
    build=partial(Finetune, mean=True),
    by_window=False,
    grid={"lr": (1e-4, 2e-4, 5e-4)},
)
