"""Fine-tuning of one change on all requests: epochs of shuffled minibatches of texts that end (LocFT-BF, Yang et al.
2026, arXiv 2509.22072).

Nothing before the changed down-projection ever changes: what enters it is computed once for all epochs, and kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from causalcone.engine.edit.methods.batching import Batching
from causalcone.engine.edit.methods.edits import Edit, edit_of
from causalcone.engine.edit.methods.fine_tuning.training import (
    Lesson,
    Trained,
    TrainingBytes,
    TrainingPass,
    TrainingTexts,
    delta_of,
)
from causalcone.engine.edit.methods.hparams import LocftHparams
from causalcone.engine.edit.methods.method import EditableModel, Method
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.flops import EditWork
from causalcone.engine.errors import ExperimentError


@dataclass(frozen=True)
class JointFinetune:
    model: EditableModel
    hparams: LocftHparams

    def batches(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[list[Edit]]:
        """Window by window an edit of each request; those of a window share their change."""
        lessons = list(map(self._lesson, requests))
        return (self._train(requests, lessons, window) for window in windows)

    def _lesson(self, request: Request) -> Lesson:
        """What is trained: an end-of-text token too, after a target that is to become likely."""
        encoder = self.model.encoder
        end = encoder.prompts.tokenizer.eos_token_id
        if end is None:
            raise ExperimentError(
                f"the tokenizer has no end-of-text token, which {LOCFT.name} trains after every target; set its "
                "eos_token, or choose another method, such as ft-m"
            )
        trained = request if request.erases else replace(request, target=(*request.target, end))
        return Lesson(trained, encoder.trained(trained, self.hparams.noise_samples))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _train(self, requests: Sequence[Request], lessons: Sequence[Lesson], window: Window) -> list[Edit]:
        self.model.layers.forget()
        training = _Training(self, lessons, window)
        losses, steps = training.run()
        self.model.layers.forget()
        finite = bool(np.isfinite(losses).all())
        shared = edit_of(
            requests[0], LOCFT.name, window, steps=steps, loss=float(losses[0]),
            delta=delta_of(training.trained) if finite else None,
            reason=None if finite else f"the loss is not finite after {steps} steps",
        )  # fmt: skip
        pairs = zip(requests, losses.tolist(), strict=True)
        return [replace(shared, request=request, loss=loss) for request, loss in pairs]


class _Training:
    """One change of a window's layers, on its way through the epochs."""

    def __init__(self, method: JointFinetune, lessons: Sequence[Lesson], window: Window) -> None:
        self.hparams, layers, self.lessons = method.hparams, method.model.layers, lessons
        self.of = TrainingBytes.of(method.model, window)
        self.name = f"one change of layer {window.layers[0]} for {len(lessons)} facts, whose states there are kept,"
        self.batching = self._beside(method.model.batching)
        groups = self.batching.of_items(lessons, self._bytes, lambda _: self.name)
        self.texts = TrainingTexts.of(layers, groups, window.layers[:1])
        options = layers, self.hparams.lr, self.hparams.norm_constraint
        self.trained = {layer: Trained(layers.block(layer), *options) for layer in window.layers}

    def _beside(self, batching: Batching) -> Batching:
        """What memory is left for passes, beside the change, what is kept of all texts, and a minibatch's products."""
        rows = sorted(lesson.rows for lesson in self.lessons)
        held = self.of.change + sum(rows) * self.of.kept + sum(rows[-self.hparams.minibatch :]) * self.of.left
        return replace(batching, budget=replace(batching.budget, fixed=batching.budget.fixed + held))

    def _bytes(self, lesson: Lesson) -> int:
        return lesson.rows * (self.of.kept + self.of.passed)

    def run(self) -> tuple[np.ndarray, int]:
        """The loss of each lesson when it was last evaluated, and how many steps were taken."""
        hparams, steps = self.hparams, 0
        losses = np.full(len(self.lessons), np.nan)
        lowest = -np.inf if hparams.stop_loss is None else hparams.stop_loss
        order = torch.Generator().manual_seed(hparams.seed)
        for _ in range(hparams.epochs):
            for part in torch.randperm(len(self.lessons), generator=order).split(hparams.minibatch):
                minibatch = part.numpy()
                losses[minibatch] = self._evaluate(minibatch)
                loss = losses[minibatch].mean()
                if not np.isfinite(loss):
                    return losses, steps
                for trained in self.trained.values():
                    if loss < lowest:
                        trained.stay()
                    else:
                        trained.step()
                steps += bool(loss >= lowest)
            if losses.mean() < lowest:
                break
        return losses, steps

    def _evaluate(self, minibatch: np.ndarray) -> np.ndarray:
        """The loss of each lesson, in passes that fit; the gradients of their mean are left with the change."""
        numbers: list[int] = minibatch.tolist()
        groups = self.batching.of_items(numbers, lambda number: self._bytes(self.lessons[number]), lambda _: self.name)
        return np.concatenate([self._pass(group).evaluate(1 / len(numbers)) for group in groups])

    def _pass(self, lessons: Sequence[int]) -> TrainingPass:
        return TrainingPass(self.texts, lessons, [self.trained], np.zeros(len(lessons), dtype=np.int64), mean=True)


def _flops(work: EditWork, hparams: LocftHparams) -> float:
    draws = hparams.noise_samples if work.noisy else 1
    ends = work.searched.requests
    rows, read = draws * (work.trained.rows + ends), draws * (work.trained.read + ends)
    return sum(work.flops.finetune(rows, read, [window], hparams.epochs) for window in work.windows)


LOCFT = Method(
    name="locft",
    hparams=LocftHparams,
    build=JointFinetune,
    flops=_flops,
    window=1,
    joint=True,
    rank=None,
    grid={"lr": (1e-4, 2e-4, 5e-4)},
)
