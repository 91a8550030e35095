"""Copies between host and device that nobody waits for: the host goes on to say what comes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
Array = TypeVar("Array", np.ndarray, Tensor)
"""Of index arrays: on the host, where they are made, or on the device."""


def on_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device. From the host it goes through pinned memory, which torch keeps until it is copied."""
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and host.device.type == "cpu":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


@dataclass(frozen=True)
class Packet:
    """Tuples, named ones as well, whose int32 arrays go to a device in one copy."""

    values: Any
    pinned: Tensor | None

    @classmethod
    def of(cls, values: Any, device: torch.device) -> Packet:
        arrays = _arrays(values)
        if device.type != "cuda":
            return cls(values, None)
        pinned = torch.empty(sum(map(_space, arrays)), dtype=torch.int32, pin_memory=True)
        for array, part in zip(arrays, pinned.split([*map(_space, arrays)]), strict=True):
            part.numpy()[: array.size] = array.ravel()
        return cls(values, pinned)

    def send(self, device: torch.device) -> Any:
        """The same tuples, with tensors on the device for arrays."""
        arrays = _arrays(self.values)
        if self.pinned is None:
            tensors = [torch.from_numpy(array).to(device) for array in arrays]
        else:
            parts = self.pinned.to(device, non_blocking=True).split([*map(_space, arrays)])
            tensors = [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]
        return _with(self.values, iter(tensors))


def send(values: Any, device: torch.device) -> Any:
    """The arrays of tuples on a device, after one copy."""
    return Packet.of(values, device).send(device)


def _space(array: np.ndarray) -> int:
    """Elements that an array takes in a packet: the next begins where kernels can read 16 bytes at once."""
    return -(-array.size // 4) * 4


def _arrays(values: Any) -> list[np.ndarray]:
    if isinstance(values, tuple):
        return [array for value in values for array in _arrays(value)]
    return [values] if isinstance(values, np.ndarray) else []


def _with(values: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(values, tuple):
        replaced = [_with(value, tensors) for value in values]
        return type(values)(*replaced) if hasattr(values, "_fields") else tuple(replaced)
    return next(tensors) if isinstance(values, np.ndarray) else values


def ahead(items: Iterator[Item], device: torch.device, depth: int = 2) -> Generator[Item]:
    """The items, made in a thread while those before are used, where the device computes beside the host."""
    if device.type != "cuda":
        yield from items
        return
    with ThreadPoolExecutor(1) as pool:
        made = deque(pool.submit(next, items, None) for _ in range(depth))
        try:
            while (item := made.popleft().result()) is not None:
                made.append(pool.submit(next, items, None))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Fetched:
    """Tensors on their way to the host, after what their device was given to do before."""

    tensors: tuple[Tensor, ...]
    copied: torch.cuda.Event | None

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they are there. What the device was given to do after them is not waited for."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensors


def fetch(*tensors: Tensor) -> Fetched:
    """Begin to copy tensors of one device to the host."""
    if tensors[0].device.type != "cuda":
        return Fetched(tuple(tensor.cpu() for tensor in tensors), None)
    copies = tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in tensors
    )
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensors[0].device))
    return Fetched(copies, copied)
