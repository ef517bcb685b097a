"""How the variance of a step is measured: exactly, from groups, or as the authors' code has it.

Guarantees: each leaves the gradient of the batch's mean loss in ``.grad``, and returns statistics
as plain numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import cabs_torch
from cabs import GradientStatistics

# Maps a model, its losses given scores and targets, and a batch to the mean loss and statistics.
Losses = Callable[[Tensor, Tensor], Tensor]
Measured = tuple[Tensor, GradientStatistics | None]
Measure = Callable[[nn.Module, Losses, Tensor, Tensor], Measured]


def nothing(model: nn.Module, losses: Losses, inputs: Tensor, targets: Tensor) -> Measured:
    """Do a plain backward pass."""
    mean = losses(model(inputs), targets).mean()
    mean.backward()
    return mean.detach(), None


def exact(model: nn.Module, losses: Losses, inputs: Tensor, targets: Tensor) -> Measured:
    """Take every example's gradient into account."""
    each = losses(model(inputs), targets)
    statistics = cabs_torch.backward(each)
    return each.detach().mean(), statistics.read()


def groups(count: int) -> Measure:
    """Return the measure that compares the mean gradients of so many parts of the batch."""
    return partial(_groups, count)


def _groups(
    count: int, model: nn.Module, losses: Losses, inputs: Tensor, targets: Tensor
) -> Measured:
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=len(inputs))
    means = []
    for part in np.array_split(np.arange(len(inputs)), min(count, len(inputs))):
        chosen = slice(int(part[0]), int(part[-1]) + 1)
        one = losses(model(inputs[chosen]), targets[chosen]).mean()
        accumulation.backward(one, examples=len(part))
        means.append(one.detach() * (len(part) / len(inputs)))
    return torch.stack(means).sum(), accumulation.complete().read()


def published(model: nn.Module, losses: Losses, inputs: Tensor, targets: Tensor) -> Measured:
    """Take second moments as the authors' TensorFlow code does.

    An example's gradient of a convolution is a sum over positions. That code squares the part of
    each position and adds up the squares, which drops the products of different positions; so it is
    with the bias. For dense layers it is exact.
    """
    squares: list[Tensor] = []
    hooks = [layer.register_forward_hook(partial(_watch, squares)) for layer in model.modules()]
    each = losses(model(inputs), targets)
    for hook in hooks:
        hook.remove()
    mean = each.mean()
    mean.backward()
    # Cotangents are those of the mean, a m-th part of an example's own.
    moment = len(inputs) ** 2 * float(torch.stack(squares).sum())
    gradients = [parameter.grad.double() for parameter in model.parameters()]
    square = float(torch.stack([(one**2).sum() for one in gradients]).sum())
    return mean.detach(), GradientStatistics(len(inputs), len(inputs), moment, square)


def _watch(squares: list[Tensor], layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    """Have the sum of a layer's second moments added to a list when its cotangent is known."""
    if isinstance(layer, nn.Linear):
        squared = (inputs[0].detach() ** 2).sum(dim=1)
    elif isinstance(layer, nn.Conv2d):
        each = (inputs[0].detach() ** 2).sum(dim=1)
        window = (layer.kernel_size, layer.stride, layer.padding)
        squared = avg_pool2d(each, *window, divisor_override=1)
    else:
        return

    def add(cotangent: Tensor) -> None:
        # One more than the squared input, for the bias.
        squares.append(((squared + 1.0) * (cotangent**2).sum(dim=1)).double().sum())

    output.register_hook(add)
