"""Residual sums, norms, readouts and steps of fine-tuning in Triton give what their torch forms give."""

from dataclasses import replace

import pytest
import torch
from helpers.kernel_cases import assert_near, assert_sums, devices, dtypes, random

from causalcone.kernels import adam, gathering, log_sums
from causalcone.kernels.adam import AdamState
from causalcone.kernels.backends import backends_of
from causalcone.kernels.gathering import NormedRows, RowSum
from causalcone.kernels.norms import LayerNorm, RMSNorm, unchanged
from causalcone.kernels.readout import Readout

pytest.importorskip("triton")

TRITON = backends_of("torch", "triton")
WIDTHS = pytest.mark.parametrize("width", [48, 64, 130])
NORMS = {
    "layer": lambda width, **like: LayerNorm(1 + 0.3 * random(width, **like), random(width, **like), 1e-5),
    "layer, no bias": lambda width, **like: LayerNorm(1 + 0.3 * random(width, **like), None, 1e-5),
    "layer, no weight": lambda width, **like: LayerNorm(None, None, 1e-3),
    "rms": lambda width, device, dtype: RMSNorm(1 + 0.3 * random(width, device=device), 1e-6),
    "rms of each head": lambda width, device, dtype: RMSNorm(1 + 0.3 * random(width // 2, device=device), 1e-6),
    "none": lambda width, **like: unchanged,
}
norms = pytest.mark.parametrize("name", NORMS)


def wide(norm):
    """The norm with weights in float32."""
    if not isinstance(norm, LayerNorm):
        return norm
    return LayerNorm(*(None if each is None else each.float() for each in (norm.weight, norm.bias)), norm.eps)


def index_of(count, rows, device, seed=0):
    return torch.randint(rows, (count,), generator=torch.Generator().manual_seed(seed)).to(device)


@devices
@dtypes
@WIDTHS
@norms
def test_gathered_and_normed(device, dtype, width, name):
    rows = 3 * random(9, width, device=device, dtype=dtype) + 1
    norm, index = NORMS[name](width, device=device, dtype=dtype), index_of(5, 9, device)
    found = TRITON.gather_normed(rows, index, norm)
    assert found.dtype == dtype
    assert_near(found, gathering.gather_normed(rows.float(), index, wide(norm)), dtype)


@devices
@dtypes
@WIDTHS
def test_sums(device, dtype, width):
    left, right = random(9, width, device=device, dtype=dtype), random(4, width, device=device, dtype=dtype, seed=1)
    index = index_of(6, 9, device), index_of(6, 4, device, 1)
    exact, found = (torch.empty(6, width, dtype=dtype, device=device) for _ in range(2))
    terms = RowSum(left, index[0], right, index[1])
    gathering.add_rows(terms, exact, 4)
    TRITON.add_rows(terms, found, 4)
    assert_sums(found, exact)


@devices
@dtypes
@norms
def test_sums_that_are_normed(device, dtype, name):
    width = 48
    left, right = random(9, width, device=device, dtype=dtype), random(4, width, device=device, dtype=dtype, seed=1)
    terms = RowSum(left, index_of(6, 9, device), right, index_of(6, 4, device, 1))
    norm, index = NORMS[name](width, device=device, dtype=dtype), torch.tensor([4, 0, 5], device=device)
    place = torch.tensor([1, -1, -1, -1, 0, 2], device=device)
    sums, normed = (torch.empty(n, width, dtype=dtype, device=device) for n in (6, 3))
    exact_sums, exact = torch.empty_like(sums), torch.empty_like(normed)
    TRITON.add_normed(terms, sums, NormedRows(index, place, norm, normed), 4)
    gathering.add_normed(terms, exact_sums, NormedRows(index, place, norm, exact), 2)
    assert_sums(sums, exact_sums)
    assert_near(normed, wide(norm)(sums[index].float()), dtype)
    assert_near(normed, exact, dtype)


@devices
def test_no_rows(device):
    rows, none = random(3, 16, device=device), torch.empty(0, dtype=torch.int64, device=device)
    norm = NORMS["layer"](16, device=device, dtype=torch.float32)
    out, normed = torch.empty(0, 16, device=device), torch.empty(0, 16, device=device)
    assert TRITON.gather_normed(rows, none, norm).shape == (0, 16)
    terms = RowSum(rows, none, rows, none)
    TRITON.add_rows(terms, out, 4)
    TRITON.add_normed(terms, out, NormedRows(none, none, norm, normed), 4)


@devices
@dtypes
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("targets", [(7,), (7, 3)], ids=["one target", "three targets"])
def test_log_sums(device, dtype, softcap, targets):
    """Two tiles, one after the other, as a readout takes them."""
    tiles = [5 * random(7, width, device=device, dtype=dtype, seed=width) for width in (40, 21)]
    wanted = index_of(7 * targets[-1], 61, device).view(*targets) if len(targets) > 1 else index_of(7, 61, device)
    results = []
    for add_tile in (TRITON.add_tile, log_sums.add_tile):
        total = torch.full((7,), float("-inf"), dtype=torch.float64, device=device)
        logits = torch.zeros(targets, dtype=torch.float64, device=device)
        for start, tile in zip((0, 40), tiles, strict=True):
            add_tile(tile.clone(), start, softcap, wanted, total, logits)
        results.append((total, logits))
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@devices
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_log_sums_of_what_is_not_finite(device, wrong):
    """They are not finite either, so that a pass which overflows is found out."""
    logits = random(2, 30, device=device)
    logits[1, 3] = wrong
    total = torch.full((2,), float("-inf"), dtype=torch.float64, device=device)
    own = torch.zeros(2, dtype=torch.float64, device=device)
    for start in (0, 30):
        TRITON.add_tile(logits, start, None, torch.tensor([0, 0], device=device), total, own)
    assert torch.isfinite(total[0])
    assert torch.isnan(total[1])


@devices
@pytest.mark.parametrize("vocabulary", [16, 64])
def test_readout(device, vocabulary):
    readout = Readout(random(50, 12, device=device), random(50, device=device), 4, vocabulary, softcap=4.0)
    states, targets = random(9, 12, device=device, seed=1), index_of(9, 50, device)
    exact = readout.target_log_probabilities(states, targets)
    found = replace(readout, backends=TRITON).target_log_probabilities(states, targets)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@devices
@dtypes
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_steps_of_finetuning(device, dtype, rows):
    """The gradient is that of the rows as they are, not rounded to their dtype."""
    hidden, inner, lr, bound = 40, 70, 1e-3, 2e-3
    exact, found = (AdamState.zeros_like(torch.empty(hidden, inner, device=device), torch.float32) for _ in range(2))
    for number in range(3):
        slopes = random(rows, hidden, device=device, dtype=dtype, seed=2 * number)
        keys = random(rows, inner, device=device, dtype=dtype, seed=2 * number + 1)
        adam.step_weight(exact, slopes, keys, lr, bound)
        TRITON.step_weight(found, slopes, keys, lr, bound)
    for own, other in zip(vars(found).values(), vars(exact).values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-3 * lr)
    assert found.change.abs().max() <= bound + 1e-9


@pytest.mark.parametrize("bound", [2e-3, float("inf")])
def test_steps_of_a_weight_of_several_tiles(bound):
    """Two steps are those of torch's Adam, clamped."""
    hidden, inner, rows, lr = 300, 4000, 3, 1.5e-3
    weight = torch.zeros(hidden, inner, dtype=torch.float64, requires_grad=True)
    expected, moving = torch.optim.Adam([weight], lr=lr), AdamState.zeros_like(weight, torch.float64)
    for seed in range(2):
        slopes, keys = (random(rows, width, dtype=torch.float64, seed=seed) for width in (hidden, inner))
        adam.step_weight(moving, slopes, keys, lr, bound)
        weight.grad = slopes.T @ keys
        expected.step()
        weight.data.clamp_(-bound, bound)
    torch.testing.assert_close(moving.change, weight.detach(), rtol=1e-12, atol=1e-18)
    assert moving.steps == 2


@devices
def test_a_gradient_that_is_not_a_number_is_seen(device):
    moving = AdamState.zeros_like(torch.empty(3, 4, device=device), torch.float32)
    TRITON.step_weight(moving, torch.full((1, 3), torch.nan, device=device), random(1, 4, device=device), 0.1, 0.1)
    assert torch.isnan(moving.change).all()
