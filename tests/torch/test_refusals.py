"""What is not covered is an error before anything has happened, never a wrong number."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cabs_torch
from cabs_torch import UncoveredParameterError


class Model(nn.Module):
    """A matrix, and anything before or after it."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.matrix, self.run = nn.Linear(4, 4), forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, inputs):
        return self.run(self, inputs)


class Couple(torch.autograd.Function):
    """Somebody's own function, of which nothing is known."""

    @staticmethod
    def forward(_, inputs):
        return inputs + inputs.mean(dim=0)

    @staticmethod
    def backward(_, cotangents):
        return cotangents + cotangents.mean(dim=0)


# Of a name that is known for something else.
Relu = type("Relu", (Couple,), {})


def hooked():
    """Return a parameter whose gradient is changed on its way."""
    parameter = nn.Parameter(torch.ones(4))
    parameter.register_hook(lambda gradient: 2.0 * gradient)
    return parameter


def nothing():
    """Return a matrix without columns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Linear(4, 0)


def model(forward, **modules):
    torch.manual_seed(0)
    return Model(forward, **modules)


REFUSED = {
    "batch normalization in training mode": (
        model(lambda m, x: m.norm(m.matrix(x)), norm=nn.BatchNorm1d(4)),
        "NativeBatchNormBackward0 normalizes over the batch",
    ),
    "batch normalization without parameters": (
        model(lambda m, x: m.norm(m.matrix(x)), norm=nn.BatchNorm1d(4, affine=False)),
        "NativeBatchNormBackward0 normalizes over the batch",
    ),
    "a mean over the batch": (
        model(lambda m, x: m.matrix(x) - m.matrix(x).mean(dim=0)),
        "AddmmBackward0 is broadcast over the examples",
    ),
    "a softmax over the batch": (
        model(lambda m, x: m.matrix(x).softmax(dim=0)),
        "SoftmaxBackward0 runs along the axis that holds the examples",
    ),
    "similarities within the batch": (
        model(lambda m, x: m.matrix(x) @ m.matrix(x).T),
        "AddmmBackward0 is broadcast over the examples",
    ),
    "attention over the batch": (
        model(lambda m, x: torch.ones(len(x), len(x)) @ m.matrix(x)),
        "AddmmBackward0 is broadcast over the examples",
    ),
    "a value for every example": (
        model(lambda m, x: m.matrix(x) + m.table, table=nn.Parameter(torch.ones(5, 4))),
        "a parameter holds a value for every example of the batch",
    ),
    "an unknown function": (
        model(lambda m, x: Couple.apply(m.matrix(x))),
        "CoupleBackward mixes examples, or picks or reorders them",
    ),
    "a function with the name of a known one": (
        model(lambda m, x: Relu.apply(m.matrix(x))),
        "ReluBackward mixes examples, or picks or reorders them",
    ),
    "a parameter with a hook": (
        model(lambda m, x: m.matrix(x) + m.shift, shift=hooked()),
        "a parameter has a hook, which can change its gradient",
    ),
    "a value for every row": (
        model(
            lambda m, x: torch.addmm(m.rows, x, m.w),
            rows=nn.Parameter(torch.ones(5, 4)),
            w=nn.Parameter(torch.ones(4, 4)),
        ),
        "a parameter holds a value for every example of the batch",
    ),
    "complex numbers": (
        model(lambda m, x: (m.matrix(x) * 1j).abs()),
        "MulBackward0 computes complex numbers",
    ),
    "a real parameter among complex numbers": (
        model(
            lambda m, x: (x.to(torch.complex64) + m.shift).abs(), shift=nn.Parameter(torch.ones(4))
        ),
        "AddBackward0 computes complex numbers",
    ),
    "no elements": (
        model(lambda m, x: torch.cat([m.matrix(x), m.none(x)], dim=1), none=nothing()),
        "AddmmBackward0 computes complex",
    ),
    "no positions": (
        model(lambda m, x: m.matrix(x) + m.matrix(x[:, None].expand(-1, 0, -1)).sum(1)),
        "computes complex numbers, or has no elements",
    ),
    "a sparse input": (
        model(lambda m, x: torch.addmm(m.matrix.bias, x.to_sparse(), m.matrix.weight.t())),
        "AddmmBackward0 has a sparse input",
    ),
    "a mean over the batch that was expanded": (
        model(lambda m, x: m.matrix(x).mean(dim=0).expand(5, 4)),
        "AddmmBackward0 is broadcast over the examples",
    ),
    "a stack of examples": (
        model(lambda m, x: torch.stack([m.matrix(one) for one in x])),
        "StackBackward0 runs along the axis that holds the examples",
    ),
    "a split of the batch": (
        model(lambda m, x: torch.cat(m.matrix(x).split([2, 3])[::-1])),
        "CatBackward0 runs along the axis that holds the examples",
    ),
    "examples in two orders": (
        model(
            lambda m, x: (lambda h: (h + h.T)[:, :1])(F.linear(x, m.square)),
            square=nn.Parameter(torch.ones(5, 4)),
        ),
        "holds a value for every example|two different batch layouts",
    ),
    "examples that were flipped": (
        model(lambda m, x: m.matrix(x).flip(0)),
        "FlipBackward0 runs along the axis that holds the examples",
    ),
    "a batch seen as something else": (
        model(lambda m, x: m.after(m.matrix(x).reshape(4, 5)).reshape(5, 4), after=nn.Linear(5, 5)),
        "spreads the examples over several axes|columns",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused(case):
    network, message = REFUSED[case]
    network.zero_grad()
    torch.manual_seed(0)
    losses = network(torch.randn(5, 4)).flatten(1).square().mean(dim=1)
    with pytest.raises(UncoveredParameterError) as refused:
        cabs_torch.backward(losses)
    assert any(part in str(refused.value) for part in message.split("|")), str(refused.value)
    assert "cabs_torch.Accumulation" in str(refused.value)
    # Nothing has happened: no gradient, no hook, and the graph still stands.
    assert all(parameter.grad is None for parameter in network.parameters())
    losses.mean().backward()


def test_a_parameter_without_a_module_is_named_by_its_shape():
    scale = torch.ones(3, requires_grad=True)
    with pytest.raises(
        UncoveredParameterError,
        match=r"concerns a tensor that requires gradients, of shape \(3,\)\.",
    ):
        cabs_torch.backward((torch.randn(2, 3) * scale).softmax(dim=0).sum(dim=1))


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda p: [p.sum()], TypeError, "losses must be a tensor, got list"),
        (
            lambda _: torch.ones(3, dtype=torch.int64),
            TypeError,
            "floating-point type, got torch.int64",
        ),
        (lambda p: p.sum(), ValueError, r"shape \(m,\), one loss an example, got shape \(\)"),
        (lambda p: p[None] * 2.0, ValueError, r"got shape \(1, 3\)"),
        (lambda p: p[:0] * 2.0, ValueError, r"got shape \(0,\)"),
        (lambda p: (p * 2.0).detach(), ValueError, "must carry a graph"),
        (lambda p: p, ValueError, "must carry a graph"),
        (lambda p: p[:1] * 2.0, ValueError, "at least two examples, since one shows no variance"),
    ],
)
def test_what_is_no_batch_of_losses_is_refused(losses, error, message):
    with pytest.raises(error, match=message):
        cabs_torch.backward(losses(torch.ones(3, requires_grad=True)))


def test_a_graph_that_was_used_is_refused():
    losses = nn.Linear(3, 2)(torch.randn(4, 3)).square().sum(dim=1)
    cabs_torch.backward(losses)
    with pytest.raises(ValueError, match="a graph that no backward pass has used"):
        cabs_torch.backward(losses)


def test_losses_under_no_grad_are_refused():
    losses = nn.Linear(3, 2)(torch.randn(4, 3)).square().sum(dim=1)
    with torch.no_grad(), pytest.raises(ValueError, match="gradients must be enabled"):
        cabs_torch.backward(losses)


def test_a_half_built_module_elsewhere_does_not_spoil_the_message():
    class Broken(nn.Module):
        def __init__(self):
            self.kept = None

    broken = Broken()
    network = model(lambda m, x: m.norm(m.matrix(x)), norm=nn.BatchNorm1d(4))
    with pytest.raises(UncoveredParameterError, match=r"'norm\.weight' of Model"):
        cabs_torch.backward(network(torch.randn(5, 4)).sum(1))
    assert broken.kept is None


def test_hooks_are_gone_after_an_error_in_the_backward_pass():
    layer = nn.Linear(3, 2)
    outputs = layer(torch.randn(4, 3))
    outputs.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cabs_torch.backward(outputs.square().mean(dim=1))
    losses = layer(torch.randn(4, 3)).square().mean(dim=1)
    losses.mean().backward()
    assert (
        float(
            cabs_torch.backward(layer(torch.randn(4, 3)).square().mean(dim=1)).gradient_norm_squared
        )
        > 0
    )
