"""Statistics of random networks, against a float64 loop over the examples."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.torch.models import Residual, cross_entropy, squares
from tests.torch.reference import assert_exact

batches = st.integers(2, 7)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])
activations = st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus])


@settings(max_examples=60)
@given(
    seeds,
    batches,
    dtypes,
    activations,
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.booleans(),
)
def test_matrices_are_exact(seed, examples, dtype, activation, widths, bias):
    torch.manual_seed(seed)
    layers = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following, bias=bias), activation()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    inputs = torch.randn(examples, widths[0], dtype=dtype)
    targets = torch.randint(widths[-1], (examples,))
    assert_exact(model, cross_entropy, inputs, targets)


class Positions(nn.Module):
    """Two matrices over any number of positions, which may be moved to another axis between."""

    def __init__(self, width, hidden, move):
        super().__init__()
        self.first, self.second, self.move = nn.Linear(width, hidden), nn.Linear(hidden, 2), move

    def forward(self, inputs):
        hidden = self.first(inputs).tanh()
        if self.move == "sequence first":
            return self.second(hidden.movedim(0, -2)).movedim(-2, 0)
        if self.move == "flatten":
            return self.second(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])
        if self.move == "flatten sequence first":
            moved = hidden.movedim(0, -2)
            return self.second(moved.flatten(0, -2)).unflatten(0, moved.shape[:-1]).movedim(-2, 0)
        return self.second(hidden)


@settings(max_examples=60)
@given(
    seeds,
    batches,
    st.lists(st.integers(1, 6), max_size=2),
    st.integers(1, 8),
    st.integers(1, 40),
    st.sampled_from(["", "sequence first", "flatten", "flatten sequence first"]),
    dtypes,
)
def test_matrices_over_positions_are_exact_wherever_the_examples_lie(
    seed, examples, positions, width, hidden, move, dtype
):
    torch.manual_seed(seed)
    inputs = torch.randn(examples, *positions, width, dtype=dtype)
    assert_exact(
        Positions(width, hidden, move).to(dtype), squares, inputs, torch.randn(examples).to(dtype)
    )


@pytest.mark.parametrize("move", ["", "sequence first", "flatten", "flatten sequence first"])
def test_as_many_positions_as_examples_are_not_confused(move):
    torch.manual_seed(0)
    assert_exact(Positions(3, 4, move), squares, torch.randn(5, 5, 3), torch.randn(5))


@st.composite
def convolutions(draw):
    """Draw a convolution of one to three axes and an input that it can take."""
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    same = draw(st.booleans())
    settings = {
        "in_channels": groups * draw(st.sampled_from([1, 2, 3, 9])),
        "out_channels": groups * draw(st.sampled_from([1, 2, 3, 9])),
        "kernel_size": kernel,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "stride": 1 if same else [draw(st.integers(1, 3)) for _ in range(rank)],
        "padding": "same" if same else [draw(st.integers(0, size)) for size in kernel],
    }
    size = [draw(st.integers(least, least + 4)) for least in reach]
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](**settings), size


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@settings(max_examples=100)
@given(seeds, batches, convolutions(), dtypes)
def test_convolutions_are_exact(seed, examples, drawn, dtype):
    layer, size = drawn
    torch.manual_seed(seed)
    layer.reset_parameters()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten()).to(dtype)
    inputs = torch.randn(examples, layer.in_channels, *size, dtype=dtype)
    assert_exact(model, squares, inputs, torch.randn(examples).to(dtype))


@given(seeds, st.integers(2, 6))
def test_a_residual_network_is_exact(seed, examples):
    torch.manual_seed(seed)
    inputs, targets = torch.randn(examples, 2, 8, 9), torch.randint(5, (examples,))
    assert_exact(Residual(), cross_entropy, inputs, targets)


class Frames(nn.Module):
    """Convolves the frames of a film as if they were examples, and averages over them."""

    def __init__(self, frames_first):
        super().__init__()
        self.convolution, self.frames_first = nn.Conv2d(2, 3, 2), frames_first

    def forward(self, films):
        frames = films.transpose(0, 1) if self.frames_first else films
        hidden = self.convolution(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return hidden.tanh().mean(dim=0 if self.frames_first else 1)


@pytest.mark.parametrize("frames_first", [False, True])
@pytest.mark.parametrize("frames", [1, 3, 4])
def test_images_that_belong_to_one_example_are_added_before_they_are_squared(frames, frames_first):
    torch.manual_seed(0)
    assert_exact(Frames(frames_first), squares, torch.randn(4, frames, 2, 5, 6), torch.randn(4))


class Bare(nn.Module):
    """Parameters that belong to no layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.shift = nn.Parameter(torch.randn(3))
        self.scaled = nn.Parameter(torch.randn(1, 3))

    def forward(self, inputs):
        return torch.sub(self.shift + inputs @ self.weight, self.scaled, alpha=3.0).relu()


@pytest.mark.parametrize("positions", [(), (2,), (2, 3)])
def test_bare_matrices_and_added_parameters_are_exact(positions):
    torch.manual_seed(0)
    assert_exact(Bare(), squares, torch.randn(5, *positions, 4), torch.randn(5))
