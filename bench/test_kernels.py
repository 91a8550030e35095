"""Times single operations in GPT-2-small sizes: ``pytest bench/test_kernels.py --benchmark-only``.

Those that have a Triton form are timed in both forms on a CUDA device, where there is one, in the sizes of a pass.
"""

import pytest
import torch
import torch.nn.functional as F
from kernel_times import runs_together

from causalcone.engine.localize.causal_tracing import restoration_grid
from causalcone.engine.localize.options import DEFAULT_STATES
from causalcone.engine.localize.states import as_states
from causalcone.engine.plan.compiler import compile_plan
from causalcone.engine.plan.cone import Shape
from causalcone.engine.plan.interventions import CLEAN_AND_CORRUPTED
from causalcone.kernels.adam import AdamState
from causalcone.kernels.attention import attend
from causalcone.kernels.backends import TORCH, backends_of
from causalcone.kernels.gathering import NormedRows, RowSum
from causalcone.kernels.linear import Linear
from causalcone.kernels.norms import LayerNorm, RMSNorm
from causalcone.kernels.readout import Readout
from causalcone.kernels.row_attention import ScoreRule

WIDTH, INNER, HEADS, VOCABULARY, DEPTH = 768, 3072, 12, 50257, 12
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
ROWS = 65_536 if ON_CUDA else 1024
BACKENDS = pytest.mark.parametrize(
    "backends", [TORCH, *([backends_of("triton", "triton")] if ON_CUDA else [])], ids=("torch", "triton")[: 1 + ON_CUDA]
)


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.inference_mode():
        yield


@DTYPES
@pytest.mark.parametrize("form", ["engine", "torch"])
@pytest.mark.parametrize("rows", [512, 1024, 4096])
def test_up_projection_with_gelu(benchmark, form, rows, dtype):
    x, weight, bias = torch.randn(rows, WIDTH).to(dtype), torch.randn(INNER, WIDTH).to(dtype), torch.zeros(INNER)
    bias = bias.to(dtype)
    if form == "engine":
        benchmark(Linear(weight, bias, "gelu_tanh"), x)
    else:
        benchmark(lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh"))


@DTYPES
@pytest.mark.parametrize("queries", [1, 8])
def test_attention_over_eight_tokens(benchmark, queries, dtype):
    q = torch.randn(512, queries, HEADS, WIDTH // HEADS).to(dtype)
    k, v = (torch.randn(512, 8, HEADS, WIDTH // HEADS).to(dtype) for _ in range(2))
    visible = torch.arange(8) <= torch.arange(8 - queries, 8)[:, None]
    benchmark(attend, q, k, v, visible, 0.125)


@DTYPES
@BACKENDS
@pytest.mark.parametrize("queries", [1, 8])
@pytest.mark.parametrize("keys", [8, 40])
def test_row_attention(benchmark, backends, queries, keys, dtype):
    """Runs that share a random half of their key rows with all others."""
    runs, rows = ROWS // 8, ROWS
    q, kv = (rows_of(rows, width, dtype) for width in (WIDTH, 2 * WIDTH))
    key_rows = torch.randint(rows, (runs, keys), device=DEVICE)
    key_rows[:, : keys // 2] = key_rows[0, : keys // 2]
    query_rows = torch.randint(rows, (runs, queries), device=DEVICE)
    out = torch.empty(runs * queries, WIDTH, dtype=dtype, device=DEVICE)
    runs_of = runs_together(query_rows, key_rows, tuple(range(keys - queries, keys)))
    arguments = (runs_of, ScoreRule(WIDTH // HEADS, 0.125), out)
    benchmark(timed(backends.attend_rows), q, kv, *arguments, 262_144 if ON_CUDA else 4096)


@DTYPES
@BACKENDS
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gathered_and_normed(benchmark, backends, norm, dtype):
    rows, index = rows_of(ROWS, WIDTH, dtype), torch.randperm(ROWS, device=DEVICE)
    benchmark(timed(backends.gather_normed), rows, index, norm_of(norm, dtype))


@DTYPES
@BACKENDS
@pytest.mark.parametrize("normed", [False, True], ids=["sum", "sum and norm"])
def test_sums(benchmark, backends, normed, dtype):
    left, right, out, into = (rows_of(ROWS, WIDTH, dtype) for _ in range(4))
    index = torch.randperm(ROWS, device=DEVICE)
    terms = RowSum(left, index, right, index)
    if normed:
        places = torch.arange(ROWS, device=DEVICE)
        norm = norm_of("layer", dtype)
        benchmark(timed(backends.add_normed), terms, out, NormedRows(places, places, norm, into), ROWS)
    else:
        benchmark(timed(backends.add_rows), terms, out, ROWS)


@DTYPES
@BACKENDS
def test_readout(benchmark, backends, dtype):
    rows = 8192 if ON_CUDA else 512
    readout = Readout(rows_of(VOCABULARY, WIDTH, dtype), None, rows, backends=backends)
    targets = torch.arange(rows, device=DEVICE)
    benchmark(timed(readout.target_log_probabilities), rows_of(rows, WIDTH, dtype), targets)


@BACKENDS
def test_step_of_finetuning(benchmark, backends):
    moving = AdamState.zeros_like(torch.empty(WIDTH, INNER, device=DEVICE), torch.float32)
    slopes, keys = rows_of(12, WIDTH, torch.float32), rows_of(12, INNER, torch.float32)
    benchmark(timed(backends.step_weight), moving, slopes, keys, 5e-4, 1e-4)


def rows_of(rows, width, dtype):
    return torch.randn(rows, width, device=DEVICE).to(dtype)


def norm_of(name, dtype):
    weight = torch.ones(WIDTH, device=DEVICE)
    return LayerNorm(weight.to(dtype), weight.to(dtype), 1e-5) if name == "layer" else RMSNorm(weight, 1e-6)


def timed(function):
    """The function until its results are there."""

    def whole(*arguments):
        function(*arguments)
        if ON_CUDA:
            torch.cuda.synchronize()

    return whole


def test_plan_compilation(benchmark):
    """A prompt of eight tokens whose subject is the first four: every default state, layer and token."""
    states = as_states(DEFAULT_STATES)

    def compile_one():
        grid = restoration_grid(states, DEPTH, 0, tuple(range(8)), CLEAN_AND_CORRUPTED)
        return compile_plan(Shape(8, (0, 4), ((7,),)), grid.experiment, DEPTH)

    benchmark(compile_one)
