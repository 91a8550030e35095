"""Corruption of the subject: the published noise stream and its level (METHODS 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.errors import ExperimentError


@lru_cache(maxsize=16)
def standard_noise(seed: int, samples: int, span: int, hidden: int) -> np.ndarray:
    """eps (samples, span, hidden) float64 from a fresh ``RandomState(seed)``, the same for every fact of a span."""
    return np.random.RandomState(seed).randn(samples, span, hidden)


def parse_sigma(sigma: float | str) -> tuple[float, bool]:
    """The number in a noise level, and whether it counts standard deviations of the subjects' embeddings."""
    in_deviations = isinstance(sigma, str) and sigma.endswith("sd")
    try:
        value = float(sigma.removesuffix("sd") if isinstance(sigma, str) else sigma)
    except (TypeError, ValueError):
        raise ExperimentError(f"sigma {sigma!r} is neither a number nor '<k>sd', such as '3sd'") from None
    if not 0 <= value < float("inf"):
        raise ExperimentError(f"sigma is {sigma!r}; the noise level cannot be negative or infinite")
    return value, in_deviations


def subject_deviation(subjects: Sequence[Sequence[int]], embed: Callable[[Tensor], Tensor]) -> float:
    """Unbiased standard deviation of all elements of the embedding outputs of subjects' token ids, repeats kept.

    ``embed`` maps token ids (R,) to embeddings (R, hidden). Two passes in float64 over the distinct tokens.
    """
    counts = Counter(token for subject in subjects for token in subject)
    tokens = torch.tensor(sorted(counts))
    weights = torch.tensor([counts[int(token)] for token in tokens], dtype=torch.float64)

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(tokens), 1024):
            yield embed(tokens[i : i + 1024]).to("cpu", torch.float64), weights[i : i + 1024, None]

    total = weights.sum().item() * embed(tokens[:1]).shape[1]
    mean = sum((part * weight).sum().item() for part, weight in rows()) / total
    squares = sum(((part - mean).square() * weight).sum().item() for part, weight in rows())
    return (squares / (total - 1)) ** 0.5
