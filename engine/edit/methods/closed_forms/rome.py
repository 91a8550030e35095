"""ROME: a rank-one change of one layer, which maps the subject's key to a value that says the target (Meng et al.
2022); with keys of one kind throughout, R-ROME and p-ROME (Gupta et al. 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, LowRank
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.methods.hparams import RomeHparams
from causalcone.engine.edit.methods.least_squares import LeastSquares, MomentMetric
from causalcone.engine.edit.methods.method import Found, Method, Turns, VectorMethod
from causalcone.engine.edit.methods.value_search import EditObjective, Goal
from causalcone.engine.edit.requests.prompts import EditTask
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.frozen_prefix import Wanted


@dataclass(frozen=True)
class Rome(VectorMethod):
    site = "values"

    hparams: RomeHparams

    def more(self, objective: EditObjective, windows: Sequence[Window]) -> Wanted:
        lookups = objective.prompts.lookups
        return {(name, window.layer): lookups for window in windows for name in ("keys", "values")}

    def held(self, task: EditTask, windows: Sequence[Window]) -> int:
        """Two keys and two values, in float64, of each layer."""
        sizes = self.model.batching.sizes
        return len(windows) * 16 * (sizes.inner + sizes.hidden)

    def edits(self, window: Window, found: Found) -> Turns[list[Edit]]:
        goals, requests, values = found.objective.goals, found.requests, found.at(window)
        bare, mean = _bare_and_mean(found.rows["keys", window.layer], goals)
        own, usual = _bare_and_mean(found.rows["values", window.layer], goals)
        del found  # all contexts' rows
        choices = {"published": (mean, bare, own), "mean": (mean, mean, usual), "prompt": (bare, bare, own)}
        along, key, given = choices[self.hparams.keys]
        yield window.layer
        missing = torch.stack([value.delta for value in values]).double() + (own - given)
        problem = LeastSquares(MomentMetric(self.model.second_moments), slack=0.0)
        left, right = problem.each(window.layer, along, missing, reaching=key)
        edits, alignments = [], ((key * right).sum(1) / (along * right).sum(1)).tolist()
        for n, (request, value) in enumerate(zip(requests, values, strict=True)):
            change = LowRank(left[n, :, None], right[n, :, None]).to(value.delta.device, value.delta.dtype)
            edit = value.edit(request, ROME.name, window, None if value.reason else Delta({window.layer: change}))
            edits.append(replace(edit, key_alignment=alignments[n]))
        return edits


def _bare_and_mean(rows: Tensor, goals: Sequence[Goal]) -> tuple[Tensor, Tensor]:
    """Of each goal's rows in float64 (goals, width): that of the bare prompt, and the mean over all contexts."""
    bare = torch.stack([rows[goal.contexts[0]] for goal in goals]).double()
    return bare, torch.stack([rows[goal.contexts[0] : goal.essence].double().mean(0) for goal in goals])


ROME = Method(
    name="rome",
    hparams=RomeHparams,
    build=Rome,
    flops=lambda work, hparams: work.flops.rome(work.searched, [layer for (layer,) in work.windows], hparams.steps),
    needs_moments=True,
    contexts="rome",
    grid={"kl_factor": (0.0625, 0.9, 1.0)},
    aliases={"r-rome": {"keys": "mean"}, "p-rome": {"keys": "prompt"}},
)
