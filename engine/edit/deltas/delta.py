"""Changes of a model's weights: tensors that an edit adds to projections of the MLPs of some layers.

Weights are seen as (out, in), whichever way round a model keeps them: those of down-projections are (hidden, inner),
those of gate and up (inner, hidden).

In a delta's file, which any safetensors reader opens, the tensors of layer 3 are ``layers.3.left`` and
``layers.3.right``, or ``layers.3.weight`` and, where there is one, ``layers.3.bias``, those of its gate
``layers.3.gate.left`` and so on; ``layers`` in the description gives the kind of change by layer, or ``3.gate``. Files
with gate and up are of version 2 of the layout. All metadata beside the description are the user's.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalcone.engine.errors import ExperimentError
from causalcone.engine.tensor_file import Layout

LAYOUT = Layout(
    key="causalcone.delta", noun="delta", remedy="give a file that Delta.save wrote, or save it again", version=2
)

Place = int | tuple[int, str]
"""A weight that is changed: a layer's number for the down-projection of its MLP; or the layer with ``"up"`` or, in a
gated MLP, ``"gate"``."""

PROJECTIONS = ("down", "gate", "up")


def place_of(layer: int, projection: str) -> Place:
    return layer if projection == "down" else (layer, projection)


def layer_and_projection(place: Place) -> tuple[int, str]:
    return place if isinstance(place, tuple) else (place, "down")


@dataclass(frozen=True, eq=False)
class LowRank:
    """Adds ``left @ right.T`` to a weight (out, in): left (out, r), right (in, r); of a down-projection (hidden, r) and
    (inner, r)."""

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[1]:
            raise ExperimentError(
                f"a low-rank change of left {tuple(self.left.shape)} and right {tuple(self.right.shape)}; "
                "give them as (hidden, r) and (inner, r), of gate and up the other way round"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    @property
    def norm(self) -> float:
        """Frobenius norm, from the Gram matrices (r, r) of left and right: ||L R^T||^2 = sum(L^T L * R^T R)."""
        left, right = self.left.detach().double(), self.right.detach().double()
        square = (left.T @ left * (right.T @ right)).sum().item()
        return max(square, 0.0) ** 0.5

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        return LowRank(self.left.detach().to(device, dtype), self.right.detach().to(device, dtype))

    def rows(self, at: slice) -> Tensor:
        """The addition to the weight's rows ``at``: (rows, in)."""
        return self.left[at] @ self.right.T

    def product(self, keys: Tensor) -> Tensor:
        """The addition to what comes out (R, out), from what goes in (R, in), in this change's dtype."""
        return (keys.to(self.right.dtype) @ self.right) @ self.left.T


@dataclass(frozen=True, eq=False)
class Dense:
    """Adds ``weight`` (out, in), of a down-projection (hidden, inner), to a weight and ``bias`` (out,), where there is
    one, to its bias."""

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        bias = None if self.bias is None else tuple(self.bias.shape)
        if self.weight.ndim != 2 or bias not in (None, (self.weight.shape[0],)):
            raise ExperimentError(
                f"a dense change of weight {tuple(self.weight.shape)} and bias {bias}; "
                "give them as (hidden, inner) and (hidden,) or None, of gate and up as (inner, hidden) and (inner,)"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def norm(self) -> float:
        """Frobenius norm of weight and bias together."""
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        return sum(torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2 for tensor in tensors) ** 0.5

    def to(self, device: torch.device, dtype: torch.dtype) -> Dense:
        bias = None if self.bias is None else self.bias.detach().to(device, dtype)
        return Dense(self.weight.detach().to(device, dtype), bias)

    def rows(self, at: slice) -> Tensor:
        return self.weight[at]

    def product(self, keys: Tensor) -> Tensor:
        return torch.nn.functional.linear(keys.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Delta:
    """A change of a model's weights.

    Attributes:
        changes: The additions, ``LowRank`` or ``Dense``, to MLP down-projections by layer from 0, and to other
            projections by ``(layer, "up")`` and ``(layer, "gate")``.

    Raises:
        ExperimentError: for a change of another type, and for a layer that is not a number from 0.
    """

    changes: Mapping[Any, LowRank | Dense]  # by Place, which dicts of layers alone are no mapping of

    def __post_init__(self) -> None:
        changes = {}
        for place, change in self.changes.items():
            if not isinstance(change, LowRank | Dense):
                raise ExperimentError(
                    f"the change of layer {place!r} is a {type(change).__name__}; give a LowRank or a Dense"
                )
            changes[_checked(place)] = change
        ordered = sorted(changes.items(), key=lambda item: layer_and_projection(item[0]))
        object.__setattr__(self, "changes", dict(ordered))

    def __add__(self, other: Delta) -> Delta:
        """Both changes. Where two low-rank ones of a weight take more memory side by side than the whole matrix, they
        become a dense one."""
        changes = dict(self.changes)
        for place, change in other.changes.items():
            changes[place] = _sum(changes[place], change) if place in changes else change
        return Delta(changes)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it changes, in order."""
        return tuple(dict.fromkeys(layer_and_projection(place)[0] for place in self.changes))

    def at(self, layer: int) -> dict[str, LowRank | Dense]:
        """The changes of a layer by projection: ``"down"``, ``"gate"`` and ``"up"``."""
        places = {name: place_of(layer, name) for name in PROJECTIONS}
        return {name: self.changes[place] for name, place in places.items() if place in self.changes}

    @cached_property
    def norm(self) -> float:
        """Frobenius norm over the changes of all layers, biases included; no low-rank product is formed."""
        return sum(change.norm**2 for change in self.changes.values()) ** 0.5

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the changes to a safetensors file, whole or not at all; folders are made as needed.

        Args:
            path: The file, which is replaced if it exists. Dtypes are kept.
            metadata: Strings of your own, by name.

        Raises:
            ExperimentError: for metadata that are not strings, and for a file that cannot be written.
        """
        for name, value in (metadata or {}).items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise ExperimentError(
                    f"the metadata {name!r} is {value!r}; give strings by name, such as JSON of the value"
                )
            if name == LAYOUT.key:
                raise ExperimentError(f"the metadata {name!r} is the layout's own; give it another name")
        layout = replace(LAYOUT, version=2 if any(isinstance(place, tuple) for place in self.changes) else 1)
        layout.write(Path(path), *self.parts(), metadata)

    def parts(self) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
        """The tensors by name, and what describes them, of a file that holds the changes; ``of_parts`` takes them."""
        kinds = {cls: kind for kind, cls in _KINDS.items()}
        tensors = {
            f"layers.{place_name(place)}.{field}": tensor.detach().to(
                "cpu", copy=True
            )  # safetensors refuses shared memory
            for place, change in self.changes.items()
            for field, tensor in vars(change).items()
            if tensor is not None
        }
        return tensors, {"layers": {place_name(place): kinds[type(change)] for place, change in self.changes.items()}}

    @classmethod
    def of_parts(cls, tensors: Mapping[str, Tensor], layers: Mapping[str, str]) -> Delta:
        fields: dict[str, dict[str, Tensor]] = {place: {} for place in layers}
        for name, tensor in tensors.items():
            place, _, field = name.removeprefix("layers.").rpartition(".")
            fields[place][field] = tensor
        return cls({_named(place): _KINDS[kind](**fields[place]) for place, kind in layers.items()})

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read a file that ``save`` wrote, without its metadata.

        Args:
            path: The file.

        Returns:
            The delta, on the CPU.

        Raises:
            ExperimentError: naming a file that is missing, damaged or not a delta file.
        """
        return load_delta(path)[0]


def _sum(first: LowRank | Dense, second: LowRank | Dense) -> LowRank | Dense:
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        left, right = (torch.cat(pair, dim=1) for pair in ((first.left, second.left), (first.right, second.right)))
        if left.shape[1] * (len(left) + len(right)) <= len(left) * len(right):
            return LowRank(left, right)
        return Dense(left @ right.T)
    biases = [change.bias for change in (first, second) if isinstance(change, Dense) and change.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    return Dense(first.rows(slice(None)) + second.rows(slice(None)), bias)


_KINDS = {"low_rank": LowRank, "dense": Dense}

NOTHING = Delta({})


def load_delta(path: str | Path) -> tuple[Delta, dict[str, str]]:
    """The delta of a file that ``Delta.save`` wrote, on the CPU, and the user's metadata."""
    path = Path(path)
    tensors, description, metadata = LAYOUT.read(path)
    with LAYOUT.reading(path):
        return Delta.of_parts(tensors, description["layers"]), metadata


def place_name(place: Place) -> str:
    """As files name it: ``3``, or ``3.gate``."""
    return ".".join(map(str, place)) if isinstance(place, tuple) else str(place)


def _named(text: str) -> Place:
    layer, _, projection = text.partition(".")
    return place_of(int(layer), projection or "down")


def _checked(place: Any) -> Place:
    layer, projection = place if isinstance(place, tuple) and len(place) == 2 else (place, "down")
    try:
        number = -1 if isinstance(layer, bool) else operator.index(layer)
    except TypeError:
        number = -1
    if number < 0 or projection not in PROJECTIONS:
        raise ExperimentError(
            f"a delta has the layer {place!r}; layers are numbers from 0, for their down-projections, or pairs such as "
            "(3, 'gate') and (3, 'up')"
        )
    return place_of(number, projection)
