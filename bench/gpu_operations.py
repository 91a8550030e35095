"""What a GPU is asked for, operation by operation, and how long each would take at assumed rates.

Operations are those of the engine itself, which runs on a pretended device that has shapes and no values, so that
models of any size are on it at once. What a Triton kernel reads and writes is said here (``KERNEL_BYTES``); of other
operations every tensor is taken to be read or written once, and nothing to stay in a cache.
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
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from causalcone.engine.run import forward, session
from causalcone.engine.run.runner import PassRunner
from causalcone.kernels.fused import row_attention
from causalcone.kernels.row_attention import BatchShape, RunRows

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from helpers.pretended_cuda import META, pretended_cuda, tensors_in

ATTEND = row_attention._attend
PRODUCTS = {"linear", "mm", "addmm", "_addmm_activation"}
ATTENTION = ("bmm", "_softmax", "_scaled_dot_product")
"""How the names of attention's operations begin, on the way back as well."""
BY_INDEX = {"index_select", "index", "embedding", "gather"}
"""Operations that read as many elements as they give, wherever these lie."""


@dataclass(frozen=True)
class Device:
    """What is published of a device: bfloat16 products (dense, FLOP/s), float32 and float64 ones, bytes per second; its
    SMs, bytes of shared memory of each, and memory in GiB as it is there for use; and where that is published."""

    name: str
    capability: int
    peak: float
    peak_float32: float
    peak_float64: float
    bandwidth: float
    sms: int
    shared: int
    memory: int
    source: str

    def products(self, itemsize: int) -> float:
        peaks = {2: BFLOAT16 * self.peak, 4: FLOAT32 * self.peak_float32, 8: FLOAT64 * self.peak_float64}
        return peaks[itemsize]


H100 = Device("H100", 90, 989.4e12, 67e12, 67e12, 3.35e12, 132, 227 * 1024, 79, "NVIDIA H100 datasheet, SXM5 80 GB")
H200 = Device("H200", 90, 989.4e12, 67e12, 67e12, 4.8e12, 132, 227 * 1024, 139, "NVIDIA H200 datasheet, SXM 141 GB")
A100 = Device("A100", 80, 312e12, 19.5e12, 19.5e12, 2.039e12, 108, 163 * 1024, 79, "NVIDIA A100 datasheet, SXM4 80 GB")

# Of an H100 these are 800, 50 and 29 TFLOP/s, and 2.6 and 3 TB/s; other devices have the same shares of theirs.
BFLOAT16, FLOAT32, FLOAT64 = 800 / 989.4, 50 / 67, 29 / 67
ROWS, OPERANDS, SOLVES = 2.6 / 3.35, 3 / 3.35, 0.2 / 3.35
KERNEL, PRODUCT, UPLOAD, PCIE, PROGRAM = 2.5e-6, 3e-6, 4e-6, 25e9, 2e-6
THIN = 16
HOST = {"operation": 8e-6, "upload": 25e-6, "triton": 30e-6}
ASSUMED = (
    ("products, bfloat16", "800 TFLOP/s of an H100, 81 % of the peak; float32 50, float64 29"),
    (
        "a product's shape",
        "tiles of 128 x 256, in whole waves over the SMs; x in / (in + 250); not split along the sum",
    ),
    (
        "a product at least",
        "its operands at 3 TB/s, 90 % of the bandwidth, and 3 us; of under 16 rows or columns just that",
    ),
    ("row operations", "2.6 TB/s, 78 % of the bandwidth; a kernel at least 2.5 us"),
    ("attention", "a program takes 2 us; as many at once as registers and shared memory of its compiled form allow"),
    ("an upload", "4 us on the device, and 25 GB/s"),
    ("the host", "8 us an operation, 25 us an upload, 30 us a Triton launch"),
    ("plans and index arrays", "the time of a thread as measured on the machine that runs the simulation"),
    ("triangular solves", "0.2 TB/s, 6 % of the bandwidth"),
)
"""What is assumed, of an H100; of other devices the same shares of their published peaks and bandwidths."""


@dataclass(frozen=True)
class Runs:
    """Programs of attention, each over ``keys`` keys and ``rows`` rows of queries, all ``width`` values wide;
    ``kernel``: the arguments and options that it is compiled for."""

    programs: int
    keys: int
    rows: int
    width: int
    itemsize: int
    kernel: tuple[Any, ...]


@dataclass(frozen=True)
class Operation:
    """asked: the functions of the package that asked for it; part: of the time that it belongs to; kind: what it is to
    the host; moved: bytes read and written; product: rows, in and out; host: seconds of the host that were measured."""

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
        """Of products with weights, as the engine counts them."""
        return 2 * math.prod(self.product) if self.product and self.part != "factors" else 0

    def seconds(self, device: Device) -> float:
        """On the device."""
        if self.kind in ("wait", "index"):
            return 0.0
        if self.kind == "upload":
            return UPLOAD + self.moved / PCIE
        if self.product and self.kind == "operation":
            operands = self.moved / (OPERANDS * device.bandwidth)
            return PRODUCT + max(operands, _product(*self.product, self.itemsize, device))
        if self.name == "linalg_cholesky_ex":
            return (self.moved / 2 / self.itemsize) ** 1.5 / 3 / device.products(self.itemsize)
        moving = self.moved / device.bandwidth / (SOLVES if self.name == "cholesky_solve" else ROWS)
        return max(KERNEL, moving + sum(_attention(runs, device) for runs in self.runs))


def _product(rows: int, wide: int, out: int, itemsize: int, device: Device) -> float:
    if min(rows, out) < THIN:
        return 0.0
    waves = math.ceil(math.ceil(rows / 128) * math.ceil(out / 256) / device.sms)
    return waves * 2 * 128 * 256 * (wide + 250) / (device.products(itemsize) / device.sms)


def _attention(runs: Runs, device: Device) -> float:
    """Limited by how many bytes of keys and values all programs that fit the SMs have under way."""
    seen = 2 * runs.keys * runs.width * runs.itemsize
    under_way = blocks_per_sm(runs.kernel, device) * device.sms * seen
    moved = runs.programs * (seen + 2 * runs.rows * runs.width * runs.itemsize)
    return moved / min(OPERANDS * device.bandwidth, under_way / PROGRAM)


@cache
def blocks_per_sm(kernel: tuple[Any, ...], device: Device) -> int:
    """How many blocks of the attention kernel an SM holds, by the registers and the memory that its form takes."""
    arguments, options = kernel
    target = GPUTarget("cuda", device.capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    compiled = ATTEND.warmup(*arguments, grid=(1,), **dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = -(-int(re.search(r"REG:(\d+)", said)[1]) // 8) * 8
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    return min(2048 // threads, 65536 // (registers * threads), 32, device.shared // shared if shared else 32)


def held(*tensors: Tensor) -> int:
    """Bytes of the elements that tensors really have: of one that is repeated, one."""
    return sum(
        tensor.element_size()
        * math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
        for tensor in tensors
    )


def moved(name: str, args: Any, kwargs: Any, made: Any) -> int:
    """Bytes that one of torch's operations reads and writes."""
    given = tensors_in(args, {key: value for key, value in kwargs.items() if key != "out"})
    made = tensors_in(made)
    if name in BY_INDEX:
        return 2 * held(*made) + held(*given[1:])
    if name in ("fill_", "zero_"):
        return held(given[0])
    if name == "copy_":
        return held(*given)
    if name in ("index_put_", "_index_put_impl_"):
        return held(*given[1:], given[-1])
    return held(*given, *made)


KERNEL_BYTES: dict[str, Callable[[Any, dict[str, Any]], int]] = {
    "triton_gather": lambda args, options: 2 * held(args[2]) + held(args[1]),
    "triton_add": lambda args, options: 3 * held(args[6]) + held(args[1], args[4]) + options["NORMED"] * held(args[7]),
    "triton_add_tile": lambda args, options: held(args[0]),
    "triton_turn": lambda args, options: 4 * held(args[0][:, : options["HEADS"] * options["PAIRS"]]) + held(args[2]),
    "triton_gate": lambda args, options: 2 * held(args[0]) + held(args[1]),
    "triton_step": lambda args, options: 2 * held(*args[:3]) + held(*args[3:5]),
}
"""By kernel: bytes of what it reads and writes, from its arguments. Others read or write every argument once."""


@dataclass
class Recording:
    """What the device is asked for, in order. planning: seconds of the host for plans."""

    operations: list[Operation] = field(default_factory=list)
    planning: float = 0.0
    _known: dict[Operation, Operation] = field(default_factory=dict)

    def hear(self, name: str, given: Any, made: Any) -> None:
        asked = asking()
        part = part_of(name, asked)
        if name == "wait":
            self._add(Operation(name, asked, "host", "wait"))
        elif name == "upload":
            self._add(Operation(name, asked, "uploads", "upload", held(*given)))
        elif name == "triton_attend":
            self._add(Operation(name, asked, part, "triton", runs=self._launched(*given)))
        elif name.startswith("triton"):
            _, args, options = given
            size = KERNEL_BYTES.get(name, lambda args, _: held(*tensors_in(args)))(args, options)
            product = (args[0].shape[0], len(args[3]), args[0].shape[1]) if name == "triton_step" else None
            self._add(Operation(name, asked, part, "triton", size, product))
        else:
            args, kwargs = given or ((), {})
            size, product, itemsize = moved(name, args, kwargs, made), None, 2
            if tensors := tensors_in(made):
                itemsize = tensors[0].element_size()
            if name in PRODUCTS and "LowRank.norm" not in asked:
                left = args[1] if "addmm" in name else args[0]
                product = left.numel() // left.shape[-1], left.shape[-1], made.shape[-1]
            self._add(Operation(name, asked, part, "operation", size, product, itemsize))

    def _add(self, operation: Operation) -> None:
        self.operations.append(self._known.setdefault(operation, operation))

    def attending(self, attend_rows: Callable[..., None]) -> Callable[..., None]:
        """Attention, whose runs are noted for the launches that follow."""

        def attend(queries: Tensor, keys_values: Tensor, runs: RunRows[Tensor], *rest: Any) -> None:
            self._left, self._alike = list(runs.batches), iter(runs.alike)
            attend_rows(queries, keys_values, runs, *rest)
            assert not self._left

        return attend

    def _launched(self, grid: Any, args: Any, options: dict[str, Any]) -> tuple[Runs, ...]:
        """The runs of a launch, of one size after the other: those no larger than it that no launch before took."""
        programs, sharing = options["GROUPS"] * args[10], options["SHARING"]
        own: list[BatchShape] = []
        while sum(batch.runs for batch in own) < grid[0] // programs:
            alike = next(self._alike)
            fit = [batch for batch in self._left if batch.queries <= alike.queries and batch.keys <= alike.keys]
            assert sum(batch.runs for batch in fit) == alike.runs
            self._left = [batch for batch in self._left if batch not in fit]
            own += fit
        compiled_for = tuple(arg.dtype if isinstance(arg, Tensor) else arg for arg in args)
        kernel = compiled_for, tuple(sorted(options.items()))
        width, itemsize = options["HEAD_DIM"], args[0].element_size()
        return tuple(
            Runs(batch.runs * programs, batch.keys, batch.queries * sharing, width, itemsize, kernel) for batch in own
        )

    def indexing(self, make: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The index arrays of layers, which are made in a thread of their own, and measured there."""

        def timed(*args: Any) -> Iterator[Any]:
            began = thread_time()
            for rows in make(*args):
                self._add(Operation("index arrays", "pass_rows", "host", "index", host=thread_time() - began))
                yield rows
                began = thread_time()

        return timed

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
    return "attention" if name.startswith(ATTENTION) or "attention." in asked.partition(" < ")[0] else "rows"


@contextmanager
def recording() -> Iterator[Recording]:
    """Within it this process has a CUDA device of shapes without values; gives what that is asked for."""
    recorded = Recording()
    with pretended_cuda(META) as counts:
        counts.hear = recorded.hear
        with (
            mock.patch.object(row_attention, "attend_rows", recorded.attending(row_attention.attend_rows)),
            mock.patch.object(forward, "layer_rows", recorded.indexing(forward.layer_rows)),
            mock.patch.object(PassRunner, "plan", recorded.plan(PassRunner.plan)),
            mock.patch.object(session, "verify_model"),  # there are no values to compare
        ):
            yield recorded


@dataclass
class Times:
    """Seconds: of the device by part; of the host; and until both are done, working beside each other."""

    parts: dict[str, float]
    host: float
    total: float

    @property
    def device(self) -> float:
        return sum(self.parts.values())

    @property
    def bound_by(self) -> str:
        return "host" if self.host > self.device else max(self.parts, key=lambda part: self.parts[part])

    def onward(self, more: Times, times: int) -> Times:
        """These and, so many times, what ``more`` takes longer."""

        def on(few: float, many: float) -> float:
            return few + times * (many - few)

        parts = {part: on(self.parts.get(part, 0.0), seconds) for part, seconds in more.parts.items()}
        return Times(parts, on(self.host, more.host), on(self.total, more.total))


def times(operations: Iterable[Operation], device: Device) -> Times:
    """The device begins an operation when the host has asked for it and those before are done."""
    asked = done = host = 0.0
    parts: dict[str, float] = {}
    known: dict[Operation, float] = {}
    for operation in operations:
        if operation.kind == "wait":
            asked = max(asked, done)
            continue
        if operation not in known:
            known[operation] = operation.seconds(device)
        spent = HOST.get(operation.kind, 0.0) + operation.host
        host, asked = host + spent, asked + spent
        done = max(done, asked) + known[operation]
        parts[operation.part] = parts.get(operation.part, 0.0) + known[operation]
    parts.pop("host", None)
    return Times(parts, host, max(asked, done))
