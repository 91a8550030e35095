"""Where weights land that are read from files: in memory on the CPU, or through pinned memory on a CUDA device."""

from __future__ import annotations

import torch
from torch import Tensor


class HostLanding:
    """Two buffers in memory, which are read into and computed with."""

    def __init__(self, elements: int, dtype: torch.dtype, pinned: bool = False) -> None:
        with torch.inference_mode(False):  # or the thread that reads, which is not in that mode, could not write them
            self.host = [torch.empty(elements, dtype=dtype, pin_memory=pinned) for _ in range(2)]

    def wait(self, slot: int) -> None:
        """Called by the reader before it writes a buffer: until that may be written."""

    def land(self, slot: int) -> None:
        """Called by the reader once a buffer is full."""

    def take(self, slot: int) -> Tensor:
        """Called by who computes: the buffer on the device of the pass."""
        return self.host[slot]

    def release(self, slot: int) -> None:
        """Called by who computes, once nothing more is computed with a buffer."""

    def close(self) -> None:
        """Called when nobody reads any more."""


class CudaLanding(HostLanding):
    """Two pinned buffers, and two on the device: copies have a stream of their own, so that they run beside kernels."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(elements, dtype, pinned=True)
        self.device = device
        with torch.inference_mode(False), torch.cuda.device(device):
            self.own = [torch.empty(elements, dtype=dtype, device=device) for _ in range(2)]
            self.stream = torch.cuda.Stream(device)
            self.copied = [torch.cuda.Event() for _ in range(2)]
            self.released = [torch.cuda.Event() for _ in range(2)]
            # the buffers' memory may still be in use by kernels in front of this pass
            for slot in range(2):
                self.release(slot)

    def wait(self, slot: int) -> None:
        self.copied[slot].synchronize()

    def land(self, slot: int) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_event(self.released[slot])
            self.own[slot].copy_(self.host[slot], non_blocking=True)
            self.copied[slot].record(self.stream)

    def take(self, slot: int) -> Tensor:
        torch.cuda.current_stream(self.device).wait_event(self.copied[slot])
        return self.own[slot]

    def release(self, slot: int) -> None:
        self.released[slot].record(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        self.stream.synchronize()


def landing(elements: int, dtype: torch.dtype, device: torch.device) -> HostLanding:
    """Buffers of so many elements for a pass on a device."""
    if device.type == "cuda":
        return CudaLanding(elements, dtype, device)
    return HostLanding(elements, dtype)
