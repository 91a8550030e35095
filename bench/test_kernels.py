"""Times single operations in GPT-2-small sizes: ``pytest bench/test_kernels.py --benchmark-only``."""

import pytest
import torch
import torch.nn.functional as F

from causalcone.engine.branches import restoration_branches
from causalcone.engine.compiling import compile_plan
from causalcone.engine.cone import Shape
from causalcone.engine.interventions import CLEAN_AND_CORRUPTED
from causalcone.engine.options import DEFAULT_STATES
from causalcone.engine.states import as_states
from causalcone.kernels.attention import attend
from causalcone.kernels.linear import Linear
from causalcone.kernels.readout import Readout

WIDTH, INNER, HEADS, VOCABULARY, DEPTH = 768, 3072, 12, 50257, 12
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


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
def test_readout(benchmark, dtype):
    readout = Readout(torch.randn(VOCABULARY, WIDTH).to(dtype), None)
    benchmark(readout.target_log_probabilities, torch.randn(512, WIDTH).to(dtype), torch.arange(512))


def test_plan_compilation(benchmark):
    """A prompt of eight tokens whose subject is the first four: every default state, layer and token."""
    states = as_states(DEFAULT_STATES, HEADS)

    def compile_one():
        branches = restoration_branches(states, DEPTH, 0, tuple(range(8)), CLEAN_AND_CORRUPTED)
        return compile_plan(Shape(8, (0, 4), ((7,),)), branches.experiment, DEPTH)

    benchmark(compile_one)
