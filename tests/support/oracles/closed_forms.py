"""Closed forms of editing, in sequences: one search at a time, dense matrices, and every batch written into a copy of
the model before the next is begun."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from causalcone.engine.edit.methods.hparams import ValueHparams
from oracles.editing import (
    Change,
    Prompt,
    Task,
    about_subject,
    at_lookup,
    down_weight,
    forcing,
    run,
    training_prompts,
)
from oracles.memit import mean_key
from oracles.model import Site, precision, sites
from oracles.rome import Optimum, descend, loss_function

Form = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""The change (hidden, inner) of a layer, from its keys K (inner, n), what they are to give more R (hidden, n), and the
sum H (inner, inner) of k k^T over the keys of earlier batches."""

Grouping = Callable[[Sequence[Task]], list[list[Task]]]
"""Which tasks of a batch share a vector; keys are those of each group's first."""


@dataclass(frozen=True)
class Batch:
    """How each vector was found; by layer the keys (inner, n), what they were to give more (hidden, n), and the
    change."""

    optima: list[Optimum]
    keys: dict[int, Tensor]
    residuals: dict[int, Tensor]
    changes: dict[int, Change]


def regularised(moments: Mapping[int, Tensor], weight: float, ridge: float = 0.0) -> Form:
    """R K^T (weight C + ridge I + H + K K^T)^-1: MEMIT, and with a ridge ENCORE."""

    def change(layer: int, K: Tensor, R: Tensor, H: Tensor) -> Tensor:
        kept = weight * moments[layer].double() + ridge * torch.eye(len(K), dtype=torch.float64) + H
        return torch.linalg.solve(kept + K @ K.T, K @ R.T).T

    return change


def constrained(moments: Mapping[int, Tensor], weight: float, slack: float) -> Form:
    """R (K^T C^-1 K)^-1 K^T C^-1 with weight C for C, and with slack added to the diagonal for several keys: EMMET."""

    def change(layer: int, K: Tensor, R: Tensor, H: Tensor) -> Tensor:
        directions = torch.linalg.solve(weight * moments[layer].double() + H, K)
        D = K.T @ directions + (slack if K.shape[1] > 1 else 0.0) * torch.eye(K.shape[1], dtype=torch.float64)
        return R @ torch.linalg.inv(D) @ directions.T

    return change


def projected(projectors: Mapping[int, Tensor], ridge: float) -> Form:
    """X^T with (P (K K^T + H) + ridge I) X = P K R^T: AlphaEdit."""

    def change(layer: int, K: Tensor, R: Tensor, H: Tensor) -> Tensor:
        P = projectors[layer]
        return torch.linalg.solve(P @ (K @ K.T + H) + ridge * torch.eye(len(K), dtype=torch.float64), P @ K @ R.T).T

    return change


def null_space(moment: Tensor, rule: str, value: float) -> Tensor:
    """P (inner, inner) onto the eigenvectors of a moment whose eigenvalues are below ``value``, or onto its ``value``
    smallest ones, or onto as many small ones as together have at most a share ``value`` of the trace."""
    sizes, vectors = torch.linalg.eigh(moment.double())
    inside = torch.zeros(len(sizes), dtype=torch.bool)
    held = 0.0
    for number, size in enumerate(sizes.tolist()):
        held += size
        inside[number] = {
            "eigenvalue": size < value,
            "rank": number < value,
            "share": held <= value * float(moment.trace()),
        }[rule]
    return vectors[:, inside] @ vectors[:, inside].T


def alone(tasks: Sequence[Task]) -> list[list[Task]]:
    """Every task has its own vector."""
    return [[task] for task in tasks]


def by_subject(tasks: Sequence[Task]) -> list[list[Task]]:
    """The tasks of a problem about one subject share theirs."""
    groups: dict[tuple[str, str, float], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.fact.subject, task.problem, task.sigma), []).append(task)
    return list(groups.values())


def in_sequence(
    model: nn.Module,
    tokenizer: Any,
    batches: Sequence[Sequence[Task]],
    contexts: Sequence[str],
    layers: Sequence[int],
    form: Form,
    hparams: ValueHparams,
    grouping: Grouping = alone,
    history: bool = True,
) -> list[Batch]:
    """Edit the layers batch after batch."""
    edited = copy.deepcopy(model)
    inner = down_weight(model, layers[0]).shape[1]
    past = {layer: torch.zeros(inner, inner, dtype=torch.float64) for layer in layers}
    made = []
    for tasks in batches:
        with precision(edited, lift=True):
            made.append(edit(edited, tokenizer, grouping(tasks), contexts, layers, form, past, hparams))
            for layer in layers if history else ():  # the keys of the model as it is now
                for first, *_ in grouping(tasks):
                    key = mean_key(edited, tokenizer, first, contexts, layer)
                    past[layer] += torch.outer(key, key)
    return made


def edit(
    model: nn.Module,
    tokenizer: Any,
    groups: Sequence[Sequence[Task]],
    contexts: Sequence[str],
    layers: Sequence[int],
    form: Form,
    past: Mapping[int, Tensor],
    hparams: ValueHparams,
) -> Batch:
    """Write one batch into the model, layer by layer."""
    last = layers[-1]
    batch = Batch([search(model, tokenizer, group, contexts, last, hparams) for group in groups], {}, {}, {})
    firsts = [group[0] for group in groups]
    for i, layer in enumerate(layers):
        K = torch.stack([mean_key(model, tokenizer, task, contexts, layer) for task in firsts], dim=1)
        missing = []
        for task, optimum in zip(firsts, batch.optima, strict=True):
            bare = about_subject(model, tokenizer, task.fact, task.fact.prompt)
            h = at_lookup(model, task, bare, sites(model)[last]["hidden"])
            missing.append(optimum.start.double() + optimum.delta.double() - h.double())
        R = torch.stack(missing, dim=1) / (len(layers) - i)
        batch.keys[layer], batch.residuals[layer] = K, R
        batch.changes[layer] = Change(form(layer, K, R, past[layer]))
        down_weight(model, layer).add_(batch.changes[layer].weight)
    return batch


def search(
    model: nn.Module,
    tokenizer: Any,
    group: Sequence[Task],
    contexts: Sequence[str],
    layer: int,
    hparams: ValueHparams,
) -> Optimum:
    """The vector that, added to a layer's output, makes the model say what all tasks of a group want."""
    site, first = sites(model)[layer]["hidden"], group[0]
    bare = about_subject(model, tokenizer, first.fact, first.fact.prompt)
    start = at_lookup(model, first, bare, site)
    losses = [loss_function(model, tokenizer, task, contexts, site, start, hparams) for task in group]
    prompts = [(task, prompt) for task in group for prompt in training_prompts(model, tokenizer, task.fact, contexts)]

    def objective(delta: Tensor) -> Tensor:
        return torch.stack([loss(delta) for loss in losses]).mean()  # equally many prompts each, one divergence

    def reached(delta: Tensor) -> bool:
        return first.problem != "fact_erasure" and all(
            says(model, task, prompt, site, delta) for task, prompt in prompts
        )

    patience = getattr(hparams, "patience", None)
    early = () if patience is None else (reached, patience)
    optimum = descend(start, objective, hparams, False, *early)
    value = at_lookup(model, first, bare, sites(model)[layer]["mlp"])
    return anchored(optimum, value, hparams.norm_anchor)


@torch.no_grad()
def says(model: nn.Module, task: Task, prompt: Prompt, site: Site, delta: Tensor) -> bool:
    """Whether each of the target's tokens is the likeliest with a vector added at the lookup."""

    def add(values: Tensor) -> None:
        values[:, prompt.lookup] += delta

    log_p = run(model, [*prompt.ids, *task.target[:-1]], [*forcing(model, task, prompt), (site, add)])
    return log_p[0, len(prompt.ids) - 1 :].argmax(dim=1).tolist() == list(task.target)


def anchored(optimum: Optimum, value: Tensor, anchor: float | None) -> Optimum:
    """The vector that takes a value of the MLP (hidden,) to a norm, or none where it is to be more than twice as long:
    NAS."""
    if anchor is None:
        return optimum
    wanted = value + optimum.delta
    norm = float(wanted.norm())
    delta = torch.zeros_like(value) if norm > 2 * anchor else wanted * anchor / norm - value
    return Optimum(optimum.start, delta, optimum.updates, optimum.loss)
