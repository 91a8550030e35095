"""MEMIT as METHODS defines it, for one fact or several at once: each layer is changed before the next is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from causalcone.engine.edit.methods.hparams import MemitHparams
from oracles.editing import Change, Task, about_subject, at_lookup, changed, key_site, training_prompts
from oracles.model import precision, sites
from oracles.rome import Optimum, optimise


@dataclass(frozen=True)
class MemitEdit:
    """For each fact how its z was found: z is ``start + delta``. For each layer its keys (inner, n) and residuals
    (hidden, n), seen with the layers before it changed, and its change."""

    optima: list[Optimum]
    keys: dict[int, Tensor]
    residuals: dict[int, Tensor]
    changes: dict[int, Change]


def memit(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    contexts: Sequence[str],
    layers: Sequence[int],
    moments: Mapping[int, Tensor],
    hparams: MemitHparams,
) -> MemitEdit:
    """Edit all facts into the same layers, whose keys have these second moments (inner, inner)."""
    edit = MemitEdit([], {}, {}, {})
    with precision(model, lift=True):
        last = sites(model)[layers[-1]]["hidden"]
        for task in tasks:
            edit.optima.append(optimise(model, tokenizer, task, contexts, last, hparams))
        for i, layer in enumerate(layers):
            with changed(model, edit.changes):
                K = torch.stack([mean_key(model, tokenizer, task, contexts, layer) for task in tasks], dim=1)
                bare = [about_subject(model, tokenizer, task.fact, task.fact.prompt) for task in tasks]
                h = [at_lookup(model, task, prompt, last) for task, prompt in zip(tasks, bare, strict=True)]
            missing = [
                optimum.start.double() + optimum.delta.double() - now.double()
                for optimum, now in zip(edit.optima, h, strict=True)
            ]
            R = torch.stack(missing, dim=1) / (len(layers) - i)
            edit.keys[layer], edit.residuals[layer] = K, R
            edit.changes[layer] = Change(spread(K, R, moments[layer], hparams.covariance_weight))
    return edit


def mean_key(model: nn.Module, tokenizer: Any, task: Task, contexts: Sequence[str], layer: int) -> Tensor:
    """The mean (inner,) of the bare prompt's key and of the mean key after contexts, in float64."""
    prompts = training_prompts(model, tokenizer, task.fact, contexts)
    bare, *others = [at_lookup(model, task, prompt, key_site(model, layer)).double() for prompt in prompts]
    return bare / 2 + torch.stack(others).mean(dim=0) / 2 if others else bare


def spread(K: Tensor, R: Tensor, moment: Tensor, weight: float) -> Tensor:
    """R K^T (weight C + K K^T)^-1, the change (hidden, inner) for keys (inner, n) and residuals (hidden, n)."""
    normal = weight * moment.double() + K @ K.T
    return torch.linalg.solve(normal, K @ R.T).T
