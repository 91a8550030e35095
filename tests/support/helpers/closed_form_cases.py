"""What tests of closed forms share: every method with hyperparameters, and the plain edits that they are to make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracles import closed_forms
from oracles.closed_forms import Batch, Form

import causalcone as cc
from causalcone.engine.edit.methods.closed_forms.alphaedit import AlphaEditHparams
from causalcone.engine.edit.methods.closed_forms.emmet import EmmetHparams
from causalcone.engine.edit.methods.closed_forms.encore import EncoreHparams
from causalcone.engine.edit.methods.hparams import ValueHparams
from causalcone.engine.edit.requests.requests import Request
from helpers.editing_cases import ERASURE, FORCING, INJECTION, REVERSAL, START, error, request, task, weight
from helpers.models import tokenizer

SEARCH: dict[str, Any] = {"steps": 3, "stop_loss": None}
AGAIN = request(replace(START, id="again", prompt="All know that {} is from", target_new="Rome"))
REQUESTS = (INJECTION, ERASURE, AGAIN, FORCING, REVERSAL)
"""The first and the third are about one subject."""


@dataclass(frozen=True)
class Case:
    """A method with hyperparameters, the layers that it edits, and what it solves, with all layers' moments."""

    method: str
    hparams: ValueHparams
    form: Callable[[dict[int, torch.Tensor]], Form]
    layers: tuple[int, ...] = (0, 1)
    history: bool = True
    grouping: closed_forms.Grouping = closed_forms.alone

    @property
    def listed(self) -> list[Any]:
        """The layers as ``Editor`` takes them."""
        return [self.layers] if self.method != "emmet" else list(self.layers)

    def changed(self, **hparams: Any) -> Case:
        return replace(self, hparams=replace(self.hparams, **hparams))

    def sequence(self, editor: cc.Editor, requests: Sequence[Request], size: int, **options: Any) -> Any:
        return editor.sequence(requests, self.method, self.listed, hparams=self.hparams, batch=size, **options)

    def plain(
        self, model: Any, moments: cc.Moments, batches: Sequence[Sequence[Request]], contexts: Sequence[str]
    ) -> list[Batch]:
        """The plain batches, each on the model that those before it left."""
        tasks = [list(map(task, batch)) for batch in batches]
        form = self.form({layer: moments.matrix(layer) for layer in moments.layers})
        options = {"grouping": self.grouping, "history": self.history}
        return closed_forms.in_sequence(model, tokenizer(), tasks, contexts, self.layers, form, self.hparams, **options)


def alphaedit(rule: str, value: float, ridge: float = 4.0) -> Case:
    hparams = AlphaEditHparams(**SEARCH, ridge=ridge, null_space=value, null_space_by=rule)

    def form(moments: dict[int, torch.Tensor]) -> Form:
        spaces = {layer: closed_forms.null_space(moment, rule, value) for layer, moment in moments.items()}
        return closed_forms.projected(spaces, ridge)

    return Case("alphaedit", hparams, form)


MEMIT = cc.MemitHparams(**SEARCH, covariance_weight=5.0)
CASES = {
    "memit": Case("memit", MEMIT, lambda moments: closed_forms.regularised(moments, 5.0), history=False),
    "memit-seq": Case("memit-seq", MEMIT, lambda moments: closed_forms.regularised(moments, 5.0)),
    "memit-merge": Case(
        "memit-merge",
        MEMIT,
        lambda moments: closed_forms.regularised(moments, 5.0),
        history=False,
        grouping=closed_forms.by_subject,
    ),
    "emmet": Case(
        "emmet",
        EmmetHparams(**SEARCH, covariance_weight=5.0, slack=0.3),
        lambda moments: closed_forms.constrained(moments, 5.0, 0.3),
        layers=(1,),
        history=False,
    ),
    "encore": Case(
        "encore",
        EncoreHparams(**SEARCH, covariance_weight=5.0, norm_weight=3.0, patience=1),
        lambda moments: closed_forms.regularised(moments, 5.0, 3.0),
    ),
    "alphaedit": alphaedit("eigenvalue", 1.0),
}


def parts(requests: Sequence[Request], size: int) -> list[Sequence[Request]]:
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def assert_plain(delta: cc.Delta | None, expected: Batch, within: float) -> None:
    """A batch's change of every layer is the plain one, and there is one."""
    assert delta is not None
    assert delta.layers == tuple(expected.changes)
    for layer, change in expected.changes.items():
        assert change.weight.norm() > 1e-4
        assert error(weight(delta, layer), change.weight) < within, layer
