"""Copies between host and device that nobody waits for: the host goes on to say what comes next."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def on_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device. From the host it goes through pinned memory, which torch keeps until it is copied."""
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and host.device.type == "cpu":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


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
