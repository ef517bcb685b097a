"""Weights of convolutions whose norms are sums over pairs of positions."""

import pytest
import torch
from torch import nn

import cabs_torch
from cabs_torch.windows import Windows
from tests.torch.models import squares
from tests.torch.reference import assert_exact

WIDE = {
    "one axis": (lambda: nn.Conv1d(64, 64, 9, padding=3, dilation=2), (17,)),
    "two axes": (lambda: nn.Conv2d(40, 48, 5, padding=2), (6, 7)),
    "no padding": (lambda: nn.Conv2d(64, 64, (3, 5), dilation=(2, 1)), (7, 8)),
    "a row of a kernel": (lambda: nn.Conv2d(40, 40, (1, 7), padding=(0, 3)), (3, 7)),
    "three axes": (lambda: nn.Conv3d(96, 96, 3, padding=1), (3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(64, 64, 5, padding=2), (6, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WIDE)
def test_pairs_of_positions_are_exact(name, dtype, monkeypatch):
    torch.manual_seed(0)
    build, size = WIDE[name]
    layer = build()
    used = []
    in_pairs = Windows._square_sum_in_pairs
    monkeypatch.setattr(
        Windows,
        "_square_sum_in_pairs",
        lambda term, chunk: used.append(term) or in_pairs(term, chunk),
    )
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten()).to(dtype)
    inputs = torch.randn(5, layer.in_channels, *size, dtype=dtype)
    assert_exact(model, squares, inputs, torch.randn(5, dtype=dtype))
    assert len(used) == 1


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_pairs_of_positions_that_cancel_are_formed_instead(offset):
    torch.manual_seed(0)
    layer = nn.Conv2d(48, 48, 5, bias=False)
    inputs = torch.randn(4, 48, 10, 10) + offset
    outputs = layer(inputs)
    factors = torch.randn_like(outputs)
    factors -= factors.mean(dim=(2, 3), keepdim=True)
    expected = 0.0
    for x, f in zip(inputs.double(), factors.double(), strict=True):
        weight = layer.weight.detach().double().requires_grad_()
        (nn.functional.conv2d(x[None], weight) * f).sum().backward()
        expected += float(weight.grad.square().sum())
    statistics = cabs_torch.backward((outputs * factors).sum(dim=(1, 2, 3)))
    assert float(statistics.group_square_sum) == pytest.approx(
        expected, rel=2e-3 if offset else 1e-5
    )
