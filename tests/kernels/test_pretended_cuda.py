"""The pretended CUDA device refuses and counts what a real one would."""

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_two_devices_in_one_operation():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)
    assert (torch.ones(2, device="cuda") + torch.tensor(1.0)).cpu().tolist() == [2, 2]


def test_the_devices_memory_is_not_the_hosts():
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(2, device="cuda").numpy()


@pytest.mark.parametrize(
    "waiting",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: bool(tensor[0] > 0),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor.cpu(),
        lambda tensor: torch.ones(2).to(tensor.device),
    ],
    ids=["item", "list", "bool", "mask", "nonzero", "download", "pageable upload"],
)
def test_what_is_waited_for(waiting):
    tensor = torch.ones(2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            waiting(tensor)
        assert (torch.ones(2).pin_memory().to("cuda", non_blocking=True) + tensor).device.type == "cuda"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_operations_and_uploads_are_counted(device):
    if device is None:
        pytest.skip("a real device counts nothing")
    device.reset()
    here = torch.ones(4).pin_memory().to("cuda", non_blocking=True)
    (here.view(2, 2) + 1).mul_(2)
    assert {name: count for (name, _), count in device.operations.items()} == {"add": 1, "mul_": 1}
    assert {kind: count for (kind, _), count in device.uploads.items()} == {"pinned": 1}


def test_gradients_reach_the_host():
    leaf = torch.ones(2, requires_grad=True)
    (leaf.pin_memory().to("cuda", non_blocking=True) * 3).sum().backward()
    assert leaf.grad.tolist() == [3, 3]


def test_a_device_without_values(device, monkeypatch):
    """It holds what no machine does; what is read from it are zeros, and true."""
    if device is None:
        pytest.skip("a real device has values")
    monkeypatch.setattr(device, "home", torch.device("meta"))
    product = torch.zeros(2**24, 2**20, device="cuda") @ torch.ones(2**20, 3).cuda()
    assert (product.shape, product.device.type) == ((2**24, 3), "cuda")
    assert product[:2, 0].tolist() == product[:2, 0].cpu().tolist() == [0, 0]
    assert product[0].sum().item() == 0
    assert (product[0] > 1).all().item()
    assert torch.empty(3, pin_memory=True).copy_(product[0], non_blocking=True).tolist() == [0, 0, 0]
