"""ROME: a rank-one change of one layer, which maps the subject's key to a value that says the target (Meng et al.
2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, LowRank
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.methods.hparams import RomeHparams
from causalcone.engine.edit.methods.method import Method, VectorMethod
from causalcone.engine.edit.methods.value_search import EditObjective, FoundValue, ValueOptimizer
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.frozen_prefix import Wanted


class Rome(VectorMethod):
    site = "values"

    def more(self, objective: EditObjective, windows: Sequence[Window]) -> Wanted:
        return {("keys", window.layer): objective.prompts.lookups for window in windows}

    def edits(
        self, requests: Sequence[Request], window: Window, search: ValueOptimizer, values: Sequence[FoundValue]
    ) -> list[Edit]:
        keys, goals = search.unedited.rows["keys", window.layer], search.objective.goals
        means = torch.stack([keys[list(goal.contexts)].double().mean(0) for goal in goals])
        directions = self.model.solve(window.layer, means.T).T.to(keys.device)
        edits = []
        for request, goal, value, direction in zip(requests, goals, values, directions, strict=True):
            change = None if value.reason else rank_one(keys[goal.contexts[0]].double(), value.delta, direction)
            edits.append(
                value.edit(request, ROME.name, window, None if change is None else Delta({window.layer: change}))
            )
        return edits


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
