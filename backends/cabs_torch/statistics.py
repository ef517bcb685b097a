"""What a backward pass, or the gradients that several have added up, tell about a batch.

Guarantees: what was not measured is said; reading the numbers waits for their own copy alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cabs import GradientStatistics
from cabs_torch import tracing
from cabs_torch.norms.sums import SquareSums
from cabs_torch.options import as_groups, parameter_lists
from cabs_torch.ranks.arrived import MeanGradient, as_used
from cabs_torch.ranks.process_groups import check_whole, group_of


@dataclass(frozen=True, slots=True)
class BatchStatistics(GradientStatistics):
    """Gradient statistics whose sums are tensors, on the device that computed them.

    On a GPU their copy to the host is started at once, so that :meth:`read`, a step later, finds
    it there.

    Args:
        measured: Which share of the parameters' elements the sums are over; 1 unless some were
            left out, by ``parameters``, ``parameter_groups`` or ``uncovered="ignore"``.

    Example:
        >>> import torch, cabs_torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> statistics = cabs_torch.backward(layer(torch.eye(2)).squeeze(1))
        >>> statistics.measured, round(statistics.read().variance_trace, 6)
        (1.0, 1.0)
    """

    measured: float = 1.0
    _copy: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if not tracing.is_traced():
            # super() does not know the class that slots=True makes.
            GradientStatistics.__post_init__(self)
        given = [
            self.group_square_sum,
            self.gradient_norm_squared,
            *([] if self.loss is None else [self.loss]),
        ]
        sums = torch.cat([one.detach().double().reshape(-1) for one in given])
        event = None
        if sums.is_cuda:
            host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            host.copy_(sums, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            sums = host
        object.__setattr__(self, "_copy", (sums, event))

    def read(self) -> GradientStatistics:
        """Return the same statistics as Python numbers, or as NumPy arrays of one a group.

        On a GPU this waits for the copy that was started with the statistics, and for nothing that
        was queued after it.
        """
        sums: Tensor
        sums, event = self._copy
        if event is not None:
            event.synchronize()
        count = self.group_square_sum.numel()
        numbers = sums.numpy()
        squares: Any = numbers[: 2 * count].reshape(2, count)
        if self.group_square_sum.dim() == 0:
            squares = squares[:, 0].tolist()
        group_square_sum, norm_squared = squares
        loss = None if self.loss is None else float(numbers[-1])
        return GradientStatistics(
            self.examples,
            self.groups,
            group_square_sum,
            norm_squared,
            self.estimated,
            loss,
            self.in_metric,
        )


def gradient_norm_squared(
    parameters: Iterable[Tensor] | Any, *, process_group: Any = None
) -> Tensor:
    r"""Return :math:`|g|^2` of the gradients that parameters hold, in float64.

    For microbatches, once the gradients of all have been added up:
    ``sum(parts).complete(gradient_norm_squared=cabs_torch.gradient_norm_squared(model.parameters()))``.

    Args:
        parameters: An iterable of parameters, for a 0-d tensor, or an optimizer, for one of shape
            (groups,).
        process_group: Where ``torch.distributed`` has more than one rank, those that the gradients
            are the mean over: all ranks if left out. What an engine has left is added up, of
            ``fully_shard`` the pieces, by a small sum over ranks. ``False`` is for the gradients
            that this rank holds: those of its own examples, or, once they are reduced over ranks,
            of those of all. The statistics' partial sums must be over the same ones.

    Raises:
        ValueError: If there is no gradient, for all parameters or for a group of an optimizer that
            trains some; if one is a ``DTensor`` and ``process_group`` is ``False``.
        RuntimeError: If ranks hold different gradients, so that they are not reduced.

    Example:
        >>> import torch, cabs_torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> float(cabs_torch.gradient_norm_squared([weight]))
        25.0
    """
    over = group_of(process_group)
    groups = parameter_lists(parameters)
    if over is None:
        check_whole(one for group in groups for one in group)
    held = [one for group in groups for one in group if one.grad is not None]
    if not held:
        raise ValueError("parameters must hold gradients, got none; call backward first")
    as_groups(groups).check_measured(id(as_used(one)) for one in held)
    numbers = {id(one): number for number, group in enumerate(groups) for one in group}
    device = held[0].device
    if over is None:
        squares = SquareSums()
        for one in held:
            gradient: Any = one.grad
            squares.square(numbers[id(one)], gradient)
        sums = squares.by_group(int, len(groups), device)
    else:
        sums = MeanGradient(held, over).summed(numbers.__getitem__, len(groups), device)
    return sums if isinstance(parameters, torch.optim.Optimizer) else sums[0]
