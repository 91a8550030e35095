"""What a block computes beside its products: heads turned by their positions, gated MLPs, activations."""

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_cases import assert_near, devices, dtypes, random

from causalcone.kernels import gating, rotary
from causalcone.kernels.backends import backends_of
from causalcone.kernels.linear import Linear
from causalcone.kernels.rotary import Rotary, RotaryFrequencies, Turned

pytest.importorskip("triton")

TRITON = backends_of("torch", "triton")
POSITIONS, HEAD_DIM = torch.tensor([0, 3, 3, 40, 1]), 12


def frequencies(pairs, device):
    return (100.0 ** -(torch.arange(pairs) / pairs)).to(device)


def table(pairs, interleaved, device, dtype):
    """Sines and cosines side by side, as GPT-J holds them."""
    made = Rotary.of(frequencies(pairs, device), 50, dtype)
    sin, cos = torch.cat([made.sin, made.cos], dim=1).chunk(2, dim=1)
    return Rotary(cos, sin, interleaved)


ROTARIES = {
    "neighbours": lambda device, dtype: table(4, True, device, dtype),
    "three pairs of neighbours": lambda device, dtype: table(3, True, device, dtype),
    "halves": lambda device, dtype: table(4, False, device, dtype),
    "frequencies": lambda device, dtype: RotaryFrequencies(frequencies(6, device), 1.3),
}
rotaries = pytest.mark.parametrize("name", ROTARIES)


@devices
@dtypes
@rotaries
@pytest.mark.parametrize("heads", [1, 3])
def test_turned_in_place(device, dtype, name, heads):
    """And nothing beside the heads that are turned."""
    wide = random(5, 4 * HEAD_DIM, device=device, dtype=dtype)
    positions, before = POSITIONS.to(device), wide.clone()
    exact = wide.float()
    rotary.turn(exact[:, : heads * HEAD_DIM], positions, ROTARIES[name](device, torch.float32), HEAD_DIM)
    TRITON.turn(wide[:, : heads * HEAD_DIM], positions, ROTARIES[name](device, dtype), HEAD_DIM)
    assert_near(wide, exact, dtype)
    assert torch.equal(wide[:, heads * HEAD_DIM :], before[:, heads * HEAD_DIM :])
    assert not torch.equal(wide[1:, :HEAD_DIM], before[1:, :HEAD_DIM])


@devices
@rotaries
def test_turned_and_back(device, name):
    rotated = ROTARIES[name](device, torch.float32)
    scaling = getattr(rotated, "scaling", 1.0)
    rows = random(5, 2 * HEAD_DIM, device=device)
    n = 2 * rotated.cos_sin(POSITIONS.to(device), torch.float32)[0].shape[1]
    expected = rows.unflatten(1, (2, -1)).clone()
    expected[..., :n] *= scaling**2
    for way in (rotated, rotated.back):
        TRITON.turn(rows, POSITIONS.to(device), way, HEAD_DIM)
    torch.testing.assert_close(rows, expected.flatten(1), rtol=1e-5, atol=1e-5)


@rotaries
def test_the_gradient_of_turning(name):
    exact = ROTARIES[name]("cpu", torch.float64)
    if isinstance(exact, RotaryFrequencies):
        exact = RotaryFrequencies(exact.inverse.double(), exact.scaling)
    rows = random(5, 2 * HEAD_DIM, dtype=torch.float64).requires_grad_()
    before = rows.detach().clone()
    assert torch.autograd.gradcheck(lambda rows: Turned.apply(rows, POSITIONS, exact, HEAD_DIM, rotary.turn), rows)
    assert torch.equal(rows, before)


@devices
@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", torch.tanh])
def test_gated(device, dtype, activation, monkeypatch):
    """Rows of which the last program has fewer than it could take."""
    monkeypatch.setattr("causalcone.kernels.linear.packs", lambda weight: False)
    rows, weight = random(7, 8, device=device, dtype=dtype), 2 * random(900, 8, device=device, dtype=dtype)
    found = random(7, 900, device=device, dtype=dtype, seed=1)
    exact = found.float()
    gating.gate(exact, Linear(weight.float(), None, activation), rows.float())
    TRITON.gate(found, Linear(weight, None, activation), rows)
    assert_near(found, exact, dtype)


@devices
def test_no_rows(device):
    none = torch.empty(0, HEAD_DIM, device=device)
    TRITON.turn(none, POSITIONS[:0].to(device), ROTARIES["halves"](device, torch.float32), HEAD_DIM)
    TRITON.gate(none, Linear(random(HEAD_DIM, HEAD_DIM, device=device), None, "silu"), none)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "gelu"])
def test_activations_after_products(device, dtype, biased, activation):
    """In the product itself where CUDA has it: one operation in bfloat16, with a bias."""
    rows, weight, bias = random(5, 16, dtype=dtype), random(9, 16, dtype=dtype), random(9, dtype=dtype)
    product = Linear(weight.cuda(), bias.cuda() if biased else None, activation)
    if device is not None:
        device.reset()
    with torch.inference_mode():
        found = product(rows.cuda())
    if device is not None:
        within = dtype == torch.bfloat16 and biased and activation != "gelu"
        assert sum(device.operations.values()) == (1 if within else 2)
    exact = F.linear(rows.float(), weight.float(), bias.float() if biased else None)
    plain = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    assert_near(found.cpu(), plain(exact), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False])
def test_products_go_where_they_are_to_be(biased):
    weight, rows = random(9, 16).cuda(), random(5, 16).cuda()
    product = Linear(weight, random(9).cuda() if biased else None)
    space = torch.full((9, 9), 7.0, device="cuda")
    with torch.inference_mode():
        assert product(rows, space[2:7]).data_ptr() == space[2:7].data_ptr()
    assert torch.equal(space[2:7], product(rows))
    assert (space[:2] == 7).all()
    assert (space[7:] == 7).all()


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 13, 33, 65, 129, 300])
def test_products_of_any_number_of_rows(rows):
    """Filled up with rows of nothing as far as the library likes it, and cut again."""
    weight, bias, given = random(9, 24), random(9), random(rows, 24, seed=1)
    product = Linear(weight, bias)
    torch.testing.assert_close(product(given), F.linear(given, weight, bias), rtol=1e-5, atol=1e-5)
    given.requires_grad_()
    (found,) = torch.autograd.grad(product(given).square().sum(), given)
    exact = 2 * F.linear(given.detach(), weight, bias) @ weight
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)
