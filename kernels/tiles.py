"""How long stages are walked: in pieces that stay in cache, of few distinct sizes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

SMALLEST = 64
"""CPU libraries compile and keep code for every distinct number of rows, so row counts are multiples of this."""


@dataclass(frozen=True)
class Tiles:
    """How large the pieces are in which a pass walks its stages: rows of a matrix product, key rows gathered for
    attention, and rows x vocabulary of the readout."""

    rows: int = 1024
    keys: int = 4096
    readout_rows: int = 512
    vocabulary: int = 4096


def pieces(count: int, tile: int, device: torch.device) -> Iterator[slice]:
    """On a CPU full tiles, then quarters of quarters, then what is left; on other devices few and even ones."""
    start = 0
    if device.type != "cpu" and count:
        tile = -(-count // -(-count // tile))
        yield from (slice(first, min(first + tile, count)) for first in range(0, count, tile))
        return
    while start < count:
        while tile > SMALLEST and tile > count - start:
            tile = max(SMALLEST, tile // 4)
        yield slice(start, min(start + tile, count))
        start += tile
