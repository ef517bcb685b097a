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
from cabs_torch.engines import MeanGradient, make_whole, pieces_of
from cabs_torch.errors import describe
from cabs_torch.norms.sums import SquareSums
from cabs_torch.options import as_groups, parameter_lists
from cabs_torch.ranks import group_of, is_distributed
from cabs_torch.statistics import BatchStatistics
from cabs_torch.totals import Share, TotalStatistics

See = Callable[[Tensor, tuple[Tensor | None, ...]], None]
"""Called with a parameter and the gradient that a pass is about to give it."""


class Passes:
    """Parameters, whose gradients of several backward passes are squared one by one.

    Args:
        parameters: The module that is trained, an iterable of parameters, or an optimizer.
        batch_size: How many examples all passes of all ranks have together.
        process_group: Whose passes these are.
        controller: What all ranks should have alike.

    Raises:
        TypeError: If ``batch_size`` is no integer.
        ValueError: If it is below 2, no parameter requires gradients, or one is a ``DTensor`` of
            which no pass uses the whole.
    """

    def __init__(
        self,
        parameters: torch.nn.Module | Iterable[Tensor] | Any,
        batch_size: int,
        process_group: Any,
        controller: Any,
    ) -> None:
        self._batch_size = as_integer(batch_size, "batch_size", 2)
        self._group, self._controller = group_of(process_group), controller
        self._is_grouped = isinstance(parameters, torch.optim.Optimizer)
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
            required: The ids of parameters that must have a gradient.
            problem: Why these are no statistics, to be raised when they are read.
            known: Fields of a :class:`cabs_torch.totals.Share`, for a sum over ranks.
        """
        if self._group is None:
            squares = self._held() if norms is None else self._shaped(norms)
            loss = None if loss is None else loss / examples
            return BatchStatistics(
                examples, passes, square_sum, squares / scale**2, loss=loss, in_metric=False
            )
        gradient = MeanGradient(self._parameters, self._group, required)
        held, alike = gradient.squares(
            self._groups.numbers.__getitem__, self._groups.count, self._device
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
            seconds=None if self._controller is None else self._controller.own_seconds,
            **known,
        )
        return TotalStatistics(share, self._group, measured=1.0, is_grouped=self._is_grouped)

    def _held(self) -> Tensor:
        """Return the squares of the gradients that parameters hold."""
        squares = SquareSums()
        for parameter in self._parameters:
            self._square_held(squares, parameter)
        # At once: gradients that are held would be those of later passes.
        return self._summed(squares)
