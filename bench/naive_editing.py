"""Model editing the way published code works, to be timed against.

One edit at a time, on the model of transformers, with hooks and autograd: every step of every optimisation takes all
its sequences, padded to one length, through the whole model and computes the logits of all their tokens. Weights are
frozen but those that fine-tuning changes. Passes that only look at a module end there; published ones run on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack

import naive
import torch
from measure import synchronize
from naive_scoring import Probe, padded, score
from oracles.editing import Change, Prompt, about_subject, down, down_weight, kept, training_prompts
from oracles.model import Site, hooked, sites
from oracles.rome import divergence
from torch import Tensor, nn

from causalcone.engine.edit.methods.hparams import FinetuneHparams, MemitHparams, RomeHparams
from causalcone.engine.encoding import target_ids

ROME = (
    "for every fact and layer the keys of all contexts, then at every step one forward of all contexts and the essence "
    "prompt with all logits, and one backward to the vector; the inverse of the second moment computed beforehand"
)
MEMIT = (
    "for every fact and window at every step one forward of all contexts and the essence prompt with all logits, and "
    "one backward to the vector; then in each layer the keys, the state reached, and a dense solve in float64"
)
FINETUNE = (
    "for every fact and window at every step one forward of the prompt with all logits, and one backward to the weights"
)
PATIENCE = 5
"""So many losses in a row below the threshold end fine-tuning."""

Key = tuple[str, int]
"""Fact id and layer, the centre one of a window."""

Seeing = Callable[[Key, "Edit", float], None]
"""Told of each edit that was made and scored, and of the seconds that making it took; itself it is not timed."""


@dataclass(frozen=True)
class Edit:
    """changes: by layer; vector: v* or z (hidden,), None in fine-tuning; losses: of every step that was evaluated."""

    changes: dict[int, Change]
    vector: Tensor | None
    losses: list[float]


@dataclass(frozen=True)
class Timed:
    """An edit that was made and scored: its last loss, the norm of all its changes together, its probes, and what
    editing and scoring took."""

    loss: float
    norm: float
    probes: list[Probe]
    editing_seconds: float
    scoring_seconds: float


@dataclass(frozen=True)
class NaiveEdits:
    """What a study takes, by the part of it that was timed. edits: how many the whole study has."""

    edits: int
    timed: dict[Key, Timed] = field(default_factory=dict)

    @property
    def editing_seconds(self) -> float:
        """What making all edits takes, judged by those that were timed."""
        return self._projected([each.editing_seconds for each in self.timed.values()])

    @property
    def scoring_seconds(self) -> float:
        """What scoring all edits takes, judged by those that were timed."""
        return self._projected([each.scoring_seconds for each in self.timed.values()])

    def _projected(self, seconds: list[float]) -> float:
        return sum(seconds) / len(seconds) * self.edits


def measure_rome(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    layers: Sequence[int],
    contexts: Sequence[str],
    moments: Mapping[int, Tensor],
    hparams: RomeHparams,
    seeing: Seeing | None = None,
    **limits: Unpack[naive.Limits],
) -> NaiveEdits:
    """ROME on every fact at every layer."""
    inverses = {layer: inverse(moments[layer]).to(model.dtype) for layer in layers}

    def edit(fact: Any, layer: int) -> Edit:
        return rome(model, tokenizer, fact, layer, hparams, contexts, inverses[layer])

    return measure(model, tokenizer, facts, layers, edit, seeing, **limits)


def measure_memit(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    layers: Sequence[int],
    contexts: Sequence[str],
    moments: Mapping[int, Tensor],
    hparams: MemitHparams,
    window: int = 5,
    seeing: Seeing | None = None,
    **limits: Unpack[naive.Limits],
) -> NaiveEdits:
    """MEMIT on every fact, in the window about every layer."""

    def edit(fact: Any, layer: int) -> Edit:
        return memit(model, tokenizer, fact, about(model, layer, window), hparams, contexts, moments)

    return measure(model, tokenizer, facts, layers, edit, seeing, **limits)


def measure_finetune(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    layers: Sequence[int],
    hparams: FinetuneHparams,
    window: int = 1,
    seeing: Seeing | None = None,
    **limits: Unpack[naive.Limits],
) -> NaiveEdits:
    """Fine-tuning on every fact, of the window about every layer."""

    def edit(fact: Any, layer: int) -> Edit:
        return finetune(model, tokenizer, fact, about(model, layer, window), hparams)

    return measure(model, tokenizer, facts, layers, edit, seeing, **limits)


def measure(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    layers: Sequence[int],
    edit: Callable[[Any, int], Edit],
    seeing: Seeing | None = None,
    **limits: Unpack[naive.Limits],
) -> NaiveEdits:
    """Every fact edited at every layer and scored, or as many of these edits as the limits allow. Edits at one layer
    follow each other, so that an even sample has some of each."""

    def compute(fact: Any, layer: int) -> list[Timed]:
        began = time.perf_counter()
        made = edit(fact, layer)
        synchronize(model.device)
        edited = time.perf_counter()
        probes = score(model, tokenizer, fact, made.changes)
        scored = time.perf_counter()
        if seeing:
            seeing((fact.id, layer), made, edited - began)
        return [Timed(made.losses[-1], norm(made.changes), probes, edited - began, scored - edited)]

    work = [naive.Task([(fact.id, layer)], partial(compute, fact, layer)) for layer in layers for fact in facts]
    run = naive.timed(work, **limits)
    values: Any = run.p_patched  # here whatever the work computes
    return NaiveEdits(run.restorations, values)


def rome(
    model: Any,
    tokenizer: Any,
    fact: Any,
    layer: int,
    hparams: RomeHparams,
    contexts: Sequence[str],
    inverse_moment: Tensor,
) -> Edit:
    """The fact's new target written into one layer; ``inverse_moment`` (inner, inner) is that of the layer's keys."""
    prompts = training_prompts(model, tokenizer, fact, contexts)
    keys, _ = look(model, down(model, layer), prompts)
    direction = inverse_moment @ keys.mean(dim=0)
    direction /= direction.norm()
    vector, losses = find_vector(model, tokenizer, fact, Site(down(model, layer)), prompts, hparams)
    keys, values = look(model, down(model, layer), prompts[:1])
    update = torch.outer((vector - values[0]) / (keys[0] @ direction), direction)
    return Edit({layer: Change(update)}, vector, losses)


def memit(
    model: Any,
    tokenizer: Any,
    fact: Any,
    layers: Sequence[int],
    hparams: MemitHparams,
    contexts: Sequence[str],
    moments: Mapping[int, Tensor],
) -> Edit:
    """The fact's new target written into several layers; ``moments`` (inner, inner) are those of the layers' keys."""
    prompts = training_prompts(model, tokenizer, fact, contexts)
    state = sites(model)[layers[-1]]["hidden"]
    vector, losses = find_vector(model, tokenizer, fact, state, prompts, hparams)
    changes: dict[int, Change] = {}
    with kept(model, layers):
        for done, layer in enumerate(layers):
            keys, _ = look(model, down(model, layer), prompts)
            key = (keys[:1] + keys[1:].mean(dim=0)).double().T / 2
            _, reached = look(model, state.module, prompts[:1])
            residual = (vector - reached[0]).double() / (len(layers) - done)
            system = hparams.covariance_weight * moments[layer].double() + key @ key.T
            update = torch.outer(residual, torch.linalg.solve(system, key)[:, 0]).to(vector.dtype)
            down_weight(model, layer).add_(update)
            changes[layer] = Change(update)
    return Edit(changes, vector, losses)


def finetune(model: Any, tokenizer: Any, fact: Any, layers: Sequence[int], hparams: FinetuneHparams) -> Edit:
    """Weights and biases of several layers trained towards the fact's new target."""
    target = list(target_ids(fact.target_new, tokenizer))
    prompt = about_subject(model, tokenizer, fact, fact.prompt).ids
    inputs = padded(model, [prompt + target[:-1]])
    predicting = list(range(len(prompt) - 1, len(prompt) - 1 + len(target)))
    limit, losses, idle = hparams.norm_constraint, [], 0
    with kept(model, layers) as originals:
        required = {weight: weight.requires_grad for weight in originals}
        adam = torch.optim.Adam([weight.requires_grad_() for weight in originals], lr=hparams.lr)
        for _ in range(hparams.steps):
            logits = model(**inputs, use_cache=False).logits
            loss = -logits[0, predicting].log_softmax(dim=-1)[range(len(target)), target].sum()
            losses.append(loss.item())
            idle = idle + 1 if hparams.stop_loss is not None and losses[-1] < hparams.stop_loss else 0
            if idle == PATIENCE:
                break
            if idle:
                continue
            for weight, gradient in zip(originals, torch.autograd.grad(loss, list(originals)), strict=True):
                weight.grad = gradient
            adam.step()
            for weight, original in originals.items():
                weight.detach().clamp_(original - limit, original + limit)
        for weight, requires in required.items():
            weight.grad = None
            weight.requires_grad_(requires)
        changes = {layer: difference(down(model, layer), originals) for layer in layers}
    return Edit(changes, None, losses)


def find_vector(
    model: Any,
    tokenizer: Any,
    fact: Any,
    site: Site,
    prompts: Sequence[Prompt],
    hparams: RomeHparams | MemitHparams,
) -> tuple[Tensor, list[float]]:
    """What the site is to put out at the lookup of the first prompt (hidden,), so that all of them are followed by the
    fact's new target, and the losses on the way there."""
    target = list(target_ids(fact.target_new, tokenizer))
    essence = about_subject(model, tokenizer, fact, "{} is a")
    inputs = padded(model, [*(prompt.ids + target[:-1] for prompt in prompts), essence.ids])
    lookups = [prompt.lookup for prompt in (*prompts, essence)]
    rows = [[row] for row in range(len(prompts))]
    predicting = [[len(prompt.ids) - 1 + place for place in range(len(target))] for prompt in prompts]
    delta = torch.zeros(model.config.hidden_size, dtype=model.dtype, device=model.device, requires_grad=True)
    start = before = None

    def add(values: Tensor) -> None:
        nonlocal start
        if start is None:
            start = values[0, lookups[0]].detach().clone()
        values[range(len(lookups)), lookups] += delta

    adam = torch.optim.Adam([delta], lr=hparams.lr)
    losses = []
    for step in range(1, hparams.steps + 1):
        with hooked([(site, add)], len(lookups)):
            logits = model(**inputs, use_cache=False).logits
        log_p = logits.log_softmax(dim=-1)
        nll = -log_p[rows, predicting, target].mean()
        after = log_p[-1, essence.lookup]
        before = after.detach() if before is None else before
        decay = delta.norm() / start.norm() ** 2
        loss = nll + hparams.kl_factor * divergence(after, before) + hparams.weight_decay * decay
        losses.append(loss.item())
        if step == hparams.steps or (hparams.stop_loss is not None and losses[-1] < hparams.stop_loss):
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        adam.step()
        limit, reached = hparams.clamp * start.norm(), delta.detach().norm()
        if reached > limit:
            delta.detach().mul_(limit / reached)
    return start + delta.detach(), losses


class Seen(Exception):  # noqa: N818 (it is no error)
    """A pass has gone as far as anybody looks."""


@torch.no_grad()
def look(model: Any, module: nn.Module, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """What enters a module and what it puts out, (B, width) each, at the lookup of each prompt."""
    places = list(range(len(prompts))), [prompt.lookup for prompt in prompts]
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        for values in (inputs[0], output[0] if isinstance(output, tuple) else output):
            found.append(values.reshape(len(prompts), -1, values.shape[-1])[places])
        raise Seen

    handle = module.register_forward_hook(keep)
    with suppress(Seen):
        model(**padded(model, [prompt.ids for prompt in prompts]), use_cache=False)
    handle.remove()
    entered, put_out = found
    return entered, put_out


def difference(module: nn.Module, originals: Mapping[nn.Parameter, Tensor]) -> Change:
    """How a down-projection differs from what it was."""
    weight = module.weight.detach() - originals[module.weight]
    weight = weight if isinstance(module, nn.Linear) else weight.T
    return Change(weight, None if module.bias is None else module.bias.detach() - originals[module.bias])


def inverse(moment: Tensor) -> Tensor:
    """Of a second moment (inner, inner), in float64."""
    return moment.double().inverse()


def about(model: Any, layer: int, window: int) -> range:
    """The layers of the window about a layer, clipped to the model."""
    return range(max(0, layer - window // 2), min(len(sites(model)), layer - (-window // 2)))


def norm(changes: Mapping[int, Change]) -> float:
    """Of all that is changed, together."""
    parts = [part for change in changes.values() for part in (change.weight, change.bias) if part is not None]
    return sum(part.double().norm().item() ** 2 for part in parts) ** 0.5
