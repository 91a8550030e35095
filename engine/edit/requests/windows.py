"""Windows of layers that are edited together (docs/editing.md, "What is computed")."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import Any

from causalcone.engine.errors import ExperimentError


@dataclass(frozen=True)
class Window:
    """The edited layers, in order; ``layer`` is their centre and ``size`` the requested number of them; listed: whether
    they were given one by one."""

    layer: int
    size: int
    layers: tuple[int, ...]
    listed: bool = False

    @classmethod
    def around(cls, layer: int, size: int, depth: int) -> Window:
        """``size`` layers centred on ``layer``, as far as the model has them."""
        check_layer(layer, depth)
        if not isinstance(size, int) or size < 1:
            raise ExperimentError(f"window is {size!r}; give a whole number of layers, at least one")
        return cls(layer, size, tuple(range(max(0, layer - size // 2), min(depth, layer - (-size // 2)))))

    @classmethod
    def of(cls, layers: Iterable[int], depth: int) -> Window:
        """A list of layers; their centre is the middle one, as in a window of that size."""
        numbers = tuple(_number(layer, depth) for layer in layers)
        if not numbers or list(numbers) != sorted(set(numbers)):
            raise ExperimentError(
                f"the window {numbers} is not a list of different layers in order; give one such as (3, 4)"
            )
        return cls(numbers[len(numbers) // 2], len(numbers), numbers, listed=True)


def check_layer(layer: int, depth: int) -> None:
    if not 0 <= layer < depth:
        raise ExperimentError(f"there is no layer {layer}; the model has layers 0 to {depth - 1}")


def as_layers(layers: Any, depth: int) -> tuple[int, ...]:
    """Different layers, by number, or ``"all"``."""
    return tuple(_number(layer, depth) for layer in _items(layers, depth))


def as_windows(layers: Any, size: int, depth: int) -> list[Window]:
    """Windows of a size by their centres, or ``"all"``; or lists of layers, one for each window."""
    return [
        Window.of(item, depth) if isinstance(item, Iterable) else Window.around(_number(item, depth), size, depth)
        for item in _items(layers, depth)
    ]


def _items(layers: Any, depth: int) -> list[Any]:
    if isinstance(layers, str):
        if layers != "all":
            raise ExperimentError(f"layers are {layers!r}; give numbers from 0 to {depth - 1}, or 'all'")
        return list(range(depth))
    items = list(layers) if isinstance(layers, Iterable) else [layers]
    if not items or len({tuple(item) if isinstance(item, Iterable) else item for item in items}) < len(items):
        raise ExperimentError(f"layers are {items}; give at least one, and each only once")
    return items


def _number(layer: Any, depth: int) -> int:
    try:
        number = index(layer)
    except TypeError:
        raise ExperimentError(f"the layer {layer!r} is not a whole number") from None
    check_layer(number, depth)
    return number
