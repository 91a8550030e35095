"""Causal tracing and zeroing as METHODS defines them, in the plainest way: one forward pass per value of the table.

Every pass holds the clean sequence (row 0) and its J corrupted copies (rows 1..J). Forward hooks add the noise to the
token embeddings of the corrupted rows, and overwrite what a layer puts out at one token with the clean row's value.
Nothing here comes from the engine, and the model is the unmodified one of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oracles.facts import Case, Corruption, corruption, draw, encode, noise_width
from oracles.model import Hook, Site, log_predict, precision, sites

__all__ = [
    "Case",
    "Restoration",
    "State",
    "choose",
    "draw",
    "encode",
    "noise_width",
    "probabilities",
    "restorations",
    "trace",
    "zero",
]

State = tuple[str, int]
SEVERED = {None: (), "mlp": ("mlp",), "attn": ("attn",), "both": ("mlp", "attn")}


@dataclass(frozen=True)
class Restoration:
    """One value of the table: this kind of output, of these layers, at this token, gets the clean run's value.

    With no token it happens at all tokens of ``together``.
    """

    kind: str
    window: int
    layer: int
    token: int | None
    together: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return list(self.together) if self.token is None else [self.token]

    def layers(self, depth: int) -> range:
        """The window centred on the layer, clipped to the model."""
        return range(max(0, self.layer - self.window // 2), min(depth, self.layer - (-self.window // 2)))

    def sites(self, model: nn.Module) -> list[Site]:
        """The kind of value in each layer of the window."""
        layers = sites(model)
        return [layers[layer][self.kind] for layer in self.layers(len(layers))]


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
    noise: Any = None,
    extra_tokens: int = 0,
    sever: str | None = None,
    compat: str | None = None,
    joint: bool = False,
    lift: bool = True,
) -> list[dict[str, Any]]:
    """The rows of the trace table, without token_text, for a model in evaluation mode.

    ``lift=False`` leaves the casts to float32 in which transformers computes parts of a float64 model.
    """
    rows = []
    with precision(model, lift):
        width = noise_width(model, tokenizer, facts, sigma)
        for fact in facts:
            case = encode(model, tokenizer, fact, target)
            first, last = (
                corruption(model, tokenizer, fact, case, noise, samples, width, seed, extra_tokens, draws)
                for draws in (1, 2 if sever and compat == "published" else 1)
            )
            if compat == "published":
                first = dataclasses.replace(first, replaces=False)
            clean, *corrupted = log_run(model, case, [first])
            for restoration in restorations(model, case, states, tokens, joint):
                _, *patched = log_run(model, case, [first, last] if sever else [last], restoration, SEVERED[sever])
                spread = float(np.std(np.exp(patched), ddof=1)) if len(patched) > 1 else None
                numbers = columns([clean], corrupted, patched) | {"p_patched_sd": spread}
                rows.append(labels(case, restoration, f"sever_{sever}" if sever else "restore") | numbers)
    return rows


def zero(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Any],
    states: Sequence[State] = (("mlp", 5),),
    target: str = "label",
    tokens: str | Sequence[int] = "subject",
    lift: bool = True,
) -> list[dict[str, Any]]:
    """The rows of the zeroing table: in the clean run the outputs of a window are zero at all chosen tokens."""
    rows = []
    with precision(model, lift), torch.no_grad():
        for fact in facts:
            case = encode(model, tokenizer, fact, target)
            clean = log_predict(model, case, [case.inputs]).tolist()
            for restoration in restorations(model, case, states, tokens, joint=True):
                numbers = columns(clean, None, [zeroed(model, case, restoration)]) | {"p_patched_sd": None}
                rows.append(labels(case, restoration, "zero") | numbers)
    return rows


def columns(
    clean: Sequence[float], corrupted: Sequence[float] | None, patched: Sequence[float]
) -> dict[str, float | None]:
    """The means of probabilities whose logarithms are given, and the logarithms of these means."""
    logs = {"clean": clean, "corrupted": corrupted, "patched": patched}
    return {
        **{f"p_{name}": None if log is None else float(np.mean(np.exp(log))) for name, log in logs.items()},
        **{f"logp_{name}": None if log is None else log_mean(log) for name, log in logs.items()},
    }


def log_mean(logs: Sequence[float]) -> float:
    """The logarithm of the mean of numbers that may be too small for one."""
    return max(logs) + float(np.log(np.mean(np.exp(np.array(logs) - max(logs)))))


def zeroed(model: nn.Module, case: Case, restoration: Restoration) -> float:
    """The logarithm of the target's probability where zeros take the place of what would be restored."""

    def erase(values: Tensor) -> None:
        values[:, restoration.tokens] = 0

    return log_predict(model, case, [case.inputs], [(site, erase) for site in restoration.sites(model)]).item()


def labels(case: Case, restoration: Restoration, method: str) -> dict[str, Any]:
    """The columns of a row that say what it is about."""
    return {
        "fact_id": case.fact_id,
        "method": method,
        "kind": restoration.kind,
        "window": restoration.window,
        "layer": restoration.layer,
        "token": restoration.token,
        "subject_start": case.start,
        "subject_end": case.end,
        "prompt_tokens": len(case.prompt),
        "answer_tokens": len(case.target),
    }


def restorations(
    model: nn.Module, case: Case, states: Iterable[State], tokens: str | Sequence[int], joint: bool = False
) -> Iterator[Restoration]:
    """Every value asked for, one per state, layer and token, or with ``joint`` one for all tokens."""
    chosen = choose(case, tokens)
    for kind, window in states:
        for layer in range(len(sites(model))):
            if joint:
                yield Restoration(kind, window, layer, None, tuple(chosen))
            else:
                yield from (Restoration(kind, window, layer, token) for token in chosen)


def choose(case: Case, tokens: str | Sequence[int]) -> list[int]:
    """Places in the prompt by the name of a choice, or by indices, of which negative ones count from its end."""
    length = len(case.prompt)
    named = {
        "all": range(length),
        "subject_onward": range(case.start, length),
        "subject": range(case.start, case.end),
        "subject_last": [case.end - 1],
        "last": [length - 1],
    }
    return list(named[tokens]) if isinstance(tokens, str) else sorted({token % length for token in tokens})


def probabilities(model: nn.Module, case: Case, noise: Tensor, restoration: Restoration | None = None) -> list[float]:
    """The target's probability in the clean run and in each run with this noise added, restored or not: 1 + J."""
    return np.exp(log_run(model, case, [Corruption(case.inputs, case.start, case.end, noise)], restoration)).tolist()


@torch.no_grad()
def log_run(
    model: nn.Module,
    case: Case,
    corruptions: Sequence[Corruption],
    restoration: Restoration | None = None,
    severed: Sequence[str] = (),
) -> list[float]:
    """The logarithm of the target's probability in the clean run and in each run of the last corruption: 1 + J numbers.

    These runs get the restoration. The outputs of the severed kinds, of all layers at the restored tokens, are held at
    the values they have in the runs of the first corruption.
    """
    samples = len(corruptions[0].noise)

    def corrupt(embeddings: Tensor) -> None:
        for rows, each in zip(embeddings[1:].split(samples), corruptions, strict=True):
            each(rows)

    def restore(values: Tensor) -> None:
        values[-samples:, restoration.tokens] = values[:1, restoration.tokens]

    def hold(values: Tensor) -> None:
        values[-samples:, restoration.tokens] = values[1 : 1 + samples, restoration.tokens]

    hooks: list[Hook] = [(Site(model.get_input_embeddings()), corrupt)]
    if restoration is not None:
        hooks += [(site, restore) for site in restoration.sites(model)]
        hooks += [(layer[kind], hold) for layer in sites(model) for kind in severed]
    inputs = [case.inputs] + [each.inputs for each in corruptions for _ in range(samples)]
    clean, *corrupted = log_predict(model, case, inputs, hooks).tolist()
    return [clean, *corrupted[-samples:]]
