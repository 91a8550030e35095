"""An edit: what one method made of one request at one layer or window."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window

DONE, FAILED = "done", "failed"

LEAST_ALIGNMENT, LARGEST_NORM = 0.5, 2.0
"""Edits with a smaller key alignment, or a larger relative norm, are suspect (docs/editing.md, "Edits that break the
model")."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """layer: the one that is edited, or the centre of ``window`` layers; steps: updates taken; loss: the last
    evaluated; delta: the change of weights, None where the edit failed or was dropped; reason: why it failed; listed:
    the window's layers, where they were given one by one; key_alignment: the part along the edit's direction of the key
    that ROME solves for, over that of the key that the direction is of; relative_norm: delta_norm over the norm of the
    weights that it changes; suspect: why the edit is out of the ordinary, None where it is not."""

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
    key_alignment: float | None = None
    relative_norm: float | None = None
    suspect: str | None = None

    @property
    def edit_id(self) -> str:
        layers = "+".join(map(str, self.listed)) if self.listed else str(self.layer)
        return f"{self.fact_id}/{self.request.problem}/{self.method}-{self.window}/{layers}"

    @property
    def fact_id(self) -> str:
        return self.request.fact.id

    @property
    def problem(self) -> str:
        return self.request.problem

    @property
    def status(self) -> str:
        return DONE if self.reason is None else FAILED

    def dropped(self) -> Edit:
        """The edit without its change of weights, once it is scored."""
        return replace(self, delta=None)


def suspicion(relative_norm: float, key_alignment: float | None, at_start: bool) -> str | None:
    """Why an edit is out of the ordinary, None where it is not; at_start: its lookup is the text's first token."""
    reasons = {
        "the subject ends at the text's first token, where attention sinks are": at_start,
        f"key_alignment below {LEAST_ALIGNMENT:g}": key_alignment is not None and key_alignment < LEAST_ALIGNMENT,
        f"relative_norm above {LARGEST_NORM:g}": relative_norm > LARGEST_NORM,
    }
    return "; ".join(reason for reason, given in reasons.items() if given) or None


def edit_of(
    request: Request,
    method: str,
    window: Window,
    *,
    steps: int,
    loss: float,
    delta: Delta | None = None,
    reason: str | None = None,
) -> Edit:
    """The edit of a request in a window; failed where there is a ``reason``, or its change of weights is not finite."""
    norm = None if delta is None or reason is not None else delta.norm
    if norm is None:
        reason = reason or "the change could not be computed"
    elif not math.isfinite(norm):
        norm, reason = None, "the change of weights is not finite"
    return Edit(
        request=request,
        method=method,
        layer=window.layer,
        window=window.size,
        steps=steps,
        loss=loss,
        delta=delta if reason is None else None,
        delta_norm=norm,
        reason=reason,
        listed=window.layers if window.listed else (),
    )
