"""MEMIT-Merge (Dong et al. 2025, arXiv 2502.07322): requests of one subject, whose keys are the same, share one
vector."""

from collections.abc import Sequence
from dataclasses import dataclass

from causalcone.engine.edit.methods.closed_forms.memit import MEMIT_JOINT, Memit
from causalcone.engine.edit.methods.closed_forms.spread import spread_method
from causalcone.engine.edit.methods.hparams import MemitHparams
from causalcone.engine.edit.requests.prompts import EditTask


@dataclass(frozen=True)
class MemitMerge(Memit):
    together: bool = True

    def joined(self, tasks: Sequence[EditTask]) -> Sequence[EditTask]:
        groups: dict[object, list[EditTask]] = {}
        for task in tasks:
            request = task.request
            groups.setdefault((request.fact.subject, request.problem, request.sigma), []).append(task)
        return [EditTask.merged(group) for group in groups.values()]


MEMIT_MERGE = spread_method(
    "memit-merge", MemitMerge, MemitHparams, joint=True, flops=MEMIT_JOINT.flops, history=False, preset_name="memit"
)
