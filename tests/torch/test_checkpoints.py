"""Activation checkpointing, both kinds: the statistics of the same model without it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cabs_torch
from cabs_torch import UncoveredParameterError
from tests.torch.models import squares

# One checkpoint inside of another runs without gradients at first, which torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


class Stack(nn.Module):
    """Layers of which some run inside of checkpoints, one of them inside of another."""

    def __init__(self, reentrant, *, shared=False):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.randn(4))
        self.inner = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.table = nn.Embedding(6, 4)
        self.reentrant, self.shared = reentrant, shared

    def run(self, function, *inputs):
        if self.reentrant is None:
            return function(*inputs)
        return checkpoint(function, *inputs, use_reentrant=self.reentrant)

    def block(self, hidden, factor, places):
        hidden = hidden + self.table(places)
        scaled = self.run(lambda h: self.inner[1](h * self.scale.exp()), hidden)
        if self.shared:
            scaled = self.first(scaled)
        return self.dropout(self.norm(scaled).tanh() * factor), hidden

    def forward(self, inputs):
        hidden = self.run(self.inner[0], self.first(inputs))
        places = torch.arange(6).expand(len(inputs), 6)
        hidden, other = self.run(self.block, hidden.movedim(0, 1).movedim(1, 0), 2.0, places)
        return self.last(self.run(self.inner[2], hidden) + other)


def measured(model, inputs, targets, **options):
    torch.manual_seed(1)
    statistics = cabs_torch.backward(squares(model(inputs), targets), **options)
    return statistics, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shape", [(4, 6, 4), (6, 6, 4)])
def test_checkpoints_change_no_statistics_and_no_gradients(reentrant, shape):
    torch.manual_seed(0)
    inputs, targets = torch.randn(shape).double(), torch.randn(shape[0]).double()
    plain = Stack(None).double()
    packed = copy.deepcopy(plain)
    packed.reentrant = reentrant
    expected, gradients = measured(plain, inputs, targets)
    statistics, others = measured(packed, inputs, targets)
    for name in ("group_square_sum", "gradient_norm_squared"):
        torch.testing.assert_close(
            getattr(statistics, name), getattr(expected, name), rtol=1e-12, atol=0
        )
    for gradient, other in zip(gradients, others, strict=True):
        assert torch.equal(gradient, other)


def test_a_parameter_inside_of_a_reentrant_checkpoint_and_elsewhere_is_refused():
    torch.manual_seed(0)
    losses = squares(Stack(reentrant=True, shared=True)(torch.randn(4, 6, 4)), torch.randn(4))
    with pytest.raises(UncoveredParameterError, match=r"and elsewhere.*'first\.bias' of Stack"):
        cabs_torch.backward(losses)


def test_such_a_parameter_is_exact_inside_of_a_checkpoint_that_is_not_reentrant():
    torch.manual_seed(0)
    inputs, targets = torch.randn(4, 6, 4).double(), torch.randn(4).double()
    plain = Stack(None, shared=True).double()
    packed = copy.deepcopy(plain)
    packed.reentrant = False
    one, other = (measured(model, inputs, targets)[0] for model in (plain, packed))
    torch.testing.assert_close(one.variance_trace, other.variance_trace, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"uncovered": "ignore"}, {"parameter_groups": "first"}])
def test_a_parameter_that_is_given_to_a_reentrant_checkpoint_is_refused(options):
    torch.manual_seed(0)
    first, places = nn.Linear(4, 4), nn.Parameter(torch.randn(6, 4))
    if options.get("parameter_groups"):
        options = {"parameter_groups": [first.parameters()]}
    hidden = first(torch.randn(3, 6, 4))
    hidden = checkpoint(lambda h, p: (h + p).tanh(), hidden, places * 2.0, use_reentrant=True)
    with pytest.raises(UncoveredParameterError, match="given to a reentrant checkpoint"):
        cabs_torch.backward(hidden.square().sum((1, 2)), **options)


class Own(torch.autograd.Function):
    """A function that hides parameters and runs a backward pass of its own."""

    @staticmethod
    def forward(ctx, inputs, shift, layer):
        ctx.layer = layer
        ctx.save_for_backward(inputs)
        return layer(inputs) + shift

    @staticmethod
    def backward(ctx, cotangents):
        inputs = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(inputs), cotangents)
        return inputs.grad, cotangents.sum(0), None


@pytest.mark.parametrize("is_first", [False, True])
def test_a_function_that_hides_parameters_is_refused_before_it_writes_gradients(is_first):
    torch.manual_seed(0)
    first, hidden, shift = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4))
    inputs = torch.randn(3, 4)
    losses = Own.apply(inputs if is_first else first(inputs), shift, hidden).square().mean(dim=1)
    for policy in ("error", "microbatches", "ignore"):
        with pytest.raises(UncoveredParameterError, match="a backward pass of its own"):
            cabs_torch.backward(losses, uncovered=policy)
    assert hidden.weight.grad is None
    losses.mean().backward()
    assert hidden.weight.grad is not None
