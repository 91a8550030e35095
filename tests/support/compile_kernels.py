"""Compiles every kernel for a CUDA device, in the forms that passes use, on a machine that need not have one.

Run as a script: ``compile_kernels.py COMPUTE_CAPABILITY``, such as 90. Prints the names of the kernels compiled.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from causalcone.kernels.adam import AdamState
from causalcone.kernels.backends import backends_of
from causalcone.kernels.gathering import NormedRows, RowSum
from causalcone.kernels.linear import Linear
from causalcone.kernels.norms import LayerNorm, RMSNorm
from causalcone.kernels.rotary import Rotary, RotaryFrequencies
from causalcone.kernels.row_attention import ScoreRule, run_rows
from causalcone.kernels.transfer import Packet

CPU = torch.device("cpu")

TRITON = backends_of("triton", "triton")

SHARED_BYTES = 163 * 1024
"""What a block may have of an SM's shared memory on an A100; an H100 has more."""

REGISTERS = 65_536
"""Of an SM."""

SPILLED_BYTES, WARPS = 16, 12
"""The most that a thread may spill of its registers, and the fewest warps that an SM may hold at a time: fewer have too
little under way."""

ATTENTIONS = (
    (2, 2, 64, 1, None, None),
    (4, 1, 80, 40, 30.0, 8),
    (4, 1, 128, 1, None, None),
    (2, 2, 64, 3, None, None),
    (2, 2, 256, 3, None, None),
    (4, 1, 128, 12, None, None),
    (2, 2, 256, 1, None, None),
    (2, 2, 256, 12, None, None),
    (2, 1, 256, 40, 50.0, 8),
)
"""Heads, key heads, head size, querying tokens, soft cap and window: as in GPT-2, GPT-J, Llama and Gemma."""


def only_compile(capability: int) -> set[str]:
    """From here on, launches compile and do no more; returns the names of what they compile, a set that grows."""
    names: set[str] = set()
    seen: set[str] = set()
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    launch = jit.JITFunction.run

    def run(self, *arguments, warmup, **options):
        compiled = launch(self, *arguments, warmup=True, **options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_BYTES, self.__name__
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            check(compiled, (self.__name__, options))
        names.add(self.__name__)

    jit.JITFunction.run = run
    return names


def check(compiled, name) -> None:
    """Few of a thread's registers are spilled, and an SM holds enough warps."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("REG", "STACK"))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    held = min(REGISTERS // (-(-registers // 8) * 8 * 32), SHARED_BYTES // (shared + 1024) * warps)
    assert stack <= SPILLED_BYTES, (name, stack)
    assert held >= WARPS, (name, registers, shared)


def launch_all(dtype: torch.dtype) -> None:
    index = torch.arange(4, dtype=torch.int32)

    def rows(width, count=4):
        return torch.empty(count, width, dtype=dtype)

    for heads, groups, head_dim, m, softcap, window in ATTENTIONS:
        batch = (np.zeros((2, m), dtype=np.int32), np.zeros((2, 50), dtype=np.int32), tuple(range(50 - m, 50)), True)
        runs = Packet.of(run_rows([batch]), CPU).send(CPU)
        scoring, out = ScoreRule(head_dim, 0.125, softcap, window), rows(heads * head_dim, 2 * m)
        queries, keys_values = rows(heads * head_dim), rows(2 * groups * head_dim)
        TRITON.attend_rows(queries, keys_values, runs, scoring, out, 1)
    for width in (96, 4096, 8192):
        for norm in (LayerNorm(rows(width)[0], rows(width)[0], 1e-5), RMSNorm(torch.empty(width), 1e-6)):
            TRITON.gather_normed(rows(width), index, norm)
            terms = RowSum(rows(width), index, rows(width), index)
            TRITON.add_normed(terms, rows(width), NormedRows(index[:2], index, norm, rows(width, 2)), 1)
        TRITON.add_rows(terms, rows(width), 1)
    for heads, head_dim, pairs, interleaved in ((16, 256, 32, True), (32, 128, 64, False), (3, 80, 10, False)):
        cos, sin = rows(2 * pairs, 64).chunk(2, dim=1)
        for rotary in (Rotary(cos, sin, interleaved), RotaryFrequencies(torch.empty(pairs), 1.0)):
            TRITON.turn(rows(2 * heads * head_dim)[:, : heads * head_dim], index, rotary, head_dim)
    for activation in ("silu", "gelu_tanh"):
        gating = Linear(rows(8, 14336), None, activation)
        gating.packed = None  # as on a device
        TRITON.gate(rows(14336), gating, rows(8))
    sums = torch.zeros(4, dtype=torch.float64)
    for softcap in (None, 30.0):
        for width in (1000, 8192):
            TRITON.add_tile(rows(width), 0, softcap, index, sums, sums.clone())
    TRITON.step_weight(AdamState.zeros_like(torch.empty(40, 96), torch.float32), rows(40), rows(96), 1e-3, 1e-3)


if __name__ == "__main__":
    compiled = only_compile(int(sys.argv[1]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        launch_all(dtype)
    print(*sorted(compiled))
