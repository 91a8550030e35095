"""ROME: a rank-one change of one layer, which maps the subject's key to a value that says the target (Meng et al.
2022); with keys of one kind throughout, R-ROME and p-ROME (Gupta et al. 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, LowRank
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.methods.hparams import RomeHparams
from causalcone.engine.edit.methods.method import Method, VectorMethod
from causalcone.engine.edit.methods.value_search import EditObjective, FoundValue, Goal, ValueOptimizer
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.frozen_prefix import Wanted


@dataclass(frozen=True)
class Rome(VectorMethod):
    site = "values"

    hparams: RomeHparams

    def more(self, objective: EditObjective, windows: Sequence[Window]) -> Wanted:
        return {("keys", window.layer): objective.prompts.lookups for window in windows}

    def edits(
        self, requests: Sequence[Request], window: Window, search: ValueOptimizer, values: Sequence[FoundValue]
    ) -> list[Edit]:
        seen, goals = search.unedited.rows, search.objective.goals
        bare, mean = _bare_and_mean(seen["keys", window.layer], goals)
        own, usual = _bare_and_mean(seen["values", window.layer], goals)
        choices = {"published": (mean, bare, own), "mean": (mean, mean, usual), "prompt": (bare, bare, own)}
        along, key, given = choices[self.hparams.keys]
        solved = self.model.solve(window.layer, along.T).T.to(key.device)
        u = solved / solved.norm(dim=1, keepdim=True)
        reached, normal = (key * u).sum(1), (along * u).sum(1)
        edits = []
        for n, (request, value) in enumerate(zip(requests, values, strict=True)):
            missing = value.delta.double() + (own[n] - given[n])
            change = LowRank((missing / reached[n])[:, None], u[n, :, None]).to(value.delta.device, value.delta.dtype)
            edit = value.edit(request, ROME.name, window, None if value.reason else Delta({window.layer: change}))
            edits.append(replace(edit, key_alignment=(reached[n] / normal[n]).item()))
        return edits


def _bare_and_mean(rows: Tensor, goals: Sequence[Goal]) -> tuple[Tensor, Tensor]:
    """Of each goal's rows in float64 (goals, width): that of the bare prompt, and the mean over all contexts."""
    bare = torch.stack([rows[goal.contexts[0]] for goal in goals]).double()
    return bare, torch.stack([rows[list(goal.contexts)].double().mean(0) for goal in goals])


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
