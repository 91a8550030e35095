"""ROME: a rank-one change of one layer, which maps the subject's key to a value that says the target (Meng et al.
2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, LowRank
from causalcone.engine.edit.methods.edits import Edit, edit_of
from causalcone.engine.edit.methods.hparams import RomeHparams
from causalcone.engine.edit.methods.method import EditableModel, Method
from causalcone.engine.edit.methods.value_search import EditObjective, FoundValue
from causalcone.engine.edit.requests.prompts import EditTask
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window


@dataclass(frozen=True)
class Rome:
    """The method on a model."""

    model: EditableModel
    hparams: RomeHparams

    def batches(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[list[Edit]]:
        """An edit of each request at each layer, request by request, in batches of those made together."""
        batching, layers = self.model.batching, [window.layer for window in windows]
        groups = batching.of_tasks(self.model.tasks(requests), layers)
        return (batching.run(group, lambda tasks: self._batch(tasks, windows)) for group in groups)

    @torch.inference_mode(False)
    def _batch(self, tasks: Sequence[EditTask], windows: Sequence[Window]) -> list[Edit]:
        self.model.layers.forget()
        layers = [window.layer for window in windows]
        objective = EditObjective.of(tasks)
        keys_of = {("keys", layer): objective.prompts.lookups for layer in layers}
        search = objective.search(self.model.layers, layers, "values", self.hparams, keys_of)
        wanted = [(number, layer) for number in range(len(tasks)) for layer in layers]
        values = dict(self.model.batching.of_vectors(wanted, search))
        by_window = []
        for window in windows:
            keys = search.unedited.rows["keys", window.layer]
            means = torch.stack([keys[list(goal.contexts)].double().mean(0) for goal in search.goals])
            directions = self.model.solve(window.layer, means.T).T.to(keys.device)
            by_window.append(
                [
                    _edit(task, window, values[number, window.layer], keys[goal.contexts[0]].double(), direction)
                    for number, (task, goal, direction) in enumerate(zip(tasks, search.goals, directions, strict=True))
                ]
            )
        self.model.layers.forget()
        return [edit for edits in zip(*by_window, strict=True) for edit in edits]


def _edit(task: EditTask, window: Window, value: FoundValue, key: Tensor, direction: Tensor) -> Edit:
    delta = None if value.reason else Delta({window.layer: rank_one(key, value.delta, direction)})
    return edit_of(
        task.request, ROME.name, window, steps=value.steps, loss=value.loss, delta=delta, reason=value.reason
    )


def rank_one(key: Tensor, delta: Tensor, direction: Tensor) -> LowRank:
    """The change that adds delta (hidden,) to the value of a key (inner,), along C^-1 k* (inner,), in delta's dtype."""
    u = direction / direction.norm()
    weight = delta.double() / (key @ u)
    return LowRank(weight[:, None].to(delta.dtype), u[:, None].to(delta.dtype))


ROME = Method(
    name="rome",
    hparams=RomeHparams,
    build=Rome,
    flops=lambda work, hparams: work.flops.rome(work.searched, [layer for (layer,) in work.windows], hparams.steps),
    needs_moments=True,
    contexts="rome",
    grid={"kl_factor": (0.0625, 0.9, 1.0)},
)
