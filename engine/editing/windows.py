"""Windows of layers that are edited together (METHODS 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from causalcone.engine.errors import ExperimentError


@dataclass(frozen=True)
class Window:
    """The layers that are edited, in order; ``layer`` is their centre and ``size`` how many were asked for."""

    layer: int
    size: int
    layers: tuple[int, ...]

    @classmethod
    def around(cls, layer: int, size: int, depth: int) -> Window:
        """``size`` layers centred on ``layer``, as far as the model has them."""
        check_layer(layer, depth)
        if size < 1:
            raise ExperimentError(f"window is {size}; give at least one layer")
        return cls(layer, size, tuple(range(max(0, layer - size // 2), min(depth, layer - (-size // 2)))))

    @classmethod
    def of(cls, layers: Iterable[int], depth: int) -> Window:
        """A list of layers; their centre is the middle one, as in a window of that size."""
        own = tuple(layers)
        for layer in own:
            check_layer(layer, depth)
        if not own or list(own) != sorted(set(own)):
            raise ExperimentError(
                f"the window {own} is not a list of different layers in order; give one such as (3, 4)"
            )
        return cls(own[len(own) // 2], len(own), own)


def check_layer(layer: int, depth: int) -> None:
    if not 0 <= layer < depth:
        raise ExperimentError(f"there is no layer {layer}; the model has layers 0 to {depth - 1}")
