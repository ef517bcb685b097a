"""What cannot be measured leaves gradients as they were, or as a plain backward pass makes them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cabs_torch
from cabs_torch.norms.sums import SquareSums
from tests.torch.models import squares
from tests.torch.reference import assert_exact


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 6), nn.LayerNorm(6), nn.InstanceNorm1d(1, affine=True)]
)
def test_norm_layers_that_are_differentiated_twice_are_exact(norm):
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.last = norm, nn.Linear(5, 6), nn.Linear(6, 1)

        def forward(self, inputs):
            inputs = inputs.requires_grad_()
            hidden = self.first(inputs)
            is_instance = isinstance(norm, nn.InstanceNorm1d)
            hidden = norm(hidden[:, None])[:, 0] if is_instance else norm(hidden)
            outputs = self.last(hidden.tanh())
            (gradient,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
            return torch.cat([gradient, outputs], dim=1)

    torch.manual_seed(0)
    model = Critic().double()
    # A hidden leaf, the inputs, that is each example's own.
    inputs, targets = torch.randn(4, 5).double(), torch.randn(4).double()
    rows = []
    for example in range(4):
        loss = squares(model(inputs[[example]].clone()), targets[[example]]).sum()
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    flat = torch.stack([torch.cat([one.flatten() for one in row]) for row in rows])
    losses = squares(model(inputs.clone()), targets)
    statistics = cabs_torch.backward(losses, parameter_groups=[list(model.parameters())])
    torch.testing.assert_close(statistics.variance_trace[0], flat.var(dim=0).sum())


@pytest.mark.parametrize(
    ("padding", "stride"),
    [
        ("same", 1),
        *itertools.product(["valid", 0, 1, (1,), (0, 1)], [1, 2, (2,), (1, 2)]),
    ],
)
def test_a_convolution_takes_one_number_for_all_axes(padding, stride):
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, inputs):
            return F.conv2d(inputs, self.weight, stride=stride, padding=padding)

    torch.manual_seed(0)
    assert_exact(Convolution(), squares, torch.randn(4, 3, 7, 6), torch.randn(4))


def test_statistics_that_fail_in_the_pass_leave_the_gradients_of_a_plain_one(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    plain = copy.deepcopy(model)
    inputs, targets = torch.randn(5, 4), torch.randn(5)
    squares(plain(inputs), targets).mean().backward()
    calls, square = [], SquareSums.square

    def fail_later(*given):
        calls.append(given)
        if len(calls) > 1:
            raise MemoryError("no room")
        return square(*given)

    monkeypatch.setattr(SquareSums, "square", fail_later)
    with pytest.raises(MemoryError, match="no room") as said:
        cabs_torch.backward(squares(model(inputs), targets))
    assert any("the gradients are complete" in note for note in said.value.__notes__)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_function_that_cannot_be_tried_out_is_refused_before_any_gradient():
    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(_, inputs):
            return inputs * 2.0

        @staticmethod
        def backward(_, cotangent):
            if not torch._C._current_graph_task_id() >= 0:
                raise RuntimeError("only inside of a backward pass")
            return cotangent * 2.0

    layer = nn.Linear(3, 1)
    losses = Inside.apply(layer(torch.randn(4, 3))).squeeze(1)
    with pytest.raises(cabs_torch.UncoveredParameterError, match="only inside of a backward pass"):
        cabs_torch.backward(losses)
    assert layer.weight.grad is None
