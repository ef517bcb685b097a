"""A plain loop over the examples in float64, against which everything is held."""

import copy

import torch

import cabs_torch


def gradients_one_by_one(model, loss_fn, inputs, targets):
    """Return each example's gradient, shape (m, parameters), from a float64 copy of the model."""
    double = copy.deepcopy(model).double()
    parameters = [parameter for parameter in double.parameters() if parameter.requires_grad]
    rows = []
    for index in range(len(targets)):
        one = inputs[index : index + 1]
        one = loss_fn(double(one.double() if one.is_floating_point() else one), targets[[index]])
        gradients = torch.autograd.grad(one.squeeze(0), parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(parameter).flatten()
                    if gradient is None
                    else gradient.flatten()
                    for parameter, gradient in zip(parameters, gradients, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def assert_exact(model, loss_fn, inputs, targets):
    """Assert that statistics equal the loop's, and gradients those of plain backward to the bit."""
    rtol = 1e-10 if next(model.parameters()).dtype == torch.float64 else 1e-5
    plain = copy.deepcopy(model)
    loss_fn(plain(inputs), targets).mean().backward()
    statistics = cabs_torch.backward(loss_fn(model(inputs), targets))
    for (name, parameter), expected in zip(
        model.named_parameters(), plain.parameters(), strict=True
    ):
        if expected.grad is None:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, expected.grad), name
    rows = gradients_one_by_one(model, loss_fn, inputs, targets)
    square_sum, gradient_norm_squared = rows.square().sum(), rows.mean(dim=0).square().sum()
    assert (statistics.examples, statistics.groups) == (len(targets), len(targets))
    torch.testing.assert_close(statistics.group_square_sum, square_sum, rtol=rtol, atol=1e-30)
    # Where the gradients nearly cancel, the batch's own gradient carries their rounding errors.
    slack = rtol * float(gradient_norm_squared * square_sum / len(targets)) ** 0.5 + 1e-14
    torch.testing.assert_close(
        statistics.gradient_norm_squared, gradient_norm_squared, rtol=rtol, atol=slack
    )
    # Where the gradients nearly agree, the trace is a small difference of these two.
    trace, slack = rows.var(dim=0).sum(), rtol * float(square_sum) / (len(targets) - 1)
    torch.testing.assert_close(statistics.variance_trace, trace, rtol=rtol, atol=slack)
