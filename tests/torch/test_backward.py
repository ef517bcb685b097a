"""Statistics of random networks, against a float64 loop over the examples."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cabs_torch
from cabs import Controller
from tests.torch.reference import assert_exact, gradients_one_by_one

batches = st.integers(2, 7)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])
activations = st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus])


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def squares(outputs, targets):
    # Far from the outputs: where the two nearly agree, rounding errors of the forward pass are all
    # that a gradient in single precision holds.
    return (outputs.flatten(1) - 5.0 - targets[:, None]).square().mean(dim=1)


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
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
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


class Residual(nn.Module):
    """A small network with what such networks have."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect")
        self.body = nn.Conv2d(6, 6, 3, padding="same", groups=3)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.offset = nn.Parameter(torch.randn(12, 1, 1))
        self.head = nn.Linear(12, 5)

    def forward(self, inputs):
        hidden = F.relu(self.stem(inputs))
        hidden = torch.cat([hidden + self.body(hidden), F.avg_pool2d(hidden, 3, 1, 1)], dim=1)
        hidden = F.pad(self.depthwise(F.max_pool2d(hidden, 2)), (0, 1, 1, 0)) - self.offset
        return self.head(self.dropout(F.silu(hidden)).mean(dim=(2, 3)))


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


# Traps


def test_mean_against_sum_the_gradient_of_an_example_is_m_times_its_share():
    layer = nn.Linear(1, 1, bias=False)
    inputs = torch.tensor([[1.0], [2.0], [3.0]])
    statistics = cabs_torch.backward(layer(inputs).squeeze(1))
    assert float(statistics.group_square_sum) == pytest.approx(1.0 + 4.0 + 9.0)
    assert float(statistics.mean_square) == pytest.approx(4.0)


def test_gradient_accumulation_the_mean_square_is_of_this_batch_alone():
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    first = cabs_torch.backward(cross_entropy(model(inputs), targets))
    second = cabs_torch.backward(cross_entropy(model(inputs), targets))
    assert float(first.mean_square) == float(second.mean_square)
    accumulated = model.weight.grad.clone()
    model.zero_grad()
    cabs_torch.backward(cross_entropy(model(inputs), targets))
    assert torch.equal(accumulated, 2.0 * model.weight.grad)


def test_microbatches_add_up_to_the_statistics_of_the_whole_batch():
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(3, 2), torch.randn(7, 3), torch.randint(2, (7,))
    whole = cabs_torch.backward(cross_entropy(model(inputs), targets))
    model.zero_grad()
    parts, gradient = [], 0.0
    for piece in (slice(0, 3), slice(3, 7)):
        parts.append(cabs_torch.backward(cross_entropy(model(inputs[piece]), targets[piece])))
        rows = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        gradient = gradient + rows * (parts[-1].examples / 7)
        model.zero_grad()
    merged = (parts[0].partial + parts[1].partial).complete(mean_square=gradient.square().sum())
    assert float(merged.variance_trace) == pytest.approx(float(whole.variance_trace), rel=1e-5)


def test_frozen_parameters_are_left_out():
    torch.manual_seed(0)
    model = Residual()
    for parameter in (model.stem.weight, model.body.bias, model.head.weight):
        parameter.requires_grad_(False)
    assert_exact(model, cross_entropy, torch.randn(4, 2, 8, 9), torch.randint(5, (4,)))


def test_dropout_has_the_same_mask_in_both_passes():
    torch.manual_seed(0)
    model, inputs, targets = Residual(dropout=0.5), torch.randn(4, 2, 8, 9), torch.randint(5, (4,))
    torch.manual_seed(1)
    losses = cross_entropy(model(inputs), targets)
    rows = [
        torch.cat(
            [
                part.flatten()
                for part in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            ]
        )
        for loss in losses
    ]
    statistics = cabs_torch.backward(losses)
    expected = torch.stack(rows).double().square().sum()
    torch.testing.assert_close(statistics.group_square_sum, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_and_depthwise_convolutions_are_exact(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 12, 3, groups=groups), nn.Tanh(), nn.Flatten())
    assert_exact(model, squares, torch.randn(5, 6, 6, 7), torch.randn(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_single(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(4096, 8, bias=False).to(dtype)
    inputs = torch.rand(4, 3, 4096).to(dtype)
    outputs = layer(inputs)
    (cotangents,) = torch.autograd.grad(
        outputs.float().mean(dim=(1, 2)).mean(), outputs, retain_graph=True
    )
    shares = torch.einsum("itn,itk->ink", cotangents.double(), inputs.double())
    statistics = cabs_torch.backward(outputs.float().mean(dim=(1, 2)))
    expected = shares.square().sum() * 16
    torch.testing.assert_close(statistics.group_square_sum, expected, rtol=1e-6, atol=0.0)


def test_a_long_sum_in_single_precision_loses_no_digits():
    torch.manual_seed(0)
    layer = nn.Linear(4096, 2048, bias=False)
    statistics = cabs_torch.backward(layer(torch.randn(2, 4096)).square().mean(dim=1))
    expected = layer.weight.grad.double().square().sum()
    torch.testing.assert_close(statistics.mean_square, expected, rtol=1e-8, atol=0.0)


def test_chunks_of_examples_do_not_change_the_sum(monkeypatch):
    torch.manual_seed(0)
    model, inputs, targets = Residual(), torch.randn(6, 2, 8, 9), torch.randint(5, (6,))
    whole = cabs_torch.backward(cross_entropy(model(inputs), targets))
    monkeypatch.setattr("cabs_torch.norms._CHUNK", 1)
    chunked = cabs_torch.backward(cross_entropy(model(inputs), targets))
    torch.testing.assert_close(chunked.group_square_sum, whole.group_square_sum, rtol=1e-6, atol=0)


def test_losses_may_be_any_output_of_a_graph_that_goes_on():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    outputs = layer(torch.randn(4, 3))
    losses = outputs.square().mean(dim=1)
    kept = losses.detach().clone()
    statistics = cabs_torch.backward(losses)
    assert torch.equal(losses.detach(), kept)
    assert float(statistics.variance_trace) > 0.0


def test_a_tensor_that_requires_gradients_can_be_handed_to_the_controller_as_it_is():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    losses = cross_entropy(model(torch.randn(4, 3)), torch.randint(2, (4,)))
    statistics = cabs_torch.backward(losses)
    controller = Controller(16)
    decision = controller.update(
        learning_rate=torch.tensor([0.1, 0.2]),
        variance_trace=torch.stack([statistics.variance_trace, statistics.mean_square]),
        loss=losses.mean(),
    )
    assert not decision.held


def test_of_one_example_nothing_is_measured_and_the_gradient_is_the_plain_one():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(3, 2), torch.randn(1, 3)
    layer(inputs).square().sum(dim=1).mean().backward()
    plain = layer.weight.grad.clone()
    layer.zero_grad()
    statistics = cabs_torch.backward(layer(inputs).square().sum(dim=1))
    assert torch.equal(layer.weight.grad, plain)
    assert statistics.group_square_sum.isnan()
    assert statistics.mean_square.isnan()
    decision = Controller(16).update(
        learning_rate=0.1, variance_trace=statistics.variance_trace, loss=1.0
    )
    assert decision.held


class Layers(nn.Module):
    """Two matrices with anything between them."""

    def __init__(self, between, width):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(3, 6), nn.Linear(width, 2), between

    def forward(self, inputs):
        return self.second(self.between(self.first(inputs)))


BETWEEN = {
    "split": (lambda h: h.split(2, dim=1)[2] * h.split([3, 2, 1], dim=-1)[1], 2),
    "chunk": (lambda h: torch.cat(h.chunk(2, dim=1)[::-1], dim=1), 6),
    "unbind": (lambda h: h.view(-1, 3, 2).unbind(1)[2], 2),
    "glu": (F.glu, 3),
    "select": (lambda h: h.view(-1, 3, 2)[:, -1], 2),
    "slice": (lambda h: h[:, 1:5:2], 2),
    "stack": (lambda h: torch.stack([h.sin(), h], dim=0).amax(0), 6),
    "stack behind": (lambda h: torch.stack([h.sin(), h], dim=-1).flatten(1), 12),
    "max": (lambda h: h.view(-1, 3, 2).max(dim=1)[0], 2),
    "expand": (lambda h: h[:, None].expand(-1, 2, -1).flatten(1), 12),
    "normalize": (F.normalize, 6),
    "flip": (lambda h: h.flip(1), 6),
    "cumsum": (lambda h: h.cumsum(-1), 6),
    "masked": (lambda h: h.masked_fill(h > 0.5, 0.25), 6),
    "var": (lambda h: torch.cat([h.var(dim=1, keepdim=True), h.std(dim=1, keepdim=True)], 1), 2),
    "gather": (lambda h: h.gather(1, torch.zeros(len(h), 2, dtype=torch.int64)), 2),
    "upsample": (lambda h: F.interpolate(h.view(-1, 1, 2, 3), scale_factor=2).flatten(1), 24),
    "shuffle": (lambda h: F.pixel_shuffle(h.view(-1, 6, 1, 1)[:, :4], 2).flatten(1), 4),
    "checked": (lambda h: torch.where(h > 0, h, h.abs().sqrt() * 0.1), 6),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_operations_that_keep_examples_apart_are_exact(name):
    torch.manual_seed(0)
    between, width = BETWEEN[name]
    assert_exact(
        Layers(between, width).double(),
        squares,
        torch.randn(5, 3).double(),
        torch.randn(5).double(),
    )


class Token(nn.Module):
    """A class token and positions, expanded over the batch or broadcast, and a vector weight."""

    def __init__(self):
        super().__init__()
        self.token, self.places = (
            nn.Parameter(torch.randn(1, 1, 4)),
            nn.Parameter(torch.randn(6, 4)),
        )
        self.matrix, self.vector = nn.Linear(4, 3), nn.Parameter(torch.randn(3))

    def forward(self, inputs):
        tokens = self.token.expand(len(inputs), -1, -1)
        hidden = torch.cat([tokens, inputs], dim=1) + self.places
        return self.matrix(hidden).tanh() @ self.vector


def test_expanded_parameters_and_vectors_are_exact():
    torch.manual_seed(0)
    assert_exact(Token(), squares, torch.randn(4, 5, 4), torch.randn(4))


@pytest.mark.parametrize(
    "settings", [{"label_smoothing": 0.1}, {"weight": torch.arange(1.0, 6.0)}, {"ignore_index": 2}]
)
def test_the_options_of_cross_entropy_are_exact(settings):
    torch.manual_seed(0)

    def loss(outputs, targets):
        if "weight" in settings:
            settings["weight"] = settings["weight"].to(outputs.dtype)
        return F.cross_entropy(outputs, targets, reduction="none", **settings)

    assert_exact(nn.Linear(3, 5), loss, torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 4, 2]))


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_cotangents_that_cancel_within_an_example_lose_no_more_than_a_loop_does(offset):
    torch.manual_seed(1)
    inputs = torch.randn(4, 3, 64) + offset
    layer = nn.Linear(64, 64, bias=False)
    weights = torch.sin(torch.arange(192.0)).view(3, 64)

    def losses_of(one):
        return (F.softmax(layer(one) / 64, dim=1) * weights).sum(1).square().sum(1)

    loop = [torch.autograd.grad(losses_of(one[None]).squeeze(0), layer.weight)[0] for one in inputs]
    expected = torch.stack(loop).double().square().sum()
    statistics = cabs_torch.backward(losses_of(inputs))
    torch.testing.assert_close(statistics.group_square_sum, expected, rtol=1e-4, atol=0.0)


def test_losses_in_half_precision_are_averaged_by_a_rounded_number():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(5, 3), torch.randn(3, 5)
    exact = cabs_torch.backward(layer(inputs).square().sum(dim=1))
    half = cabs_torch.backward(layer(inputs).square().sum(dim=1).to(torch.bfloat16))
    torch.testing.assert_close(half.group_square_sum, exact.group_square_sum, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(half.mean_square, exact.mean_square, rtol=1e-5, atol=0.0)


def test_autocast_around_the_backward_pass_does_not_round_the_sums():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(32, 32), torch.randn(4, 40, 32)
    exact = cabs_torch.backward(layer(inputs).square().sum(dim=(1, 2)))
    losses = layer(inputs).square().sum(dim=(1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = cabs_torch.backward(losses)
    torch.testing.assert_close(rounded.group_square_sum, exact.group_square_sum, rtol=1e-6, atol=0)


def test_autocast_in_the_model_is_exact_for_what_was_computed():
    torch.manual_seed(0)
    model, inputs, targets = Residual(), torch.randn(4, 2, 8, 9), torch.randint(5, (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = cross_entropy(model(inputs), targets)
    statistics = cabs_torch.backward(losses)
    rows = gradients_one_by_one(model, cross_entropy, inputs, targets)
    torch.testing.assert_close(statistics.group_square_sum, rows.square().sum(), rtol=0.05, atol=0)
