"""Weights of convolutions whose norms are not computed from products of matrices."""

import pytest
import torch
from torch import nn

import cabs_torch
from cabs_torch.norms.convolution import Convolution
from tests.torch.models import squares
from tests.torch.reference import assert_exact

WIDE = {
    "one axis": (lambda: nn.Conv1d(64, 64, 9, padding=3, dilation=2), (17,)),
    "two axes": (lambda: nn.Conv2d(80, 96, 5, padding=2), (6, 7)),
    "no padding": (lambda: nn.Conv2d(128, 96, (3, 5), dilation=(2, 1)), (7, 8)),
    "a row of a kernel": (lambda: nn.Conv2d(96, 96, (1, 7), padding=(0, 3)), (3, 7)),
    "three axes": (lambda: nn.Conv3d(96, 96, 3, padding=1), (3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(64, 64, 5, padding=2), (6, 6)),
}


LARGE = {
    "two axes": (lambda: nn.Conv2d(9, 12, 3, padding=1), (12, 13)),
    "stride and dilation": (lambda: nn.Conv2d(8, 8, 3, stride=(2, 1), dilation=(1, 2)), (15, 14)),
    "more padding than kernel": (lambda: nn.Conv2d(16, 8, 2, padding=(3, 2)), (9, 9)),
    "groups": (lambda: nn.Conv2d(6, 9, 3, groups=3), (9, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(9, 8, 3, 2, 1, 1, groups=1), (8, 9)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(16, 16, 3, 2, 1, groups=2), (8, 9)),
}


def is_exact_by(way, case, dtype, monkeypatch):
    """Assert that a layer is exact; return how often a method was used for that."""
    torch.manual_seed(0)
    build, size = case
    layer = build()
    used, method = [], getattr(Convolution, way)
    monkeypatch.setattr(
        Convolution, way, lambda term, *given: used.append(1) or method(term, *given)
    )
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten()).to(dtype)
    inputs = torch.randn(5, layer.in_channels, *size, dtype=dtype)
    assert_exact(model, squares, inputs, torch.randn(5, dtype=dtype))
    return len(used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WIDE)
def test_pairs_of_positions_are_exact(name, dtype, monkeypatch):
    assert is_exact_by("_squares_in_pairs", WIDE[name], dtype, monkeypatch) == 1


@pytest.mark.parametrize("name", LARGE)
def test_a_convolution_with_groups_for_examples_is_exact(name, monkeypatch):
    assert is_exact_by("_convolved", LARGE[name], torch.float32, monkeypatch) >= 1


OTHERS = {
    "more output padding than stride": (
        lambda: nn.ConvTranspose2d(8, 8, 3, padding=1, output_padding=1, dilation=2),
        (6, 6),
    ),
    "the same, three axes": (
        lambda: nn.ConvTranspose3d(8, 8, 2, output_padding=1, dilation=2),
        (4, 3, 4),
    ),
    "three axes": (lambda: nn.Conv3d(8, 8, (2, 3, 2)), (5, 6, 7)),
    "a row": (lambda: nn.Conv2d(16, 16, (1, 5)), (4, 12)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_fast_convolution_gives_is_exact_too(name, monkeypatch):
    assert is_exact_by("_convolved", OTHERS[name], torch.float32, monkeypatch) == 0


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
