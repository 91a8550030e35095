"""Projection onto the directions in which a layer's keys hardly vary: the eigenvectors of small second moments."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.errors import ExperimentError

Rule = Literal["eigenvalue", "rank", "share"]

ENOUGH_TOKENS = 100
"""Tokens per component of a key. Of m components over N independent tokens the smallest eigenvalues come out too small
by a factor of (1 - sqrt(m / N))^2: 0.81 here, 0.47 at the 10 tokens that inverses need."""


class ShortMoments(UserWarning):
    """Second moments over so few tokens that their small eigenvalues, and so the null space, depend on the sample."""


@dataclass(frozen=True)
class NullSpace:
    """A projector (engine/edit/methods/least_squares.py). rule, value: which directions are in it
    (``AlphaEditHparams``)."""

    moments: Moments
    rule: Rule
    value: float

    def project(self, layer: int, keys: Tensor) -> Tensor:
        vectors, inside = self._basis(layer, keys.device)
        keys = keys.double()
        along = vectors @ (vectors.T @ keys)
        return along if inside else keys - along

    def rank(self, layer: int) -> int:
        """How many directions of a layer's keys it has.

        Raises:
            ExperimentError: for none, and for all of them.
        """
        values = self.moments.spectrum(layer)[0]
        width = len(values)
        if self.rule == "eigenvalue":
            rank = int((values < self.value).sum())
        elif self.rule == "rank":
            rank = min(int(self.value), width)
        else:
            held = values.cumsum(0)
            rank = int((held <= self.value * held[-1]).sum())
        if rank in (0, width):
            found = "no direction" if rank == 0 else f"every one of the {width} directions"
            ends = f"{values[0]:.2g} to {values[-1]:.2g}, half of them below {values.median():.2g}"
            raise ExperimentError(
                f"null_space {self.value:g} by {self.rule} takes {found} of layer {layer}'s keys, whose second "
                f"moment's eigenvalues are {ends}; give a {'larger' if rank == 0 else 'smaller'} null_space, or choose "
                "null_space_by='rank' or 'share'"
            )
        return rank

    def _basis(self, layer: int, device: torch.device) -> tuple[Tensor, bool]:
        """The eigenvectors (inner, r) inside, or those outside where these are fewer; and whether they are inside."""
        rank, vectors = self.rank(layer), self.moments.spectrum(layer)[1]
        inside = 2 * rank <= len(vectors)
        return (vectors[:, :rank] if inside else vectors[:, rank:]).to(device), inside

    def warn_if_short(self, layers: Iterable[int]) -> None:
        for layer in layers:
            tokens, width = self.moments.tokens[layer], self.moments.width(layer)
            if tokens < ENOUGH_TOKENS * width:
                warnings.warn(
                    ShortMoments(
                        f"the second moment of layer {layer} is of {tokens:,} tokens, fewer than {ENOUGH_TOKENS} for "
                        f"each of the {width:,} components of its keys: its small eigenvalues, and so the null space "
                        f"(rank {self.rank(layer)}), depend on the sample; collect {ENOUGH_TOKENS * width:,} tokens"
                    ),
                    stacklevel=2,
                )
