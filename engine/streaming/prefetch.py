"""Reading ahead: while a pass computes with one layer's weights, a thread reads those of the next."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from causalcone.engine.streaming.tensor_files import Entry, read_rows, read_values

_ALIGNED = 64
"""Vector instructions like addresses to be multiples of this number of bytes."""


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
            self.on_device = [torch.empty(elements, dtype=dtype, device=device) for _ in range(2)]
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
            self.on_device[slot].copy_(self.host[slot], non_blocking=True)
            self.copied[slot].record(self.stream)

    def take(self, slot: int) -> Tensor:
        torch.cuda.current_stream(self.device).wait_event(self.copied[slot])
        return self.on_device[slot]

    def release(self, slot: int) -> None:
        self.released[slot].record(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        self.stream.synchronize()


@dataclass(frozen=True)
class WeightLayout:
    """Where a layer's tensors lie in one flat buffer of a dtype: the first element of each, and the buffer's size."""

    entries: tuple[Entry, ...]
    first: tuple[int, ...]
    elements: int

    @classmethod
    def of(cls, entries: Sequence[Entry], dtype: torch.dtype) -> WeightLayout:
        step = _ALIGNED // dtype.itemsize
        *first, elements = accumulate((-(-entry.elements // step) * step for entry in entries), initial=0)
        return cls(tuple(entries), tuple(first), elements)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer that they have been read into."""
        placed = zip(self.first, self.entries, strict=True)
        return [buffer[first : first + entry.elements].view(entry.shape) for first, entry in placed]

    def read(self, buffer: Tensor) -> None:
        """Fill a buffer on the CPU from the files."""
        for entry, view in zip(self.entries, self.views(buffer), strict=True):
            read_values(entry, [(0, view.view(-1))])


def read_layers(layouts: Sequence[WeightLayout], dtype: torch.dtype, device: torch.device) -> Generator[list[Tensor]]:
    """The tensors of one layer after another, each read once, the next one while the caller works with this one.

    They are good until the following layer is asked for: two buffers take turns. To be closed when the caller is done.
    """
    elements = max(layout.elements for layout in layouts)
    on_cuda = device.type == "cuda"
    buffers = CudaLanding(elements, dtype, device) if on_cuda else HostLanding(elements, dtype)

    def read(layer: int) -> None:
        buffers.wait(layer % 2)
        layouts[layer].read(buffers.host[layer % 2])
        buffers.land(layer % 2)

    with closing(buffers), ThreadPoolExecutor(1, "causalcone-weights") as executor:
        coming = executor.submit(read, 0)
        for layer, layout in enumerate(layouts):
            coming.result()
            if layer + 1 < len(layouts):
                coming = executor.submit(read, layer + 1)
            yield layout.views(buffers.take(layer % 2))
            buffers.release(layer % 2)


class StreamedMatrix:
    """A matrix (rows, columns) in a file of which slices of rows are read, in ``dtype`` and onto ``device``.

    The slice after the one that was asked for is read meanwhile, so that walking through the matrix does not wait.
    """

    def __init__(self, entry: Entry, dtype: torch.dtype, device: torch.device) -> None:
        self.entry, self.dtype, self.device, self.shape = entry, dtype, device, torch.Size(entry.shape)
        self._executor: ThreadPoolExecutor | None = None
        self._coming: tuple[slice, Future[Tensor]] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows_slice: slice) -> Tensor:
        """Rows (R, columns) of a slice without a step."""
        first, last, _ = rows_slice.indices(len(self))
        coming, self._coming = self._coming, None
        known = coming and coming[0] == slice(first, last)
        rows = coming[1].result() if coming and known else self._read(first, last)
        if first < last < len(self):
            after = slice(last, min(2 * last - first, len(self)))
            self._executor = self._executor or ThreadPoolExecutor(1, "causalcone-unembedding")
            self._coming = after, self._executor.submit(self._read, after.start, after.stop)
        return rows.to(self.device, non_blocking=True)

    def new_empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*size, dtype=dtype or self.dtype, device=self.device)

    def _read(self, first: int, last: int) -> Tensor:
        rows = read_rows(self.entry, range(first, last), self.dtype)
        return rows.pin_memory() if self.device.type == "cuda" else rows
