"""A compiled step: the statistics of the same step that is not compiled."""

import copy
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

import cabs_torch
from cabs_torch import UncoveredParameterError
from tests.torch.models import Residual, cross_entropy, squares

# Inductor's own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

HEADERS = Path(sysconfig.get_path("include")) / "Python.h"

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(
            not (shutil.which("g++") and HEADERS.exists()),
            reason="Inductor needs a C++ compiler and Python's headers",
        ),
    ),
]


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 7)
        self.out.weight = self.table.weight

    def forward(self, words):
        return self.out(self.layer(self.table(words))).flatten(1)


def assert_same(model, losses_of, batches, backend, **options):
    plain = copy.deepcopy(model)
    step = cabs_torch.compile(model, lambda *b: losses_of(model, *b), backend=backend, **options)
    for batch in batches:
        losses = losses_of(plain, *batch)
        expected = cabs_torch.backward(losses, **options)
        found, statistics = step(*batch)
        torch.testing.assert_close(found, losses.detach())
        for name in ("group_square_sum", "gradient_norm_squared"):
            torch.testing.assert_close(
                getattr(statistics, name), getattr(expected, name), rtol=1e-5, atol=0
            )
        # Twice, so gradients add up.
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_convolutional_network_is_exact():
    torch.manual_seed(0)
    batches = [(torch.randn(m, 2, 8, 9), torch.randint(5, (m,))) for m in (4, 4, 6)]
    assert_same(Residual(), lambda f, x, y: cross_entropy(f(x), y), batches, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_transformer_with_tied_weights_is_exact(backend):
    torch.manual_seed(0)
    batches = [(torch.randint(7, (4, 5)), torch.randn(4))] * 2
    assert_same(Words(), lambda f, x, y: squares(f(x), y), batches, backend, sample=3)


def test_parameters_are_those_of_the_moment_and_may_be_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(4, 3)
    step = cabs_torch.compile(model, lambda x: model(x).square().sum(1), backend="aot_eager")
    step(inputs)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    model[2].bias.requires_grad_(False)
    model.zero_grad()
    _, statistics = step(inputs)
    assert model[2].bias.grad is None
    model.zero_grad()
    expected = cabs_torch.backward(model(inputs).square().sum(1))
    torch.testing.assert_close(statistics.variance_trace, expected.variance_trace)


def test_groups_give_a_trace_each():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    groups = [list(model[0].parameters()), list(model[2].parameters())]
    inputs = torch.randn(4, 3)
    step = cabs_torch.compile(
        model, lambda x: model(x).square().sum(1), parameter_groups=groups, backend="aot_eager"
    )
    _, statistics = step(inputs)
    expected = cabs_torch.backward(model(inputs).square().sum(1), parameter_groups=groups)
    torch.testing.assert_close(statistics.variance_trace, expected.variance_trace)
    assert statistics.variance_trace.shape == (2,)


def test_what_is_not_covered_is_refused_as_elsewhere():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    step = cabs_torch.compile(model, lambda x: model(x).square().sum(1))
    with pytest.raises(UncoveredParameterError, match="normalizes over the batch"):
        step(torch.randn(4, 3))


def test_a_model_that_was_compiled_by_itself_is_refused_with_the_way_out():
    layer = nn.Linear(3, 4)
    compiled = torch.compile(layer, backend="aot_eager")
    losses = compiled(torch.randn(4, 3)).square().sum(1)
    with pytest.raises(UncoveredParameterError, match=r"compile the step with cabs_torch\.compile"):
        cabs_torch.backward(losses)


def test_tracing_draws_no_random_numbers():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    step = cabs_torch.compile(model, lambda x: model(x).square().sum(1), backend="aot_eager")
    torch.manual_seed(0)
    inputs = torch.randn(4, 3)
    first, _ = step(inputs)
    torch.manual_seed(0)
    inputs = torch.randn(4, 3)
    second, _ = step(inputs)
    assert torch.equal(first, second)


class Changing(nn.Module):
    """A buffer that is replaced, one that the forward pass writes, and a part that is frozen."""

    def __init__(self):
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3)
        self.layer = nn.Linear(3, 2)
        self.frozen.requires_grad_(False)
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, inputs):
        return self.layer(self.frozen(self.norm(inputs)).tanh()) * self.temperature


def test_buffers_and_frozen_parameters_are_those_of_the_moment():
    torch.manual_seed(0)
    model = Changing()
    plain, inputs = copy.deepcopy(model), torch.randn(4, 3)
    step = cabs_torch.compile(model, lambda x: model(x).square().sum(1), backend="aot_eager")
    for index in range(3):
        for one in (model, plain):
            one.temperature = torch.tensor(1.0 + index)
            replaced = {name: value + index for name, value in one.frozen.state_dict().items()}
            one.frozen.load_state_dict(replaced, assign=True)
            one.frozen.requires_grad_(False)
            one.zero_grad()
        losses, statistics = step(inputs)
        expected = plain(inputs).square().sum(1)
        torch.testing.assert_close(losses, expected.detach())
        found = cabs_torch.backward(expected)
        torch.testing.assert_close(statistics.variance_trace, found.variance_trace)
        assert model.norm.num_batches_tracked == index + 1
        torch.testing.assert_close(model.norm.running_mean, plain.norm.running_mean)


def test_autocast_is_that_of_the_call():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    step = cabs_torch.compile(
        model, lambda x: model(x).float().square().sum(1), backend="aot_eager"
    )
    step(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, statistics = step(inputs)
        expected = model(inputs).float().square().sum(1)
    assert torch.equal(losses, expected.detach())
    found = cabs_torch.backward(expected)
    torch.testing.assert_close(statistics.variance_trace, found.variance_trace)


def test_a_parameter_outside_of_the_model_is_an_error():
    layer, head = nn.Linear(3, 4), nn.Linear(4, 2)
    step = cabs_torch.compile(layer, lambda x: head(layer(x)).sum(1), backend="aot_eager")
    with pytest.raises(ValueError, match=r"parameter 'weight' of Linear.* is not one of them|bias"):
        step(torch.randn(4, 3))
    assert head.weight.grad is None
    with pytest.raises(TypeError, match="takes tensors, got int"):
        cabs_torch.compile(layer, lambda x, k: layer(x).sum(1) * k)(torch.randn(4, 3), 2)


def test_rows_that_are_picked_by_an_index_are_refused_while_tracing():
    layer = nn.Linear(3, 4)

    def losses_of(inputs, columns):
        return layer(inputs)[torch.arange(len(inputs)), columns]

    step = cabs_torch.compile(layer, losses_of, backend="aot_eager")
    with pytest.raises(UncoveredParameterError, match="cannot be tried out while it is traced"):
        step(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
