"""Fine-tuning as METHODS defines it: Adam on the model's own parameters, which are put back afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from causalcone.engine.edit.methods.hparams import FinetuneHparams, LocftHparams
from oracles.editing import Change, Task, about_subject, down, forcing, kept, target_log_p
from oracles.model import precision

PATIENCE = 5


@dataclass(frozen=True)
class FinetuneEdit:
    """The change of each layer, after so many updates; the loss as it was last evaluated."""

    changes: dict[int, Change]
    updates: int
    loss: float


@dataclass(frozen=True)
class JointEdit:
    """The change of each layer that all tasks share; their losses as they were last evaluated."""

    changes: dict[int, Change]
    updates: int
    losses: list[float]


def finetune(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    layers: Sequence[int],
    hparams: FinetuneHparams,
    mean: bool = False,
) -> FinetuneEdit:
    """Train the down-projections of these layers on one fact's bare prompt; mean: by the mean over target tokens."""
    with precision(model, lift=True), kept(model, layers) as originals:
        parameters = list(originals)
        adam = torch.optim.Adam(parameters, lr=hparams.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
        updates, low = 0, 0
        for _ in range(hparams.steps):
            loss = training_loss(model, tokenizer, task, hparams.noise_samples, mean)
            low = low + 1 if hparams.stop_loss is not None and loss < hparams.stop_loss else 0
            if low == PATIENCE and task.problem != "fact_erasure":
                break
            if low:
                continue
            update(adam, loss, originals, hparams.norm_constraint)
            updates += 1
        changes = {layer: change(down(model, layer), originals) for layer in layers}
    return FinetuneEdit(changes, updates, loss.item())


def finetune_joint(
    model: nn.Module, tokenizer: Any, tasks: Sequence[Task], layers: Sequence[int], hparams: LocftHparams
) -> JointEdit:
    """Train the down-projections of these layers on all facts, minibatch by minibatch, towards targets that end."""
    end = tokenizer.eos_token_id
    ended = [t if t.problem == "fact_erasure" else replace(t, target=(*t.target, end)) for t in tasks]
    losses, updates = [0.0] * len(tasks), 0
    with precision(model, lift=True), kept(model, layers) as originals:
        adam = torch.optim.Adam(list(originals), lr=hparams.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
        order = torch.Generator().manual_seed(hparams.seed)
        for _ in range(hparams.epochs):
            shuffled = torch.randperm(len(tasks), generator=order).tolist()
            for first in range(0, len(tasks), hparams.minibatch):
                batch = shuffled[first : first + hparams.minibatch]
                each = [training_loss(model, tokenizer, ended[i], hparams.noise_samples, mean=True) for i in batch]
                for number, loss in zip(batch, each, strict=True):
                    losses[number] = loss.item()
                loss = torch.stack(each).mean()
                if hparams.stop_loss is None or loss >= hparams.stop_loss:
                    update(adam, loss, originals, hparams.norm_constraint)
                    updates += 1
            if hparams.stop_loss is not None and sum(losses) / len(losses) < hparams.stop_loss:
                break
        changes = {layer: change(down(model, layer), originals) for layer in layers}
    return JointEdit(changes, updates, losses)


def update(adam: torch.optim.Adam, loss: Tensor, originals: dict[nn.Parameter, Tensor], bound: float | None) -> None:
    """One step of Adam down the loss; then no element is further than ``bound`` from its original."""
    parameters = list(originals)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    adam.step()
    for parameter, original in originals.items():
        parameter.grad = None
        if bound is not None:
            parameter.detach().copy_(torch.clamp(parameter.detach(), original - bound, original + bound))


def training_loss(model: nn.Module, tokenizer: Any, task: Task, noise_samples: int, mean: bool = False) -> Tensor:
    """The target's negative log-probability, summed over its tokens and, in Fact Forcing, over noise samples; mean: the
    mean over both. In Fact Erasure the probability that goes with it."""
    bare = about_subject(model, tokenizer, task.fact, task.fact.prompt)
    samples = noise_samples if task.problem == "fact_forcing" else 1
    of_tokens = target_log_p(model, bare, task.target, forcing(model, task, bare, samples), samples)
    log_p = of_tokens.mean() if mean else of_tokens.sum()
    return log_p.exp() if task.problem == "fact_erasure" else -log_p


def change(module: nn.Module, originals: dict[nn.Parameter, Tensor]) -> Change:
    """How far a down-projection has come from its original parameters."""
    weight = module.weight.detach() - originals[module.weight]
    bias = None if module.bias is None else module.bias.detach() - originals[module.bias]
    return Change(weight if isinstance(module, nn.Linear) else weight.T, bias)
