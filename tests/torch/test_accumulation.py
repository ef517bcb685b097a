"""Statistics from groups of examples, against gradients computed apart."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import cabs
import cabs_torch
from tests.torch.models import cross_entropy


def network():
    """Return what has no per-example gradients, or hides them."""
    return nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Unflatten(1, (2, 3)), Last(3, 4)
    )


class Last(nn.Module):
    def __init__(self, width, count):
        super().__init__()
        self.cell = nn.LSTM(width, count, batch_first=True)

    def forward(self, inputs):
        return self.cell(inputs)[0][:, -1]


def pieces_of(count, sizes):
    return torch.arange(count).split(sizes)


@pytest.mark.slow
@given(st.integers(0, 2**31), st.lists(st.integers(2, 5), min_size=2, max_size=5))
@settings(max_examples=30)
def test_groups_of_any_sizes_are_exact(seed, sizes):
    torch.manual_seed(seed)
    model, m = network().double(), sum(sizes)
    inputs, targets = torch.randn(m, 3).double(), torch.randint(4, (m,))
    plain = copy.deepcopy(model)
    rows, accumulation = [], cabs_torch.Accumulation(model.parameters(), batch_size=m)
    for piece in pieces_of(m, sizes):
        apart = copy.deepcopy(plain)
        loss = cross_entropy(apart(inputs[piece]), targets[piece]).mean()
        rows.append(
            torch.cat(
                [one.flatten() for one in torch.autograd.grad(loss, list(apart.parameters()))]
            )
        )
        (cross_entropy(plain(inputs[piece]), targets[piece]).mean() * (len(piece) / m)).backward()
        loss = cross_entropy(model(inputs[piece]), targets[piece]).mean()
        accumulation.backward(loss, examples=len(piece))
    statistics = accumulation.complete()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    weights = torch.tensor(sizes).double() / m
    mean = (torch.stack(rows) * weights[:, None]).sum(0)
    square_sum = sum(n * float(row.square().sum()) for n, row in zip(sizes, rows, strict=True))
    assert (statistics.examples, statistics.groups) == (m, len(sizes))
    assert float(statistics.group_square_sum) == pytest.approx(square_sum, rel=1e-10)
    assert float(statistics.gradient_norm_squared) == pytest.approx(
        float(mean.square().sum()), rel=1e-10
    )


def test_groups_of_one_are_the_statistics_of_the_batch():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    inputs, targets = torch.randn(4, 3).double(), torch.randint(2, (4,))
    exact = cabs_torch.backward(cross_entropy(model(inputs), targets))
    model.zero_grad()
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=4)
    for index in range(4):
        loss = cross_entropy(model(inputs[[index]]), targets[[index]]).mean()
        accumulation.backward(loss, examples=1)
    assert float(accumulation.complete().variance_trace) == pytest.approx(
        float(exact.variance_trace), rel=1e-9
    )


def test_an_optimizer_gives_a_trace_a_group_and_can_be_used_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}], 0.1
    )
    inputs, targets = torch.randn(6, 3), torch.randint(2, (6,))
    found = []
    for source in (optimizer, model.parameters()):
        accumulation = cabs_torch.Accumulation(source, batch_size=6)
        for _ in range(2):
            model.zero_grad()
            for piece in pieces_of(6, 2):
                loss = cross_entropy(model(inputs[piece]), targets[piece]).mean()
                accumulation.backward(loss, examples=2)
            found.append(accumulation.complete())
    traces = found[0].variance_trace
    assert traces.shape == (2,)
    assert torch.equal(traces, found[1].variance_trace)
    assert float(traces.sum()) == pytest.approx(float(found[2].variance_trace), rel=1e-6)
    assert found[0].noise_scale == pytest.approx(found[2].noise_scale, rel=1e-5)
    decision = cabs.Controller(16).update(learning_rate=[0.1, 0.2], variance_trace=traces, loss=1.0)
    assert not decision.held


def test_a_scaled_loss_gives_the_statistics_of_the_loss_before():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    inputs, targets = torch.randn(6, 3), torch.randint(2, (6,))
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model.zero_grad()
        accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=6)
        for piece in pieces_of(6, 2):
            loss = cross_entropy(model(inputs[piece]), targets[piece]).mean()
            accumulation.backward(loss, examples=2, scaler=scaler)
        found.append(accumulation.complete())
    for name in ("group_square_sum", "gradient_norm_squared"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name))


def test_gradients_that_were_there_before_give_no_number():
    model = nn.Linear(3, 2)
    for start, is_known in ((None, True), (0.0, True), (1.0, False)):
        model.zero_grad()
        if start is not None:
            model.weight.grad = torch.full((2, 3), start)
        accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=4)
        for _ in range(2):
            accumulation.backward(model(torch.randn(2, 3)).square().mean(), examples=2)
        assert bool(accumulation.complete().variance_trace.isnan()) is not is_known


def test_a_gradient_that_arrives_in_parts_is_an_error():
    layer = nn.Linear(3, 3)
    accumulation = cabs_torch.Accumulation(layer.parameters(), batch_size=4)
    inputs = torch.randn(2, 3, requires_grad=True)
    hidden = checkpoint(layer, inputs, use_reentrant=True)
    loss = checkpoint(layer, hidden, use_reentrant=True).square().mean()
    with pytest.raises(RuntimeError, match="in several parts, as reentrant checkpoints do"):
        accumulation.backward(loss, examples=2)


def accumulate(accumulation, layer, count=1):
    for _ in range(count):
        accumulation.backward(layer(torch.randn(2, 3)).square().mean(), examples=2)


def test_gradients_that_come_from_elsewhere_are_an_error():
    layer = nn.Linear(3, 2)
    others = {
        "a penalty": lambda: layer.weight.square().sum().backward(),
        "an optimizer": layer.zero_grad,
        "another accumulation": lambda: accumulate(
            cabs_torch.Accumulation(layer.parameters(), batch_size=4), layer
        ),
    }
    for change in others.values():
        layer.zero_grad()
        accumulation = cabs_torch.Accumulation(layer.parameters(), batch_size=6)
        accumulate(accumulation, layer)
        change()
        with pytest.raises(RuntimeError, match="gradients were changed between microbatches"):
            accumulate(accumulation, layer)
    layer.zero_grad()
    accumulate(accumulation := cabs_torch.Accumulation(layer.parameters(), batch_size=4), layer, 2)
    layer.weight.grad.mul_(2.0)
    with pytest.raises(RuntimeError, match="gradients were changed between microbatches"):
        accumulation.complete()


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(_, inputs):
        return inputs.clone()

    @staticmethod
    def backward(*_):
        raise MemoryError


def test_an_accumulation_that_failed_cannot_go_on():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=4)
    accumulate(accumulation, model)
    loss = model[1](Failing.apply(model[0](torch.randn(2, 3)))).square().mean()
    with pytest.raises(MemoryError):
        accumulation.backward(loss, examples=2)
    with pytest.raises(RuntimeError, match="a backward pass of this accumulation has failed"):
        accumulate(accumulation, model)


def test_frozen_parameters_and_their_old_gradients_are_passed_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model(torch.randn(2, 3)).sum().backward()
    model[0].requires_grad_(False)
    model[1].zero_grad()
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=4)
    accumulate(accumulation, model, 2)
    statistics = accumulation.complete()
    expected = cabs_torch.gradient_norm_squared(model[1].parameters())
    torch.testing.assert_close(statistics.gradient_norm_squared, expected)


def test_names_in_place_of_parameters_are_an_error():
    layer = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"got tuple; pass model\.parameters\(\)"):
        cabs_torch.Accumulation(layer.named_parameters(), batch_size=4)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda a, _: a.complete(), ValueError, "at least two microbatches are needed, got 0"),
        (lambda a, x: a.backward(x, examples=2), ValueError, r"0-d, got shape \(2, 3\)"),
        (lambda a, x: a.backward(x.sum(), examples=0), ValueError, "at least 1, got examples = 0"),
        (lambda a, x: a.backward(x.sum(), examples=5), ValueError, "4 examples together, got 0"),
        (lambda a, _: a.backward(1.0, examples=2), TypeError, "a tensor, got float"),
        (lambda a, x: a.backward(x.sum().detach(), examples=2), ValueError, "must carry a graph"),
        (
            lambda a, x: [a.backward(one.sum(), examples=1) for one in x] + [a.complete()],
            ValueError,
            "4 examples together, got 2",
        ),
        (
            lambda a, x: a.backward(x.detach().requires_grad_().mean(), examples=2),
            ValueError,
            "none of them in its graph",
        ),
    ],
)
def test_misuse_is_an_error(act, error, message):
    layer = nn.Linear(3, 3)
    accumulation = cabs_torch.Accumulation(layer.parameters(), batch_size=4)
    with pytest.raises(error, match=message):
        act(accumulation, layer.weight[:2] + torch.ones(2, 3))


def test_parameters_that_are_none_are_an_error():
    with pytest.raises(ValueError, match="must hold one that requires gradients"):
        cabs_torch.Accumulation([torch.ones(3)], batch_size=4)
    with pytest.raises(ValueError, match="batch_size must be at least 2, got batch_size = 1"):
        cabs_torch.Accumulation([nn.Parameter(torch.ones(3))], batch_size=1)
