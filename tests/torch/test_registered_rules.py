"""Rules that users register for operations of their own."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cabs_torch


class FusedLinear(torch.autograd.Function):
    """A matrix and what is added, as a fused kernel has them; counts its backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx, x, weight, bias, negative):
        ctx.save_for_backward(x, weight)
        ctx.sign = -1.0 if negative else 1.0
        return ctx.sign * (x @ weight.mT) + bias

    @staticmethod
    def backward(ctx, cotangent):
        FusedLinear.passes += 1
        x, weight = ctx.saved_tensors
        rows, outs = x.flatten(0, -2), cotangent.flatten(0, -2)
        return ctx.sign * cotangent @ weight, ctx.sign * outs.mT @ rows, outs.sum(dim=0), None


def of_weight(ctx, cotangent):
    x, _ = ctx.saved_tensors
    return cabs_torch.OuterProduct(ctx.sign * cotangent, x)


def of_bias(ctx, cotangent):  # noqa: ARG001
    return cotangent.flatten(1, -2).sum(dim=1) if cotangent.dim() > 2 else cotangent


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr("cabs_torch.rules.registered._rules", {})
    monkeypatch.setattr(FusedLinear, "passes", 0)


def losses_of(first, second, weight, bias):
    def losses(x):
        hidden = FusedLinear.apply(first(x), weight, bias, True).tanh()
        hidden = FusedLinear.apply(hidden, weight, bias, False)  # used twice
        return second(hidden).flatten(1).square().sum(dim=1)

    return losses


def parts(dtype=torch.float64):
    torch.manual_seed(0)
    weight, bias = (nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in ((4, 4), (4,)))
    return nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype), weight, bias


@pytest.mark.parametrize("shape", [(6, 3), (6, 5, 3)])
def test_a_rule_is_exact_and_calls_no_backward_pass_for_each_example(shape):
    losses, x = losses_of(*parts()), torch.randn(*shape, dtype=torch.float64)
    cabs_torch.register_rule(FusedLinear, {1: of_weight, 2: of_bias})
    found = cabs_torch.verify(losses, x)
    assert found.error < 1e-12
    assert sum("registered for FusedLinear" in row.rule for row in found.rows) == 2
    FusedLinear.passes = 0
    cabs_torch.backward(losses(x), sample=4)
    assert FusedLinear.passes == 2


def test_without_a_rule_each_example_costs_a_call():
    losses, x = losses_of(*parts()), torch.randn(6, 3, dtype=torch.float64)
    assert cabs_torch.verify(losses, x).error < 1e-12
    FusedLinear.passes = 0
    cabs_torch.backward(losses(x))
    assert FusedLinear.passes > 2 * 6


def test_a_rule_holds_inside_of_a_checkpoint_and_by_the_name_of_the_node():
    losses, x = losses_of(*parts()), torch.randn(6, 3, dtype=torch.float64)
    cabs_torch.register_rule("FusedLinearBackward", {1: of_weight, 2: of_bias})
    kept = lambda x: checkpoint(losses, x, use_reentrant=False)  # noqa: E731
    found = cabs_torch.verify(kept, x)
    assert found.error < 1e-12
    assert sum("registered for FusedLinearBackward" in row.rule for row in found.rows) == 2


def test_a_wrong_rule_shows_in_verify():
    losses, x = losses_of(*parts()), torch.randn(6, 3, dtype=torch.float64)
    double = lambda ctx, cotangent: 2.0 * of_bias(ctx, cotangent)  # noqa: E731
    cabs_torch.register_rule(FusedLinear, {1: of_weight, 2: double})
    assert cabs_torch.verify(losses, x).error > 1.0


@pytest.mark.parametrize(
    ("rule", "got"),
    [
        (lambda _, cotangent: cotangent[:2], r"got \(2, 4\)"),
        (lambda _ctx, _cotangent: None, "got None"),
        (lambda _, c: cabs_torch.OuterProduct(c, c), r"got \[\(6, 4\), \(6, 4\)\]"),
        (lambda _, c: cabs_torch.OuterProduct(c[:, None, None], c), r"got \[\(6, 1, 1, 4\)"),
        (lambda _, c: cabs_torch.OuterProduct(c, None), "got OuterProduct"),
        (lambda _, c: c.long(), r"got \(6, 4\)"),
    ],
)
def test_a_rule_of_other_shapes_is_an_error_and_gradients_are_whole(rule, got):
    first, second, weight, bias = parts()
    losses, x = losses_of(first, second, weight, bias), torch.randn(6, 3, dtype=torch.float64)
    losses(x).mean().backward()
    plain, bias.grad = bias.grad, None
    cabs_torch.register_rule(FusedLinear, {1: of_weight, 2: rule})
    with pytest.raises(ValueError, match=rf"must return gradients of shape \(6, 4\).*{got}"):
        cabs_torch.backward(losses(x))
    assert torch.equal(bias.grad, plain)


def test_examples_that_lie_elsewhere_are_refused():
    first, second, weight, bias = parts()
    cabs_torch.register_rule(FusedLinear, {1: of_weight, 2: of_bias})
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    hidden = FusedLinear.apply(first(x).transpose(0, 1), weight, bias, False)
    losses = second(hidden).square().sum(dim=(0, 2))
    said = "must have its examples along the first axis"
    with pytest.raises(cabs_torch.UncoveredParameterError, match=said):
        cabs_torch.backward(losses)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(2), {}), "must be a torch.autograd.Function, or the name of a node"),
        ((FusedLinear, {"weight": of_weight}), "a function for each place"),
        ((FusedLinear, {1: "weight"}), "a function for each place"),
        ((FusedLinear, {-1: of_weight}), "a function for each place"),
        ((FusedLinear, {}), "a function for each place"),
        ((FusedLinear, None), "a function for each place"),
        ((nn.Linear, {1: of_weight}), "must be a torch.autograd.Function"),
    ],
)
def test_what_is_no_rule_is_an_error(given, message):
    with pytest.raises(TypeError, match=message):
        cabs_torch.register_rule(*given)


class Both(torch.autograd.Function):
    """Two outputs, an argument that is no tensor, and a bias that may be None."""

    @staticmethod
    def forward(ctx, x, weight, name, bias, shift):
        del name
        ctx.save_for_backward(x, weight)
        first = x @ weight.mT + shift
        return (first if bias is None else first + bias), x @ weight.mT * 2.0

    @staticmethod
    def backward(ctx, first, second):
        x, weight = ctx.saved_tensors
        both = first + 2.0 * second
        bias = first.sum(dim=0) if ctx.needs_input_grad[3] else None
        return both @ weight, both.mT @ x, None, bias, first.sum(dim=0)


BOTH = {
    1: lambda ctx, first, second: cabs_torch.OuterProduct(
        first + 2.0 * second, ctx.saved_tensors[0]
    ),
    3: lambda _ctx, first, _second: first,
    4: lambda _ctx, first, _second: first * 1.0,
}


@pytest.mark.parametrize("used", ["both", "first", "second"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_through_all_outputs_count_and_places_are_those_of_arguments(used, has_bias):
    cabs_torch.register_rule(Both, BOTH)
    torch.manual_seed(0)
    weight, bias, shift = (
        nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((4, 3), (4,), (4,))
    )
    inner = nn.Linear(3, 3, dtype=torch.float64)

    def losses(x):
        first, second = Both.apply(inner(x), weight, "name", bias if has_bias else None, shift)
        chosen = {"both": first + second.sin(), "first": first, "second": second}[used]
        return chosen.square().sum(dim=1)

    found = cabs_torch.verify(losses, torch.randn(5, 3, dtype=torch.float64))
    assert found.error < 1e-12


def test_a_rule_that_changes_a_cotangent_is_an_error():
    losses, x = losses_of(*parts()), torch.randn(6, 3, dtype=torch.float64)
    cabs_torch.register_rule(FusedLinear, {1: of_weight, 2: lambda _, c: c.mul_(2.0)})
    with pytest.raises(RuntimeError, match="must not change a cotangent"):
        cabs_torch.backward(losses(x))


def test_an_operator_of_torch_library_is_known_by_its_name():
    @torch.library.custom_op("cabs_tests::scaled", mutates_args=())
    def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale

    def backward(ctx, cotangent):
        x, scale = ctx.saved_tensors
        return cotangent * scale, (cotangent * x).sum(dim=0)

    scaled.register_autograd(
        backward,
        setup_context=lambda ctx, inputs, output: output is None or ctx.save_for_backward(*inputs),
    )
    scale = nn.Parameter(torch.randn(3, dtype=torch.float64))
    name = scaled(torch.ones(2, 3, dtype=torch.float64), scale).grad_fn.name()
    cabs_torch.register_rule(name, {1: lambda ctx, cotangent: cotangent * ctx.saved_tensors[0]})
    x = torch.randn(5, 3, dtype=torch.float64)
    found = cabs_torch.verify(lambda x: scaled(x, scale).square().sum(dim=1), x)
    assert found.error < 1e-12
    assert found.rows[0].rule == f"registered for {name}"
