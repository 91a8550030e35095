"""ROME as METHODS defines it, one fact at a time: autograd through the unmodified model, all weights frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from causalcone.engine.edit.methods.hparams import RomeHparams, ValueHparams
from oracles.editing import (
    Prompt,
    Task,
    about_subject,
    at_lookup,
    down,
    down_weight,
    forcing,
    key_site,
    run,
    target_log_p,
    training_prompts,
    value_site,
)
from oracles.model import Hook, Site, precision


@dataclass(frozen=True)
class Optimum:
    """A vector ``delta`` for what is ``start`` at the bare prompt's lookup; after so many updates; the loss as it was
    last evaluated."""

    start: Tensor
    delta: Tensor
    updates: int
    loss: float


@dataclass(frozen=True)
class RomeEdit:
    """v (hidden,) and k (inner,) at the lookup of the bare prompt, the mean key, and the change of the weight
    (hidden, inner), which is the outer product of Lambda and u; the key ``solved`` that Lambda takes from the value
    ``given`` to v*, and what it has along u over what the key that u is of has."""

    v: Tensor
    v_star: Tensor
    k: Tensor
    k_star: Tensor
    u: Tensor
    Lambda: Tensor
    weight: Tensor
    updates: int
    loss: float
    solved: Tensor
    given: Tensor
    alignment: float


def rome(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    contexts: Sequence[str],
    layer: int,
    moment: Tensor,
    hparams: RomeHparams,
) -> RomeEdit:
    """Edit one layer, whose keys have this second moment (inner, inner)."""
    with precision(model, lift=True):
        erasing = task.problem == "fact_erasure"
        optimum = optimise(model, tokenizer, task, contexts, value_site(model, layer), hparams, last_updates=erasing)
        prompts = training_prompts(model, tokenizer, task.fact, contexts)
        keys = [at_lookup(model, task, prompt, key_site(model, layer)).double() for prompt in prompts]
    v_star = (optimum.start + optimum.delta).double()
    k, k_star = keys[0], torch.stack(keys).mean(dim=0)
    of_u, solved = {"published": (k_star, k), "mean": (k_star, k_star), "prompt": (k, k)}[hparams.keys]
    direction = torch.linalg.solve(moment.double(), of_u)
    u = direction / direction.norm()
    bias = 0 if down(model, layer).bias is None else down(model, layer).bias.detach().double()
    given = down_weight(model, layer).double() @ solved + bias  # which is linear: the mean value has the mean key
    Lambda = (v_star - given) / (solved @ u)
    weight = torch.outer(Lambda, u)
    found = optimum.start, v_star, k, k_star, u, Lambda, weight, optimum.updates, optimum.loss
    return RomeEdit(*found, solved, given, float(solved @ u / (of_u @ u)))


def optimise(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    contexts: Sequence[str],
    site: Site,
    hparams: ValueHparams,
    last_updates: bool = False,
) -> Optimum:
    """Adam on the vector that is added at the site, begun from zero; ``last_updates``: the last step updates too."""
    bare = about_subject(model, tokenizer, task.fact, task.fact.prompt)
    start = at_lookup(model, task, bare, site)
    objective = loss_function(model, tokenizer, task, contexts, site, start, hparams)
    return descend(start, objective, hparams, last_updates)


def descend(
    start: Tensor,
    objective: Callable[[Tensor], Tensor],
    hparams: ValueHparams,
    last_updates: bool = False,
    reached: Callable[[Tensor], bool] | None = None,
    patience: int = 0,
) -> Optimum:
    """Adam on a vector that begins at zero; once it has ``reached`` what it is for, it takes ``patience`` more
    updates."""
    delta = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=hparams.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    updates, end = 0, None
    for step in range(hparams.steps):
        loss = objective(delta)
        if hparams.stop_loss is not None and loss < hparams.stop_loss:
            break
        if step == hparams.steps - 1 and not last_updates:
            break
        if end is None and reached is not None and reached(delta.detach()):
            end = updates + patience
        if updates == end:
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        adam.step()
        updates += 1
        with torch.no_grad():
            longest = hparams.clamp * start.norm()
            if delta.norm() > longest:
                delta *= longest / delta.norm()
    return Optimum(start, delta.detach(), updates, loss.item())


def loss_function(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    contexts: Sequence[str],
    site: Site,
    start: Tensor,
    hparams: ValueHparams,
) -> Callable[[Tensor], Tensor]:
    """What is minimised, as a function of the vector that is added to the site's output at every prompt's lookup."""
    prompts = training_prompts(model, tokenizer, task.fact, contexts)
    essence = about_subject(model, tokenizer, task.fact, "{} is a")

    def hooks(prompt: Prompt, delta: Tensor) -> list[Hook]:
        def add(values: Tensor) -> None:
            values[:, prompt.lookup] += delta

        return [*forcing(model, task, prompt), (site, add)]

    def nll(prompt: Prompt, delta: Tensor) -> Tensor:
        return -target_log_p(model, prompt, task.target, hooks(prompt, delta)).mean()

    def next_token(delta: Tensor) -> Tensor:
        return run(model, essence.ids, hooks(essence, delta))[0, essence.lookup]

    original = next_token(torch.zeros_like(start, requires_grad=True)).detach()

    def loss(delta: Tensor) -> Tensor:
        mean_nll = torch.stack([nll(prompt, delta) for prompt in prompts]).mean()
        target_loss = torch.exp(-mean_nll) if task.problem == "fact_erasure" else mean_nll
        kl = divergence(next_token(delta), original)
        return target_loss + hparams.kl_factor * kl + hparams.weight_decay * delta.norm() / start.norm() ** 2

    return loss


def divergence(edited: Tensor, original: Tensor) -> Tensor:
    """KL(edited || original) of two distributions given as log-probabilities.

    One minus the sum of all probabilities is nothing, but with it the gradient is exactly zero where the distributions
    are equal. Otherwise a vector that reaches nothing but this term would leave zero in a direction of rounding errors,
    from which Adam makes a long step.
    """
    p = edited.exp()
    return (p * (edited - original)).sum() + 1 - p.sum()
