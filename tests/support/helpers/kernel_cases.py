"""What the tests of kernels share: where they run, and how near they have to come to the torch form."""

import os

import pytest
import torch

from causalcone.kernels.row_attention import run_rows
from causalcone.kernels.transfer import Packet

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Allowed difference from the float32 result, relative to its largest value."""

_INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
DEVICES = [pytest.param("cpu", marks=_INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu(real=True))]

devices = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_sums(found, exact):
    """They are equal, but for the interpreter's bfloat16, which it cuts off where CUDA rounds to the nearest."""
    if found.dtype == torch.bfloat16 and found.device.type == "cpu":
        torch.testing.assert_close(found, exact, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, exact)


def random(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def assert_near(found, exact, dtype):
    """``found`` is finite and differs from ``exact``, computed in float32, by rounding of ``dtype`` alone."""
    assert found.shape == exact.shape
    if not exact.numel():
        return
    assert torch.isfinite(found).all()
    difference = (found.double() - exact.double()).abs().max().item()
    assert difference <= TOLERANCE[dtype] * exact.double().abs().max().item()


def runs_together(*batches):
    """``RunRows`` of batches of query rows, key rows and querying tokens."""
    device = batches[0][0].device
    rows = run_rows([(queries.cpu().numpy(), keys.cpu().numpy(), tokens, True) for queries, keys, tokens in batches])
    return Packet.of(rows, device).send(device)
