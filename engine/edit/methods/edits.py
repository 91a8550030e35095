"""An edit: what one method made of one request at one layer or window."""

from __future__ import annotations

from dataclasses import dataclass, replace

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.methods.value_search import FoundValue
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window

DONE, FAILED = "done", "failed"

JOINT_MEMIT = "memit_joint"
"""The method of edits that share one change of weights."""


@dataclass(frozen=True, eq=False)
class Edit:
    """layer: the one that is edited, or the centre of ``window`` layers; steps: updates taken; loss: the last
    evaluated; delta: the change of weights, None where the edit failed or was dropped; reason: why it failed; listed:
    the window's layers, where they were given one by one."""

    request: Request
    method: str
    layer: int
    window: int
    steps: int
    loss: float
    delta: Delta | None
    delta_norm: float | None
    reason: str | None = None
    listed: tuple[int, ...] = ()

    @property
    def edit_id(self) -> str:
        """Names request, method, layer and window."""
        place = "+".join(map(str, self.listed)) if self.listed else str(self.layer)
        return f"{self.fact_id}/{self.request.problem}/{self.method}-{self.window}/{place}"

    @property
    def fact_id(self) -> str:
        return self.request.fact.id

    @property
    def problem(self) -> str:
        return self.request.problem

    @property
    def status(self) -> str:
        """``done`` or ``failed``."""
        return DONE if self.reason is None else FAILED

    def dropped(self) -> Edit:
        """The edit without its change of weights, once it is scored."""
        return replace(self, delta=None)


def made(request: Request, method: str, layer: int, window: int, steps: int, loss: float, delta: Delta) -> Edit:
    """A finished edit, which failed if its change of weights is not finite."""
    norm = delta.norm
    if norm != norm or norm == float("inf"):
        return failed(request, method, layer, window, steps, loss, "the change of weights is not finite")
    return Edit(request, method, layer, window, steps, loss, delta, norm)


def failed(request: Request, method: str, layer: int, window: int, steps: int, loss: float, reason: str | None) -> Edit:
    return Edit(request, method, layer, window, steps, loss, None, None, reason or "the change could not be computed")


@dataclass(frozen=True, eq=False)
class JointEdit:
    """One change of the model for several requests: delta, None where none of them found its vector; found: each
    request's vector, or the reason why it has none."""

    requests: tuple[Request, ...]
    window: Window
    found: tuple[FoundValue, ...]
    delta: Delta | None

    def edits(self) -> list[Edit]:
        """For each request an edit that holds the common change: what is scored and written."""
        listed = self.window.layers if self.window.listed else ()
        edits = []
        for request, each in zip(self.requests, self.found, strict=True):
            common = (request, JOINT_MEMIT, self.window.layer, self.window.size, each.steps, each.loss)
            if each.reason is not None or self.delta is None:
                edits.append(failed(*common, each.reason))
            else:
                edits.append(made(*common, self.delta))
        return [replace(edit, listed=listed) for edit in edits]
