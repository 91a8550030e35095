"""Second moments of keys, which say how much of each direction a layer's down-projection has to preserve
(docs/editing.md, "Second moments and contexts")."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalcone.engine.compute import Compute
from causalcone.engine.edit.moments.collect import collect
from causalcone.engine.edit.moments.files import read_moments, write_moments
from causalcone.engine.edit.moments.identity import Identity, key_width
from causalcone.engine.errors import ExperimentError
from causalcone.engine.memory import RecentlyUsed, free_bytes
from causalcone.engine.models import read_architecture
from causalcone.engine.models.base import Architecture
from causalcone.engine.run.session import Session

CONDITION_LIMITS = {torch.float64: 1e12, torch.float32: 1e8}
"""The largest condition number with which a moment in this dtype is inverted. It is that of the moment scaled to a unit
diagonal: rounding leaves each element an error relative to itself, which components of any size survive. In float64
the inverse is then good to four digits. In float32 an element's error of 3e-8 is, over d components, one of about
3e-8 x 2 / sqrt(d) of the largest eigenvalue: beyond the limit, rounding decides what the smallest directions are."""

_FACTOR_BYTES = 4 * 2**30
_SHARE_FOR_FACTORS = 0.25
_ITERATIONS = 30


@dataclass(frozen=True, eq=False)
class Moments:
    """The uncentred second moments C = E[k k^T] of some layers' keys k, the inputs of the MLP's down-projection
    (Meng et al. 2022).

    Attributes:
        matrices: C (inner, inner) by layer, in float64, or in float32 where it is no more exact.
        tokens: By layer, the number of tokens that C is the mean of.
        source: A description of the texts.
        identity: The model that the keys are of; None where it is not known.
        ridge: A number that ``solve`` adds to the diagonal, in units of the diagonal's mean.
    """

    matrices: Mapping[int, Tensor] = field(repr=False)
    tokens: Mapping[int, int]
    source: str | None = None
    identity: Identity | None = None
    ridge: float = 0.0
    _factors: _Factors = field(default_factory=lambda: _Factors(_FACTOR_BYTES), repr=False)
    _conditions: dict[tuple[int, float], float] = field(default_factory=dict, repr=False)
    _spectra: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _checked_ridge(self.ridge)
        if not self.matrices or self.matrices.keys() != self.tokens.keys():
            raise ExperimentError(
                f"moments of the layers {_listed(self.matrices)} with token counts of {_listed(self.tokens)}; "
                "give both for the same layers, one at least"
            )
        for layer, matrix in self.matrices.items():
            if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype not in CONDITION_LIMITS:
                raise ExperimentError(
                    f"the moment of layer {layer} is {tuple(matrix.shape)} in {matrix.dtype}; "
                    "give (inner, inner) in float32 or float64"
                )

    @classmethod
    def collect(
        cls,
        model: Any,
        tokenizer: Any,
        texts: Iterable[str | Mapping[str, Any]] | None = None,
        layers: Sequence[int] | None = None,
        tokens: int | str | None = None,
        *,
        source: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: int | str | None = None,
        length: int | None = None,
        progress: Callable[[int, int | None], None] | None = None,
        resume: str | Path | None = None,
    ) -> Moments:
        """Collect the second moments of a model's keys over running text, of all layers in one pass over the texts.

        Keys are those of the compute dtype; products are in float32 (in float64 for float64) over at most 1,024 tokens,
        and summed in float64. Warns ``FewTokens`` where the texts end before ``tokens``.

        Args:
            model: A transformers model.
            tokenizer: Its tokenizer; each text is tokenized alone, with its default special tokens.
            texts: Strings, or mappings with a ``"text"``; they are cut into pieces that each start at position 0. By
                default texts that the model writes itself.
            layers: Numbers from 0; all layers by default.
            tokens: How many to take, the last text cut; 10 x inner by default (Gupta et al. 2025); ``"all"`` for all.
            source: A description of the texts, kept with the moments.
            dtype: Of the pass, as for ``Tracer``, like device.
            memory: As for ``Tracer``; on a CPU with the sums (8 x inner^2 bytes a layer; large ones leave a GPU).
            length: Tokens of a piece; 512 by default, or the model's positions where these are fewer.
            progress: Called with the number of tokens done and wanted (None for all).
            resume: A file written about every minute and when collecting stops; the same call goes on from there.

        Returns:
            The moments, in float32 or better.

        Raises:
            ExperimentError: for texts without tokens, and for a ``resume`` file of another model or other texts.
            ModelError: for a model that cannot be computed exactly.
            MemoryBudgetError: for a budget that does not hold the sums and one piece.
        """
        session = Session(model, tokenizer, Compute.of(dtype, device, memory))
        return cls(
            *collect(session, texts, layers, tokens, source=source, length=length, progress=progress, resume=resume)
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have moments, in order."""
        return tuple(sorted(self.matrices))

    def width(self, layer: int) -> int:
        """The width ``inner`` of a layer's keys."""
        return len(self._matrix(layer))

    def matrix(self, layer: int) -> Tensor:
        """C (inner, inner) of a layer in float64, without ridge."""
        return self._matrix(layer).double()

    def with_ridge(self, ridge: float) -> Moments:
        """The same moments, solved with ``ridge`` x the mean of C's diagonal added to the diagonal."""
        return replace(self, ridge=ridge)

    @torch.no_grad()
    def solve(self, layer: int, keys: Tensor, ridge: float | None = None) -> Tensor:
        """Solve (C + ridge x mean(diag C) x I) X = keys; factors are kept, as many as 4 GiB hold, or on a GPU a quarter
        of its free memory where that is more.

        Args:
            layer: A layer with a moment.
            keys: (inner, n).
            ridge: That of these moments by default.

        Returns:
            X (inner, n) in float64, on the device of the keys.

        Raises:
            ExperimentError: no moment of the layer, keys of another width, or a moment beyond ``CONDITION_LIMITS``.
        """
        matrix = self._matrix(layer)
        if keys.ndim != 2 or len(keys) != len(matrix):
            raise ExperimentError(
                f"keys {tuple(keys.shape)} for the moment of layer {layer}; give them as ({len(matrix)}, n)"
            )
        ridge = self.ridge if ridge is None else _checked_ridge(ridge)
        self._room(keys.device)
        factor = self._factors.get((layer, ridge, keys.device), lambda: self._factorised(layer, ridge, keys.device))
        return factor.solve(keys)

    @torch.no_grad()
    def spectrum(self, layer: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues (inner,) of a layer's C, rising, and eigenvectors (inner, inner) as columns, in float64; kept."""
        if layer not in self._spectra:
            self._spectra[layer] = tuple(torch.linalg.eigh(self.matrix(layer)))
        return self._spectra[layer]

    def check(self, model: Any, layers: Iterable[int]) -> None:
        """Check that these are moments of a model; where it is not known of which, only the width of the keys.

        Args:
            model: The model or its ``Architecture``; its dtype and that of the moments' model may be a rounding apart.
            layers: The layers to check.

        Raises:
            ExperimentError: for a layer without moment, and for another model.
        """
        layers = tuple(layers)
        missing = [layer for layer in layers if layer not in self.matrices]
        if missing:
            raise ExperimentError(
                f"there is no moment of layer {_listed(missing)}, only of {_listed(self.matrices)}; "
                "collect those that are missing too"
            )
        architecture = model if isinstance(model, Architecture) else read_architecture(model)
        difference = None
        if self.identity is not None:
            difference = self.identity.difference(Identity.of(architecture, layers), layers)
        elif layers and max(layers) >= architecture.sizes.depth:
            difference = f"it has no layer {max(layers)}"
        else:
            for layer in layers:
                width = key_width(architecture, layer)
                if width != self.width(layer):
                    difference = f"the keys of layer {layer} have a width of {width}, not {self.width(layer)}"
        if difference is not None:
            name = "" if self.identity is None or not self.identity.name else f" {self.identity.name}"
            raise ExperimentError(
                f"the moments are of another model{name}: in this one, {difference}; load the model that they are of, "
                "take off its edits, or collect moments of this one"
            )

    def save(self, path: str | Path, dtype: torch.dtype | str | None = None) -> None:
        """Write the moments to one safetensors file, whole or not at all. The ridge is not saved.

        Args:
            path: The file, which is replaced if it exists; folders are made as needed.
            dtype: float32 takes half the space of float64; that of each moment by default.

        Raises:
            ExperimentError: for a file that cannot be written.
        """
        write_moments(path, (self.matrices, self.tokens, self.source, self.identity), dtype)

    @classmethod
    def load(cls, path: str | Path | Mapping[int, str | Path], layers: int | Sequence[int] | None = None) -> Moments:
        """Read moments from a file that ``save`` wrote, or those published with ROME, whose identity is not known.

        Args:
            path: The file; of published moments an ``.npz`` file, a folder of them, or such files by layer.
            layers: Read these only; for a published file whose name does not tell its layer, that layer.

        Returns:
            The moments, on the CPU.

        Raises:
            ExperimentError: naming a file or layer that is missing, or a file that is damaged.
        """
        return cls(*read_moments(path, layers))

    def _room(self, device: torch.device) -> int:
        """Bytes of factors that are kept."""
        if device.type == "cuda":
            free = free_bytes(device) + self._factors.held
            self._factors.limit = max(_FACTOR_BYTES, int(_SHARE_FOR_FACTORS * free))
        return self._factors.limit

    def _matrix(self, layer: int) -> Tensor:
        if layer not in self.matrices:
            raise ExperimentError(f"there is no moment of layer {layer}, only of {_listed(self.matrices)}; collect it")
        return self.matrices[layer]

    def _factorised(self, layer: int, ridge: float, device: torch.device) -> _Factor:
        matrix = self.matrices[layer]
        width, tokens, limit = len(matrix), self.tokens[layer], CONDITION_LIMITS[matrix.dtype]
        condition, factor = math.inf, None
        wide = matrix.to(device).to(torch.float64, copy=True)  # in this order it is converted on the device
        wide.diagonal().add_(ridge * wide.diagonal().mean())
        zeros = int((wide.diagonal() <= 0).sum())
        if tokens < width and not ridge:
            reason = f"they cannot span keys of width {width}"
        elif zeros:
            reason = f"{zeros} of the {width} components of its keys are zero in all of them"
        else:
            factor, reason = _Factor.of(wide), "its keys hardly vary in some directions"
            if factor is not None and (layer, ridge) not in self._conditions:
                self._conditions[layer, ridge] = factor.condition()
            condition = math.inf if factor is None else self._conditions[layer, ridge]
        if factor is None or not condition <= limit:
            number = "infinite" if math.isinf(condition) else f"{condition:.1e}"
            raise ExperimentError(
                f"the second moment of layer {layer}, over {tokens:,} tokens, cannot be inverted: {reason} (condition "
                f"number {number}, at most {limit:.0e} can be trusted); collect more tokens (10 x {width} are usual), "
                f"or use moments.with_ridge({0.01 if not ridge else 10 * ridge:g})"
            )
        return factor


def factors_fit(moments: Moments, layers: Collection[int], device: torch.device) -> bool:
    """Whether the factors of all these layers are kept from one ``solve`` on a device to the next."""
    return len(layers) == 1 or sum(8 * moments.width(layer) ** 2 for layer in layers) <= moments._room(device)


@dataclass(frozen=True)
class _Factor:
    """A matrix M = D L L^T D with a unit diagonal in L L^T: scale (d,) = the diagonal of D^-1, lower (d, d) = L."""

    scale: Tensor
    lower: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> _Factor | None:
        """The factor of a symmetric matrix with a positive diagonal, which is overwritten; None if not definite."""
        scale = matrix.diagonal().rsqrt()
        matrix.mul_(scale).mul_(scale[:, None])
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return None if failed.item() else cls(scale, lower)

    def solve(self, right: Tensor) -> Tensor:
        scale = self.scale[:, None]
        return scale * torch.cholesky_solve(scale * right.detach().double(), self.lower)

    def condition(self) -> float:
        """The condition number of L L^T, hardly underestimated: by power iteration, and inverse iteration."""
        largest = _growth(lambda x: self.lower @ (self.lower.T @ x), self.lower)
        return largest * _growth(lambda x: torch.cholesky_solve(x, self.lower), self.lower)


def _growth(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The largest eigenvalue of a linear map, by power iteration from the same random vector each time."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(like), 1, generator=generator, dtype=torch.float64).to(like.device)
    for _ in range(_ITERATIONS):
        rows = apply(rows / torch.linalg.vector_norm(rows))
    return torch.linalg.vector_norm(rows).item()


class _Factors(RecentlyUsed[tuple[int, float, torch.device], _Factor]):
    def size(self, value: _Factor) -> int:
        return value.lower.nbytes


def _checked_ridge(ridge: float) -> float:
    if not 0 <= ridge < math.inf:
        raise ExperimentError(f"the ridge is {ridge!r}; give a number from 0, such as 0.01")
    return float(ridge)


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers))) or "none"
