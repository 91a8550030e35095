"""How a long stage is walked: in pieces that stay in cache, of few distinct sizes."""

from __future__ import annotations

from collections.abc import Iterator

SMALLEST = 64
"""CPU libraries compile and keep code for every distinct number of rows, so row counts are multiples of this."""


def pieces(count: int, tile: int) -> Iterator[slice]:
    """Full tiles, then quarters of quarters, then what is left."""
    start = 0
    while start < count:
        while tile > SMALLEST and tile > count - start:
            tile = max(SMALLEST, tile // 4)
        yield slice(start, min(start + tile, count))
        start += tile
