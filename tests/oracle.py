"""Causal tracing as METHODS defines it, in the plainest way: one forward pass of the model per restored state.

Every pass holds the clean sequence (row 0) and its J corrupted copies (rows 1..J). Forward hooks add the noise to the
token embeddings of the corrupted rows, and overwrite what a layer puts out at one token with the clean row's value.
Nothing here comes from the engine, and the model is the unmodified one of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = tuple[str, int]
Hook = Callable[[Tensor], Tensor]

# Where a family keeps its blocks, and what a block calls the modules that add to the residual stream.
LAYOUTS = {"gpt2": ("transformer.h", "attn", "mlp")}


@dataclass(frozen=True)
class Case:
    """A fact as token ids: the prompt, its subject's tokens start..end-1, and the target that follows the prompt."""

    fact_id: str
    prompt: list[int]
    target: list[int]
    start: int
    end: int

    @property
    def inputs(self) -> list[int]:
        """What the model reads: the last target token is only predicted."""
        return self.prompt + self.target[:-1]


@dataclass(frozen=True)
class Restoration:
    """One value of the table: this kind of output, of these layers, at this token, gets the clean run's value."""

    kind: str
    window: int
    layer: int
    token: int

    def layers(self, depth: int) -> range:
        """The window centred on the layer, clipped to the model."""
        return range(max(0, self.layer - self.window // 2), min(depth, self.layer - (-self.window // 2)))


def trace(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Any],
    states: Sequence[State] = (("hidden", 1), ("mlp", 10), ("attn", 10)),
    samples: int = 10,
    sigma: float | str = "3sd",
    seed: int = 1,
    target: str = "label",
    tokens: str | Sequence[int] = "all",
) -> list[dict[str, Any]]:
    """The rows of the trace table, without token_text, for a model in evaluation mode."""
    width = noise_width(model, tokenizer, facts, sigma)
    rows = []
    for fact in facts:
        case = encode(model, tokenizer, fact, target)
        noise = width * draw(model, case, samples, seed)
        p_clean, *corrupted = probabilities(model, case, noise)
        for restoration in restorations(model, case, states, tokens):
            _, *patched = probabilities(model, case, noise, restoration)
            rows.append(
                {
                    "fact_id": case.fact_id,
                    "method": "restore",
                    "kind": restoration.kind,
                    "window": restoration.window,
                    "layer": restoration.layer,
                    "token": restoration.token,
                    "subject_start": case.start,
                    "subject_end": case.end,
                    "prompt_tokens": len(case.prompt),
                    "p_clean": p_clean,
                    "p_corrupted": float(np.mean(corrupted)),
                    "p_patched": float(np.mean(patched)),
                    "p_patched_sd": float(np.std(patched, ddof=1)) if samples > 1 else None,
                }
            )
    return rows


def encode(model: nn.Module, tokenizer: Any, fact: Any, target: str) -> Case:
    """Token ids of prompt and target; the subject's tokens are those whose characters overlap its own."""
    first = fact.prompt.index("{}")
    last = first + len(fact.subject)
    text = fact.prompt[:first] + fact.subject + fact.prompt[first + 2 :]
    encoding = tokenizer(text, return_offsets_mapping=True)
    prompt = encoding["input_ids"]
    span = [i for i, (begin, stop) in enumerate(encoding["offset_mapping"]) if begin < last and stop > first]
    if target == "label":
        answer = fact.target_true if fact.target_true.startswith(" ") else " " + fact.target_true
        target_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    else:
        with torch.no_grad():
            logits = model(torch.tensor([prompt], device=model.device)).logits
        target_ids = [int(logits[0, -1].argmax())]
    return Case(fact.id, prompt, target_ids, span[0], span[-1] + 1)


def noise_width(model: nn.Module, tokenizer: Any, facts: Iterable[Any], sigma: float | str) -> float:
    """Sigma as a number: "<k>sd" is k standard deviations of the embeddings of all subjects."""
    if not isinstance(sigma, str):
        return float(sigma)
    ids = [token for fact in facts for token in tokenizer(fact.subject)["input_ids"]]
    embeddings = model.get_input_embeddings()(torch.tensor(ids, device=model.device))
    return float(sigma.removesuffix("sd")) * float(embeddings.detach().double().std())


def draw(model: nn.Module, case: Case, samples: int, seed: int) -> Tensor:
    """Standard normal noise (J, span, hidden), a fresh stream for every fact."""
    shape = (samples, case.end - case.start, model.config.hidden_size)
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def restorations(
    model: nn.Module, case: Case, states: Iterable[State], tokens: str | Sequence[int]
) -> Iterator[Restoration]:
    """Every value asked for, one per state, layer and token."""
    length = len(case.prompt)
    named = {
        "all": range(length),
        "subject_onward": range(case.start, length),
        "subject": range(case.start, case.end),
        "subject_last": [case.end - 1],
        "last": [length - 1],
    }
    for kind, window in states:
        for layer in range(len(sites(model))):
            for token in named[tokens] if isinstance(tokens, str) else tokens:
                yield Restoration(kind, window, layer, token)


@torch.no_grad()
def probabilities(model: nn.Module, case: Case, noise: Tensor, restoration: Restoration | None = None) -> list[float]:
    """The target's probability in the clean run and in each corrupted run, restored or not: 1 + J numbers."""

    def corrupt(embeddings: Tensor) -> Tensor:
        corrupted = embeddings.clone()
        subject = embeddings[1:, case.start : case.end]
        corrupted[1:, case.start : case.end] = (subject.double() + noise.to(subject.device)).to(subject.dtype)
        return corrupted

    def restore(states: Tensor) -> Tensor:
        restored = states.clone()
        restored[1:, restoration.token] = states[0, restoration.token]
        return restored

    hooks = [(model.get_input_embeddings(), corrupt)]
    if restoration is not None:
        blocks = sites(model)
        hooks += [(blocks[layer][restoration.kind], restore) for layer in restoration.layers(len(blocks))]
    with hooked(hooks):
        batch = torch.tensor([case.inputs] * (1 + len(noise)), device=model.device)
        logits = model(batch, use_cache=False).logits
    predicting = range(len(case.prompt) - 1, len(case.inputs))
    log_p = logits[:, predicting].double().log_softmax(dim=-1)[:, range(len(case.target)), case.target]
    return log_p.sum(dim=1).exp().tolist()


def sites(model: nn.Module) -> list[dict[str, nn.Module]]:
    """For each layer the module whose output is the state of a kind."""
    path, attn, mlp = LAYOUTS[model.config.model_type]
    return [
        {"hidden": block, "attn": getattr(block, attn), "mlp": getattr(block, mlp)}
        for block in model.get_submodule(path)
    ]


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """While inside, each module's output (the first, if it gives several) goes through its function."""

    def forward_hook(function: Hook) -> Callable[..., Any]:
        def apply(module: nn.Module, args: Any, output: Any) -> Any:
            return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

        return apply

    with ExitStack() as stack:
        for module, function in hooks:
            stack.callback(module.register_forward_hook(forward_hook(function)).remove)
        yield
