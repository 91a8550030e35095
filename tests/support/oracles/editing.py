"""What the plain editors share: a task, its prompts and noise, and an unmodified model of transformers under hooks.

Every prompt runs by itself, without padding, and every pass recomputes the whole sequence. ``down`` is a layer's MLP
down-projection: keys are all that enters it, values its own output with its bias, before any norm that follows. Its
weight is spoken of as (hidden, inner), whichever way round the family keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from causalcone.engine.encoding import PromptEncoder
from causalcone.engine.facts import Fact
from oracles.model import Hook, Site, hooked, precision, sites

DOWN = {
    "gpt2": "mlp.c_proj",
    "gptj": "mlp.fc_out",
    "gpt_neo": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "phi": "mlp.fc2",
    "starcoder2": "mlp.c_proj",
}
LIKE_LLAMA = "mlp.down_proj"
NOISE_SEED = 1


@dataclass(frozen=True)
class Task:
    """One edit to be made: ``target`` is what to train towards, in Fact Erasure against; ``sigma`` is the level of the
    noise on the subject, which only Fact Forcing adds."""

    fact: Fact
    problem: str
    target: tuple[int, ...]
    sigma: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the tokens start..end-1 of the subject, if it is there."""

    ids: list[int]
    span: tuple[int, int] | None

    @property
    def lookup(self) -> int:
        """The subject's last token."""
        return self.span[1] - 1


@dataclass(frozen=True)
class Change:
    """What is added to a down-projection: to its weight (hidden, inner) and, unless None, to its bias (hidden,)."""

    weight: Tensor
    bias: Tensor | None = None


def training_prompts(model: nn.Module, tokenizer: Any, fact: Fact, contexts: Sequence[str]) -> list[Prompt]:
    """The bare prompt, then the prompt after each context."""
    texts = [text.replace("{", "").replace("}", "") for text in contexts]
    templates = [fact.prompt] + [f"{text}. {fact.prompt}" for text in texts]
    return [about_subject(model, tokenizer, fact, template) for template in templates]


def about_subject(model: nn.Module, tokenizer: Any, fact: Fact, template: str) -> Prompt:
    """A template filled with the fact's subject, whose tokens are those at the template's place."""
    filled = Fact(fact.id, template, fact.subject, fact.target_true)
    vocabulary = model.get_input_embeddings().num_embeddings
    encoded = PromptEncoder(tokenizer, vocabulary, model.config.max_position_embeddings).fact(filled, "argmax")
    return Prompt(list(encoded.prompt), encoded.span)


def noise(model: nn.Module, span: tuple[int, int], sigma: float, samples: int = 1) -> Tensor:
    """Noise (J, span, width of the embeddings) in float64, from a stream that begins anew for every prompt."""
    shape = (samples, span[1] - span[0], model.get_input_embeddings().embedding_dim)
    return torch.from_numpy(np.random.RandomState(NOISE_SEED).randn(*shape) * sigma).to(model.device)


def noising(model: nn.Module, prompt: Prompt, sigma: float, samples: int = 1) -> list[Hook]:
    """What adds the noise to the embeddings of the subject's tokens, for a batch of as many rows as samples."""
    if prompt.span is None:
        return []
    start, end = prompt.span
    added = noise(model, prompt.span, sigma, samples)

    def add(embeddings: Tensor) -> None:
        embeddings[:, start:end] = (embeddings[:, start:end].double() + added).to(embeddings.dtype)

    return [(Site(model.get_input_embeddings()), add)]


def forcing(model: nn.Module, task: Task, prompt: Prompt, samples: int = 1) -> list[Hook]:
    """The noise under which this task sees a prompt: none but in Fact Forcing."""
    return noising(model, prompt, task.sigma, samples) if task.problem == "fact_forcing" else []


def run(model: nn.Module, ids: Sequence[int], hooks: Sequence[Hook] = (), batch: int = 1) -> Tensor:
    """Log-probabilities (batch, T, vocabulary) in float64 after each token, in equal rows but for what hooks do."""
    with hooked(hooks, batch):
        logits = model(torch.tensor([list(ids)] * batch, device=model.device), use_cache=False).logits
    return logits.double().log_softmax(dim=-1)


def target_log_p(
    model: nn.Module, prompt: Prompt, target: Sequence[int], hooks: Sequence[Hook] = (), batch: int = 1
) -> Tensor:
    """Log-probability (batch, target tokens) of each target token after the prompt and the target tokens before it."""
    log_p = run(model, [*prompt.ids, *target[:-1]], hooks, batch)
    return log_p[:, len(prompt.ids) - 1 :][:, range(len(target)), list(target)]


def down(model: nn.Module, layer: int) -> nn.Module:
    """A layer's down-projection."""
    return sites(model)[layer]["hidden"].module.get_submodule(DOWN.get(model.config.model_type, LIKE_LLAMA))


def down_weight(model: nn.Module, layer: int) -> Tensor:
    """A layer's down-projection (hidden, inner), as a view of the parameter, without gradient."""
    module = down(model, layer)
    weight = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.T


def key_site(model: nn.Module, layer: int) -> Site:
    """What enters the down-projection: with a single head, all of it."""
    return Site(down(model, layer), head=0, heads=1)


def value_site(model: nn.Module, layer: int) -> Site:
    """What the down-projection puts out."""
    return Site(down(model, layer))


def at_lookup(model: nn.Module, task: Task, prompt: Prompt, site: Site) -> Tensor:
    """What is at a site at the subject's last token of a prompt, under the task's noise."""
    return at_tokens(model, prompt.ids, site, forcing(model, task, prompt))[prompt.lookup]


@torch.no_grad()
def at_tokens(model: nn.Module, ids: Sequence[int], site: Site, hooks: Sequence[Hook] = ()) -> Tensor:
    """What is at a site at every token (T, width)."""
    seen: list[Tensor] = []
    run(model, ids, [*hooks, (site, lambda values: seen.append(values[0].clone()))])
    return seen[0]


@contextmanager
def changed(model: nn.Module, changes: Mapping[int, Change]) -> Iterator[None]:
    """While inside, the down-projections of some layers are changed; afterwards they are bitwise what they were."""
    with kept(model, changes):
        for layer, change in changes.items():
            down_weight(model, layer).add_(change.weight)
            if change.bias is not None:
                down(model, layer).bias.detach().add_(change.bias)
        yield


@contextmanager
def kept(model: nn.Module, layers: Sequence[int] | Mapping[int, Any]) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Gives copies of the parameters of some layers' down-projections, and afterwards puts them back."""
    originals = {each: each.detach().clone() for layer in layers for each in down(model, layer).parameters()}
    try:
        yield originals
    finally:
        for parameter, original in originals.items():
            parameter.detach().copy_(original)


def second_moment(model: nn.Module, tokenizer: Any, texts: Sequence[str], layer: int) -> Tensor:
    """The mean of k k^T (inner, inner) in float64 over all tokens of the texts, each of which runs by itself."""
    with precision(model, lift=True):
        keys = [at_tokens(model, tokenizer(text)["input_ids"], key_site(model, layer)) for text in texts]
    rows = torch.cat(keys).double()
    return torch.stack([torch.outer(key, key) for key in rows]).sum(dim=0) / len(rows)
