"""What groups of examples have in common, whoever calls the backward passes of each.

Guarantees: a gradient is seen in the node that adds it to the parameter's, so before it is added
to those of other passes and before an engine reduces it over ranks; no copy of a large one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from cabs.values.scalars import as_integer
from cabs_torch.errors import describe
from cabs_torch.norms import reductions
from cabs_torch.norms.sums import SquareSums, Weights
from cabs_torch.optimizers import metric_of
from cabs_torch.options import as_groups, parameter_lists
from cabs_torch.ranks.arrived import MeanGradient, make_whole, pieces_of
from cabs_torch.ranks.process_groups import group_of, is_distributed
from cabs_torch.ranks.share import Share
from cabs_torch.statistics import BatchStatistics
from cabs_torch.totals import TotalStatistics

See = Callable[[Tensor, tuple[Tensor | None, ...]], None]
"""Called with a parameter and the gradient that a pass is about to give it."""


class Passes:
    """Parameters, whose gradients of several backward passes are squared one by one.

    Args:
        parameters: The module that is trained, an iterable of parameters, or an optimizer.
        batch_size: How many examples all passes of all ranks have together.
        process_group: Whose passes these are.
        controller: What all ranks should have alike.
        in_metric: Whether norms are those in the metric of the optimizer's coming step.

    Raises:
        TypeError: If ``batch_size`` is no integer, or norms are to be in the metric of something
            that is no optimizer whose step is known.
        ValueError: If it is below 2, no parameter requires gradients, or one is a ``DTensor`` of
            which no pass uses the whole; if the controller's rule takes norms in the metric of a
            step and these are not, or they are and ``fully_shard`` leaves each rank a piece.
    """

    def __init__(
        self,
        parameters: torch.nn.Module | Iterable[Tensor] | Any,
        batch_size: int,
        process_group: Any,
        controller: Any,
        in_metric: bool,
    ) -> None:
        self._batch_size = as_integer(batch_size, "batch_size", 2)
        self._group, self._controller = group_of(process_group), controller
        self._is_grouped = isinstance(parameters, torch.optim.Optimizer)
        self._metric = _metric_of(parameters, in_metric, controller)
        self._elementwise: dict[int, Tensor] = {}
        if isinstance(parameters, torch.nn.Module):
            make_whole(parameters)
            parameters = parameters.parameters()
        self._groups = as_groups(parameter_lists(parameters))
        self._parameters = [one for one in self._groups.parameters if one.requires_grad]
        if not self._parameters:
            raise ValueError("parameters must hold one that requires gradients, got none")
        for one in self._parameters:
            if is_distributed(one):
                raise ValueError(
                    f"{describe(one)}, is a DTensor of which no pass has used the whole; for "
                    "fully_shard give the module itself, not its parameters, or make this after a "
                    "first forward pass. Of tensor parallelism there are no statistics"
                )
        self._pieces = pieces_of(self._parameters)
        self._device = self._parameters[0].device

    @contextmanager
    def _watched(self, see: See) -> Iterator[list[Any]]:
        """Have a function called with what passes give, and yield the nodes that they end in."""
        trained = [one for one in self._parameters if one.requires_grad]
        # The nodes are held until the end, so that they are those that the graph has.
        nodes = [get_gradient_edge(parameter).node for parameter in trained]
        with ExitStack() as hooks:
            for node, parameter in zip(nodes, trained, strict=True):
                hooks.callback(node.register_prehook(partial(see, parameter)).remove)
            yield nodes

    def _square(self, squares: SquareSums, parameter: Tensor, gradient: Any) -> None:
        local = gradient.to_local() if is_distributed(gradient) else gradient
        squares.square(self._groups.numbers[id(parameter)], local)

    def _keep(self, parameter: Tensor, gradient: Tensor, weight: Tensor | float) -> None:
        """Add a gradient's elementwise squares, times a weight, to those of other passes."""
        squares = reductions.dense(gradient).square().mul_(weight)
        known = self._elementwise.get(id(parameter))
        self._elementwise[id(parameter)] = squares if known is None else known.add_(squares)

    def _held_by(self, parameter: Tensor) -> list[Tensor | None]:
        """Return the gradient of what passes use, and that of the piece that an engine keeps."""
        piece = self._pieces.get(id(parameter))
        return [parameter.grad, None if piece is None else piece.grad]

    def _square_held(self, squares: SquareSums, parameter: Tensor) -> None:
        for gradient in self._held_by(parameter):
            if gradient is not None:
                self._square(squares, parameter, gradient)

    def _summed(self, squares: SquareSums) -> Tensor:
        """Return sums of squares, 0-d or of shape (groups of parameters,)."""
        return self._shaped(squares.by_group(int, self._groups.count, self._device))

    def _shaped(self, sums: Tensor) -> Tensor:
        return sums if self._is_grouped else sums[0]

    def _completed(
        self,
        square_sum: Any,
        *,
        examples: int,
        passes: int,
        loss: Tensor | None,
        norms: Tensor | None = None,
        scale: Tensor | float = 1.0,
        weight: float = 1.0,
        required: Iterable[int] = (),
        problem: str = "",
        **known: Any,
    ) -> BatchStatistics:
        """Return the statistics of the passes of all ranks, of which this one has had some.

        Args:
            square_sum: Sum of m_k |g_k|^2 over this rank's groups.
            examples: How many examples they have.
            passes: How many there are.
            loss: Summed over the examples.
            norms: This rank's share of the squared norm of the mean gradient, shape (groups of
                parameters,), if it is not that of the gradients that parameters hold.
            scale: What the gradients that parameters hold are multiplied by.
            weight: What the elementwise squares that were kept are to be multiplied by.
            required: The ids of parameters that must have a gradient.
            problem: Why these are no statistics, to be raised when they are read.
            known: Fields of a :class:`cabs_torch.ranks.share.Share`, for a sum over ranks.
        """
        weights = None
        # Where there is a problem, gradients may be missing; ranks add up all the same.
        if self._metric is not None and not problem:
            weights = self._metric(scale if isinstance(scale, Tensor) else None)
            square_sum = square_sum + self._kept(weights) * weight
        if self._group is None:
            squares = self._held(weights) if norms is None else self._shaped(norms)
            loss = None if loss is None else loss / examples
            return BatchStatistics(
                examples,
                passes,
                square_sum,
                squares / scale**2,
                loss=loss,
                in_metric=weights is not None,
            )
        gradient = MeanGradient(self._parameters, self._group, required)
        held, alike = gradient.squares(
            self._groups.numbers.__getitem__, self._groups.count, self._device, weights
        )
        share = Share(
            examples,
            self._batch_size,
            is_told=True,
            fingerprint=None if self._controller is None else self._controller.fingerprint,
            loss=loss,
            squares=square_sum.reshape(-1),
            norms=(held if norms is None else norms) / scale**2,
            alike=alike,
            measured=passes,
            problem=problem or gradient.problem,
            is_by_example=False,
            is_in_metric=weights is not None,
            seconds=None if self._controller is None else self._controller.own_seconds,
            **known,
        )
        return TotalStatistics(share, self._group, measured=1.0, is_grouped=self._is_grouped)

    def _kept(self, weights: Weights) -> Tensor:
        """Return the sums of the elementwise squares that were kept, and keep none."""
        squares, kept = SquareSums(), self._elementwise
        self._elementwise = {}
        for parameter in self._parameters:
            if (summed := kept.pop(id(parameter), None)) is None:
                continue
            whole, of_part = reductions.rows(summed), weights(parameter)
            for part in reductions.blocks(whole):
                product = whole[part].mul_(of_part(part))
                squares.add(self._groups.numbers[id(parameter)], product.sum().double())
        return self._summed(squares)

    def _held(self, weights: Weights | None = None) -> Tensor:
        """Return the squares of the gradients that parameters hold, times weights."""
        squares = SquareSums()
        for parameter in self._parameters:
            if weights is None:
                self._square_held(squares, parameter)
            elif parameter.grad is not None:
                number = self._groups.numbers[id(parameter)]
                squares.weigh(number, parameter.grad, weights(parameter))
        # At once: gradients that are held would be those of later passes.
        return self._summed(squares)


def _metric_of(parameters: Any, in_metric: bool, controller: Any) -> Any:
    """Return the metric in which norms are to be taken, None where P is 1."""
    if not in_metric:
        if controller is not None and controller.configuration.rule.in_metric:
            raise ValueError(
                "in_metric must be True for a controller whose rule is adaptive, which takes norms "
                "in the metric of the optimizer's step: give the optimizer in place of parameters"
            )
        return None
    if not isinstance(parameters, torch.optim.Optimizer):
        raise TypeError(
            "in_metric needs the optimizer in place of parameters, got "
            f"{type(parameters).__name__}; call with (optimizer, in_metric=True)"
        )
    metric = metric_of(parameters)
    if metric is not None:
        held = [one for group in parameter_lists(parameters) for one in group]
        if any(map(torch.is_complex, held)):
            raise ValueError("in_metric must be False for complex parameters, whose P is not known")
        if any(map(is_distributed, held)) or pieces_of(held):
            raise ValueError(
                "in_metric must be False where fully_shard leaves each rank a piece of a gradient, "
                "since squares of its elements are of the whole; use DistributedDataParallel, or a "
                "rule that is not adaptive, such as cabs.Progress(), with statistics without it"
            )
    return metric
