"""What a GPU is asked for, operation by operation, and how long each would take at assumed rates.

Operations are those of the engine itself, run on a pretended device that has shapes and no values. What a Triton
kernel reads and writes is said here (``KERNEL_BYTES``); of the others every tensor is taken to be read or written once.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from time import thread_time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from helpers.pretended_cuda import META, pretended_cuda, tensors_in
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from causalcone.engine.run import forward, session
from causalcone.engine.run.runner import PassRunner
from causalcone.kernels.fused import row_attention
from causalcone.kernels.row_attention import RunRows

ATTEND = row_attention._attend
PRODUCTS = {"linear", "mm", "addmm"}
BY_INDEX = {"index_select", "index", "embedding", "gather"}
"""Operations that read as many elements as they give, wherever these lie."""
ATTENTION = {"bmm", "_softmax", "_softmax_backward_data", "scaled_dot_product_attention"}


@dataclass(frozen=True)
class Device:
    """Rates: products (FLOP/s) by bytes of a number; bytes a second of row operations, of a product's operands, and of
    attention at most; SMs, and what each has of shared memory; the device's memory, all in bytes."""

    name: str
    capability: int
    products: dict[int, float]
    rows: float
    operands: float
    attention: float
    sms: int
    shared: int
    memory: float


def _scaled(name: str, capability: int, peak: float, bandwidth: float, sms: int, shared: int, memory: float) -> Device:
    """A device at the shares of its published peak and bandwidth that are assumed of an H100."""
    compute, moved = peak / 989.4e12, bandwidth / 3.35e12
    products = {2: 800e12 * compute, 4: 50e12 * (compute if capability == 90 else 19.5 / 67), 8: 29e12 * compute}
    return Device(name, capability, products, 2.6e12 * moved, 3e12 * moved, 3e12 * moved, sms, shared, memory)


A100 = _scaled("A100", 80, 312e12, 2.039e12, 108, 164 * 1024, 79e9)
H100 = _scaled("H100", 90, 989.4e12, 3.35e12, 132, 227 * 1024, 79e9)
H200 = _scaled("H200", 90, 989.4e12, 4.8e12, 132, 227 * 1024, 139e9)

KERNEL, UPLOAD, PCIE, PROGRAM = 2.5e-6, 4e-6, 25e9, 2e-6
TRIANGULAR = 0.16
"""Of the bandwidth, what a triangular solve with one column reaches."""
HOST = {"operation": 8e-6, "upload": 25e-6, "triton": 30e-6, "wait": 0.0, "index": 0.0}


@dataclass(frozen=True)
class Runs:
    """Programs of attention, each over ``keys`` keys and as many ``rows`` of queries, of ``width`` values of
    ``itemsize`` bytes; ``kernel`` is the compiled form that computes them."""

    programs: int
    keys: int
    rows: int
    width: int
    itemsize: int
    kernel: tuple[Any, ...]


@dataclass(frozen=True)
class Operation:
    """asked: the function of the package that asked for it; part: of the time that it belongs to; kind: what it is to
    the host; moved: bytes read and written; product: rows, in and out; host: seconds of the host besides."""

    name: str
    asked: str
    part: str
    kind: str = "operation"
    moved: int = 0
    product: tuple[int, int, int] | None = None
    itemsize: int = 2
    runs: tuple[Runs, ...] = ()
    host: float = 0.0

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.product) if self.product else 0

    def seconds(self, device: Device) -> float:
        """On the device."""
        if self.kind in ("wait", "index"):
            return 0.0
        if self.kind == "upload":
            return UPLOAD + self.moved / PCIE
        if self.product:
            return max(_product(*self.product, self.itemsize, device), self.moved / device.operands) + 3e-6
        if self.runs:
            return max(KERNEL, sum(_attention(runs, device) for runs in self.runs))
        if self.name == "linalg_cholesky_ex":
            return (self.moved / 16) ** 1.5 / 3 / device.products[8]
        share = TRIANGULAR if self.name == "cholesky_solve" else 1.0
        return max(KERNEL, self.moved / (share * device.rows))


def _product(rows: int, wide: int, out: int, itemsize: int, device: Device) -> float:
    """Tiles of 128 x 256 in waves over the SMs; short sums take longer by 250 elements more."""
    waves = math.ceil(math.ceil(rows / 128) * math.ceil(out / 256) / device.sms)
    return waves * 2 * 128 * 256 * (wide + 250) / (device.products[itemsize] / device.sms)


def _attention(runs: Runs, device: Device) -> float:
    """Limited by how many bytes all programs that fit the SMs have under way, while each takes ``PROGRAM``."""
    seen = 2 * runs.keys * runs.width * runs.itemsize
    under_way = blocks_per_sm(runs.kernel, device.capability, device.shared) * device.sms * seen
    moved = runs.programs * (seen + 2 * runs.rows * runs.width * runs.itemsize)
    return moved / min(device.attention, under_way / PROGRAM)


@cache
def blocks_per_sm(kernel: tuple[Any, ...], capability: int, shared: int) -> int:
    """How many blocks of a form of the attention kernel an SM holds, by the registers that it is compiled to."""
    arguments, options = kernel
    none = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(none)
    compiled = ATTEND.warmup(*arguments, grid=(1,), **dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\d+)", said)[1])
    threads, metadata = 32 * compiled.metadata.num_warps, compiled.metadata
    by_shared = shared // metadata.shared if metadata.shared else 32
    return min(2048 // threads, 65536 // (-(-registers // 8) * 8 * threads), 32, by_shared)


def held(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor really has: of those that are repeated, one."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return tensor.element_size() * math.prod(sizes)


def moved(name: str, args: Any, kwargs: Any, made: Any) -> int:
    """Bytes that one of torch's operations reads and writes."""
    given = tensors_in(args, {key: value for key, value in kwargs.items() if key != "out"})
    made = tensors_in(made)
    if name in BY_INDEX:
        return 2 * sum(map(held, made)) + sum(map(held, given[1:]))
    if name in ("fill_", "zero_"):
        return held(given[0])
    if name == "copy_":
        return sum(map(held, given))
    if name in ("index_put_", "_index_put_impl_"):
        return sum(map(held, given[1:])) + held(given[-1])
    return sum(map(held, given)) + sum(map(held, made))


def _added(args: Any, options: dict[str, Any]) -> int:
    rows, into = args[6], args[7]
    return 3 * held(rows) + held(into) * options["NORMED"]


KERNEL_BYTES: dict[str, Callable[[Any, dict[str, Any]], int]] = {
    "triton_gather": lambda args, options: 2 * held(args[2]),
    "triton_add": _added,
    "triton_add_tile": lambda args, options: held(args[0]),
    "triton_step": lambda args, options: 2 * sum(map(held, args[:3])) + sum(map(held, args[3:5])),
}
"""By kernel: bytes of what it reads and writes, from its arguments. Others read or write every argument once."""


@dataclass
class Recording:
    """What the device is asked for, in order; ``planning``: seconds of the host for plans."""

    operations: list[Operation] = field(default_factory=list)
    planning: float = 0.0
    _known: dict[Operation, Operation] = field(default_factory=dict)
    _attended: Iterator[tuple[Runs, ...]] = iter(())

    def hear(self, name: str, given: Any, made: Any) -> None:
        asked = asking()
        if name == "wait":
            self._add(Operation(name, asked, "host", "wait"))
        elif name == "upload":
            self._add(Operation(name, asked, "uploads", "upload", held(given[0])))
        elif name == "triton_attend":
            grid, args, options = given
            self._add(Operation(name, asked, "attention", "triton", runs=self._launched(grid, args, options)))
        elif name.startswith("triton"):
            _, args, options = given
            size = KERNEL_BYTES.get(name, lambda args, options: sum(map(held, tensors_in(args))))(args, options)
            self._add(Operation(name, asked, part_of(name, asked), "triton", size))
        else:
            args, kwargs = given or ((), {})
            self._add(self._of_torch(name, asked, args, kwargs, made))

    def _of_torch(self, name: str, asked: str, args: Any, kwargs: Any, made: Any) -> Operation:
        size, product, itemsize = moved(name, args, kwargs, made), None, 2
        if name in PRODUCTS:
            left = args[1] if name == "addmm" else args[0]
            product, itemsize = (left.numel() // left.shape[-1], left.shape[-1], made.shape[-1]), made.element_size()
        return Operation(name, asked, part_of(name, asked), moved=size, product=product, itemsize=itemsize)

    def _add(self, operation: Operation) -> None:
        self.operations.append(self._known.setdefault(operation, operation))

    def attending(self, attend_rows: Callable[..., None]) -> Callable[..., None]:
        """Attention, whose runs are kept for the launches that follow."""

        def attend(queries: Tensor, keys_values: Tensor, runs: RunRows[Tensor], *rest: Any) -> None:
            self._batches, self._alike = runs.batches, iter(runs.alike)
            self._left = list(runs.batches)
            attend_rows(queries, keys_values, runs, *rest)
            assert not self._left

        return attend

    def _launched(self, grid: Any, args: Any, options: dict[str, Any]) -> tuple[Runs, ...]:
        """The runs of a launch: those no larger than its largest that no launch before took."""
        alike = next(self._alike)
        own = [batch for batch in self._left if batch.queries <= alike.queries and batch.keys <= alike.keys]
        assert sum(batch.runs for batch in own) == alike.runs
        self._left = [batch for batch in self._left if batch not in own]
        types = tuple(arg.dtype if isinstance(arg, Tensor) else arg for arg in args)
        kernel = types, tuple(sorted(options.items()))
        blocks, sharing = grid[0] // alike.runs, options["SHARING"]
        width, itemsize = options["HEAD_DIM"], args[0].element_size()
        return tuple(
            Runs(batch.runs * blocks, batch.keys, batch.queries * sharing, width, itemsize, kernel) for batch in own
        )

    def ahead(self, make: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """What is made ahead in a thread is measured there: the index arrays of layers."""

        def timed(items: Iterator[Any]) -> Iterator[Any]:
            began = thread_time()
            for item in items:
                self._add(Operation("index arrays", "engine.run.pass_rows", "host", "index", host=thread_time() - began))
                yield item
                began = thread_time()

        return lambda items, *rest: make(timed(items), *rest)

    def plan(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = thread_time()
            made = make(*args)
            self.planning += thread_time() - began
            return made

        return timed


def asking() -> str:
    """The innermost functions of the package on the stack, at most three."""
    frame, found = sys._getframe(1), ["backward"] if torch._C._current_graph_task_id() != -1 else []
    while frame is not None and len(found) < 3:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("causalcone."):
            found.append(f"{module.rpartition('.')[2]}.{frame.f_code.co_qualname.replace('.<locals>', '')}")
        frame = frame.f_back
    return " < ".join(found)


def part_of(name: str, asked: str) -> str:
    if "moments." in asked:
        return "factors"
    if name == "triton_add_tile" or "readout." in asked:
        return "readout"
    if name in PRODUCTS:
        return "products"
    return "attention" if name in ATTENTION or asked.startswith("attention.") else "rows"


@contextmanager
def recording() -> Iterator[Recording]:
    """Within it this process has a CUDA device of shapes without values; gives what it is asked for."""
    recorded = Recording()
    with pretended_cuda(META) as counts:
        counts.hear = recorded.hear
        with (
            mock.patch.object(row_attention, "attend_rows", recorded.attending(row_attention.attend_rows)),
            mock.patch.object(forward, "ahead", recorded.ahead(forward.ahead)),
            mock.patch.object(PassRunner, "plan", recorded.plan(PassRunner.plan)),
            mock.patch.object(session, "verify_model", lambda *_: None),  # there are no values to compare
        ):
            yield recorded


@dataclass
class Times:
    """Seconds: of the device by part, of the host, and of both, where they work beside each other."""

    parts: dict[str, float]
    host: float
    wall: float

    @property
    def device(self) -> float:
        return sum(self.parts.values())


def times(operations: Iterable[Operation], device: Device) -> Times:
    """The device begins an operation when the host has asked for it and those before are done."""
    host = busy = 0.0
    parts: dict[str, float] = {}
    asking_for = 0.0
    known: dict[Operation, float] = {}
    for operation in operations:
        if operation.kind == "wait":
            host = max(host, busy)
            continue
        spent = HOST[operation.kind] + operation.host
        host, asking_for = host + spent, asking_for + spent
        seconds = known.get(operation)
        if seconds is None:
            seconds = known[operation] = operation.seconds(device)
        busy = max(busy, host) + seconds
        parts[operation.part] = parts.get(operation.part, 0.0) + seconds
    return Times(parts, asking_for, max(host, busy))
