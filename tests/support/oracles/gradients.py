"""Integrated gradients as METHODS defines them: autograd of the unmodified model, one state at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oracles.facts import Case, Corruption, corruption, encode, noise_width
from oracles.model import Site, precision, predict, sites
from oracles.tracing import choose


def integrated_gradients(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Any],
    kinds: Sequence[str] = ("hidden", "mlp", "attn"),
    steps: int = 50,
    baseline: str = "zero",
    target: str = "argmax",
    tokens: str | Sequence[int] = "all",
    sigma: float | str = "3sd",
    samples: int = 10,
    seed: int = 1,
    lift: bool = True,
) -> list[dict[str, Any]]:
    """The rows of the gradients table, for a model in evaluation mode.

    The baseline of a state is zero, or "corrupted": its value in each corrupted run, over which attributions are
    averaged.
    """
    rows = []
    with precision(model, lift):
        width = noise_width(model, tokenizer, facts, sigma)
        for fact in facts:
            case = encode(model, tokenizer, fact, target)
            corrupted = corruption(model, tokenizer, fact, case, None, samples, width, seed)
            for kind in kinds:
                for layer, here in enumerate(sites(model)):
                    clean, *others = values_at(model, case, here[kind], corrupted)
                    starts = others if baseline == "corrupted" else [torch.zeros_like(clean)]
                    for token in choose(case, tokens):
                        paths = [(start[token], clean[token]) for start in starts]
                        numbers = attribution(model, case, here[kind], token, paths, steps)
                        labels = {"fact_id": case.fact_id, "kind": kind, "layer": layer, "token": token}
                        rows.append(labels | numbers)
    return rows


@torch.no_grad()
def values_at(model: nn.Module, case: Case, site: Site, corrupted: Corruption) -> list[Tensor]:
    """The values (T, width) at a site in the clean run and in each corrupted run."""
    seen = []
    inputs = [case.inputs] + [corrupted.inputs] * len(corrupted.noise)
    embeddings = Site(model.get_input_embeddings())
    predict(model, case, inputs, [(embeddings, lambda rows: corrupted(rows[1:])), (site, seen.append)])
    return list(seen[0])


def attribution(
    model: nn.Module, case: Case, site: Site, token: int, paths: Sequence[tuple[Tensor, Tensor]], steps: int
) -> dict[str, float]:
    """Norm and sum of a state's integrated gradients, averaged over paths from a baseline (width,) to the state's
    value, and how far the sum is from the difference in probability between the two ends."""
    vectors, differences = [], []
    for start, end in paths:
        vector, difference = integral(model, case, site, token, start, end, steps)
        vectors.append(vector)
        differences.append(difference)
    mean = torch.stack(vectors).mean(dim=0)
    total = float(mean.sum())
    return {"norm": float(mean.norm()), "total": total, "gap": total - float(np.mean(differences))}


def integral(
    model: nn.Module, case: Case, site: Site, token: int, start: Tensor, end: Tensor, steps: int
) -> tuple[Tensor, float]:
    """The gradient of the target's probability along the straight line from start to end, times end - start, element
    by element (width,); and the difference of the probabilities at its ends."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    places = torch.tensor([0, *(nodes + 1) / 2, 1], dtype=end.dtype, device=end.device)
    states = start + places[:, None] * (end - start)
    states.requires_grad_()

    def put(values: Tensor) -> None:
        values[:, token] = states

    p = predict(model, case, [case.inputs] * len(states), [(site, put)])
    (gradients,) = torch.autograd.grad(p.sum(), states)
    mean = torch.from_numpy(weights / 2).to(end.device) @ gradients[1:-1].double()
    return (end - start).double() * mean, (p[-1] - p[0]).item()
