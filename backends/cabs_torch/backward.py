"""The backward pass, with the gradient statistics of its batch.

Guarantees: the gradients are those of ``losses.mean().backward()`` to the bit; the statistics are
exact up to rounding, or an error is raised before anything was computed; nothing waits for a
device. Assumes that no hook on the way changes a gradient, and that one thread at a time trains
the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from cabs import GradientStatistics
from cabs_torch.graph import Walk
from cabs_torch.layout import Node
from cabs_torch.norms import square


def backward(losses: Tensor) -> GradientStatistics:
    r"""Do ``losses.mean().backward()`` and return the statistics of the batch's gradient.

    The squared norm of each example's gradient follows from the inputs and the output cotangents
    of the operations in which parameters meet the batch (Goodfellow, "Efficient per-example
    gradient computations", arXiv 1510.01799, for matrices); the autograd graph tells which these
    are. Covered are matrices with any number of leading axes, convolutions, and biases.

    Args:
        losses: One loss an example, shape (m,), floating point, with a graph. The examples may
            lie along any axis inside the model, as long as no operation mixes them.

    Returns:
        :class:`cabs.GradientStatistics` with groups of one example, over all parameters that the
        losses depend on. Its sums are 0-d float64 tensors on the device of ``losses``. One example
        shows no variance: for a batch of one nothing is measured, and both sums are ``nan``.

    Raises:
        TypeError: If ``losses`` is no tensor, or not of a real floating-point type.
        ValueError: If it has another shape, is empty, or carries no graph, or one that a backward
            pass has used already.
        UncoveredParameterError: If a parameter's norms cannot be had exactly; the message names
            the parameter and the operation. Nothing has been computed then.

    Example:
        >>> import torch, cabs_torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> inputs = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> statistics = cabs_torch.backward(layer(inputs).squeeze(1))
        >>> layer.weight.grad
        tensor([[2., 0.]])
        >>> float(statistics.variance_trace)
        2.0
    """
    _check(losses)
    examples, device = len(losses), losses.device
    if examples == 1:
        losses.mean().backward()  # type: ignore[no-untyped-call]
        nothing = torch.full((), math.nan, dtype=torch.float64, device=device)
        return GradientStatistics(1, 1, nothing, nothing)
    walk = Walk(losses)
    group_squares: list[Tensor] = []
    mean_squares: list[Tensor] = []
    with ExitStack() as hooks:

        def watch(node: Node, rule: Callable[[Tensor], Tensor], sums: list[Tensor]) -> None:
            def see(cotangents: Sequence[Tensor | None]) -> None:
                # None stands for a cotangent of zeros.
                if cotangents[0] is not None:
                    with torch.autocast(cotangents[0].device.type, enabled=False):
                        sums.append(rule(cotangents[0]).to(device))

            hooks.callback(node.register_prehook(see).remove)

        for join in walk.joins:
            watch(join.node, join.sum_of_squares, group_squares)
        for leaf in walk.leaves.values():
            watch(leaf, square, mean_squares)
        losses.mean().backward()  # type: ignore[no-untyped-call]

    # What flows back is an example's share of the mean, its gradient times 1/m as the type of the
    # losses has it: in half precision not quite 1/m.
    share = float(torch.ones((), dtype=losses.dtype) / examples)
    return GradientStatistics(
        examples,
        examples,
        group_square_sum=_total(group_squares, device) / share**2,
        mean_square=_total(mean_squares, device) / (share * examples) ** 2,
    )


def _total(sums: list[Tensor], device: torch.device) -> Tensor:
    if not sums:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(sums).sum()


def _check(losses: Any) -> None:
    """Raise TypeError or ValueError for what is no batch of losses with a graph."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a tensor, got {type(losses).__name__}")
    if not losses.dtype.is_floating_point:
        raise TypeError(f"losses must be of a real floating-point type, got {losses.dtype}")
    if losses.dim() != 1 or not len(losses):
        raise ValueError(
            f"losses must have shape (m,), one loss an example, got shape {tuple(losses.shape)}; "
            "compute the loss with reduction='none' and average over all axes but the batch's"
        )
    if losses.grad_fn is None or not torch.is_grad_enabled():
        raise ValueError(
            "losses must carry a graph to the parameters, and gradients must be enabled; were the "
            "losses detached, or is torch.no_grad() in force?"
        )
