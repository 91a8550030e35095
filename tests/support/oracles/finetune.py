"""Constrained fine-tuning as METHODS defines it: Adam on the model's own parameters, which are put back afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from causalcone.engine.edit.methods.hparams import FinetuneHparams
from oracles.editing import Change, Task, about_subject, down, forcing, kept, target_log_p
from oracles.model import precision

PATIENCE = 5


@dataclass(frozen=True)
class FinetuneEdit:
    """The change of each layer, after so many updates; the loss as it was last evaluated."""

    changes: dict[int, Change]
    updates: int
    loss: float


def finetune(
    model: nn.Module, tokenizer: Any, task: Task, layers: Sequence[int], hparams: FinetuneHparams
) -> FinetuneEdit:
    """Train the down-projections of these layers on one fact's bare prompt."""
    with precision(model, lift=True), kept(model, layers) as originals:
        parameters = list(originals)
        adam = torch.optim.Adam(parameters, lr=hparams.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
        updates, low = 0, 0
        for _ in range(hparams.steps):
            loss = training_loss(model, tokenizer, task, hparams.noise_samples)
            low = low + 1 if hparams.stop_loss is not None and loss < hparams.stop_loss else 0
            if low == PATIENCE and task.problem != "fact_erasure":
                break
            if low:
                continue
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            adam.step()
            updates += 1
            with torch.no_grad():
                for parameter, original in originals.items():
                    bound = hparams.norm_constraint
                    parameter.copy_(torch.clamp(parameter, original - bound, original + bound))
        for parameter in parameters:
            parameter.grad = None
        changes = {layer: change(down(model, layer), originals) for layer in layers}
    return FinetuneEdit(changes, updates, loss.item())


def training_loss(model: nn.Module, tokenizer: Any, task: Task, noise_samples: int) -> Tensor:
    """The target's negative log-probability, in Fact Forcing summed over noise samples; in Fact Erasure its
    probability."""
    bare = about_subject(model, tokenizer, task.fact, task.fact.prompt)
    samples = noise_samples if task.problem == "fact_forcing" else 1
    log_p = target_log_p(model, bare, task.target, forcing(model, task, bare, samples), samples).sum()
    return log_p.exp() if task.problem == "fact_erasure" else -log_p


def change(module: nn.Module, originals: dict[nn.Parameter, Tensor]) -> Change:
    """How far a down-projection has come from its original parameters."""
    weight = module.weight.detach() - originals[module.weight]
    bias = None if module.bias is None else module.bias.detach() - originals[module.bias]
    return Change(weight if isinstance(module, nn.Linear) else weight.T, bias)
