"""Corruption of the subject: kinds of noise, the published noise stream, and its level
(docs/methods.md, "Corruption")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.errors import ExperimentError, one_of

NoiseKind = Literal["gaussian", "uniform", "multivariate", "t", "counterfactual"]
SCALED_NOISES, SHAPED_NOISES = ("gaussian", "uniform"), ("multivariate", "t")


@dataclass(frozen=True, eq=False)
class Noise:
    """How the subject is corrupted.

    Args:
        kind: ``"gaussian"`` (sigma * N(0, 1)), ``"uniform"`` (sigma * U(-1, 1)), ``"multivariate"`` (normal with
            ``mean`` and ``covariance`` of embeddings), ``"t"`` (that, times sqrt((dof - 2) / chi2(dof)) per sample and
            token), or ``"counterfactual"``: no noise, but the fact's prompt about its ``counterfactual_subject``.
        replace: Whether the noise takes the place of the embedding instead of being added to it.
        dof: Degrees of freedom of t noise, more than 2.
        mean: (D,), of multivariate and t noise.
        covariance: (D, D), of multivariate and t noise.

    Raises:
        ExperimentError: The arguments make no sense together.
    """

    kind: NoiseKind = "gaussian"
    replace: bool = False
    dof: float | None = None
    mean: Any = None
    covariance: Any = None

    def __post_init__(self) -> None:
        _check_kind(self.kind, self.replace, self.dof)
        shaped = self.kind in SHAPED_NOISES
        for name in ("mean", "covariance"):
            value = getattr(self, name)
            if shaped == (value is None):
                raise ExperimentError(f"the noise {self.kind!r} {'needs' if shaped else 'has no'} {name}")
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=np.float64))
        if shaped and self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ExperimentError(
                f"the covariance is {self.covariance.shape} and the mean {self.mean.shape}; give (D, D) and (D,)"
            )
        if shaped and not np.allclose(self.covariance, self.covariance.T):
            raise ExperimentError("the noise's covariance is not symmetric, or not finite; give that of embeddings")

    @classmethod
    def like(
        cls, tokens: Sequence[int], embed: Callable[[Tensor], Tensor], dof: float | None = None, replace: bool = False
    ) -> Noise:
        """Noise with the mean and (unbiased) covariance of the embeddings of running text.

        Args:
            tokens: The text's token ids.
            embed: Maps ids (R,) to embeddings (R, hidden).
            dof: Degrees of freedom of t noise; multivariate normal noise if None.
            replace: As of the noise.
        """
        ids, counts = np.unique(np.asarray(tokens), return_counts=True)
        rows = embed(torch.from_numpy(ids)).to("cpu", torch.float64).numpy()
        mean = counts @ rows / counts.sum()
        centred = rows - mean
        covariance = (centred * counts[:, None]).T @ centred / (counts.sum() - 1)
        return cls("multivariate" if dof is None else "t", replace, dof, mean, covariance)


@dataclass(frozen=True, kw_only=True)
class TextNoise:
    """Noise of kind ``multivariate`` or ``t`` like the embeddings of running text, which a model is needed for."""

    kind: NoiseKind
    texts: tuple[str, ...]
    replace: bool = False
    dof: float | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind, self.replace, self.dof)


def _check_kind(kind: str, replace: bool, dof: float | None) -> None:
    one_of("noise", kind, get_args(NoiseKind))
    if kind == "t" and dof is None:
        raise ExperimentError("the noise 't' needs dof, its degrees of freedom")
    if kind != "t" and dof is not None:
        raise ExperimentError(f"dof goes with the noise 't' only, not with {kind!r}; drop it")
    if dof is not None and not dof > 2:
        raise ExperimentError(f"dof is {dof!r}; give more than 2 degrees of freedom, so that a variance exists")
    if replace and kind == "counterfactual":
        raise ExperimentError("a counterfactual prompt has no noise that could replace embeddings; drop replace")


@dataclass
class NoiseStream:
    """The noise of a run: what every fact's corrupted tokens carry, the same for every fact with a span of one length.
    draws: how many draws follow each other in the stream; one, but for published severed tracing."""

    noise: Noise
    sigma: float
    seed: int
    samples: int
    hidden: int
    draws: int = 1
    _drawn: dict[int, np.ndarray] = field(default_factory=dict)

    def __call__(self, span: int, samples: range) -> np.ndarray:
        """(samples, draws, span, hidden) float64, from a fresh ``RandomState(seed)``."""
        if span not in self._drawn:
            if len(self._drawn) >= 16:
                self._drawn.clear()
            self._drawn[span] = self._draw(span)
        return self._drawn[span][samples.start : samples.stop]

    @cached_property
    def _factor(self) -> np.ndarray:
        """What turns independent noise into noise of the covariance."""
        _, sizes, axes = np.linalg.svd(self.noise.covariance)
        return np.sqrt(sizes)[:, None] * axes

    def _draw(self, span: int) -> np.ndarray:
        shape = (self.samples, span, self.hidden)
        if self.noise.kind == "counterfactual" or not span:
            return np.zeros((self.samples, self.draws, span, self.hidden))
        stream = np.random.RandomState(self.seed)
        if self.noise.kind == "uniform":
            draws = [self.sigma * stream.uniform(-1, 1, shape) for _ in range(self.draws)]
        elif self.noise.kind == "gaussian":
            draws = [self.sigma * stream.randn(*shape) for _ in range(self.draws)]
        else:
            draws = [self.noise.mean + stream.randn(*shape) @ self._factor for _ in range(self.draws)]
        if self.noise.dof is not None:
            dof = self.noise.dof
            spread = np.random.RandomState((self.seed + 1) % 2**32).chisquare(dof, self.samples * span)
            factor = np.sqrt((dof - 2) / spread).reshape(self.samples, span, 1)
            draws = [factor * draw for draw in draws]
        return np.stack(draws, axis=1)


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
    ``embed`` maps token ids (R,) to embeddings (R, hidden). Two passes in float64 over the distinct tokens."""
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
