"""Who adds up the ranks' gradients, and whether to a mean: asked in the first step, not guessed.

Guarantees: all ranks ask at once, or none; a sum where a mean was expected is an error on each.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabs_torch.errors import describe
from cabs_torch.norms.sums import SquareSums
from cabs_torch.ranks.arrived import arrived_for, of_fully_shard
from cabs_torch.ranks.process_groups import is_distributed
from cabs_torch.ranks.sums import arriving, begin_sum

# What parameters' engines have said that they do; the first answer is that of all steps.
_asked: dict[int, tuple[weakref.ref[Tensor], _Answer]] = {}

# As often as gradients that are 0, or overflow, may leave them without an answer.
_ANSWERED = 16

# Relative difference of gradients that are the same, of the same examples.
_SAME = 1e-9

# Elements that tell a sum from a mean.
_ELEMENTS = 1024


class Smallest:
    """The smallest of some parameters, which tells what becomes of the gradients passes give it.

    Args:
        parameters: Those that passes give gradients.
        group: Ranks that train together, None for this one alone.
    """

    def __init__(self, parameters: Iterable[Tensor], group: Any) -> None:
        self._group = group
        self.parameter = min(parameters, key=Tensor.numel)
        """The one that is asked about."""
        # Zeros where a rank's pass gives it nothing: the others sum over this rank too.
        self._local = self.parameter.new_zeros(_ELEMENTS, dtype=torch.float64)
        self._sizes: list[Tensor] = []

    def see(self, gradients: Sequence[Tensor | None]) -> None:
        """Note what this rank's pass gives the parameter, called before that is added."""
        if gradients[0] is not None:
            first = _first(gradients[0])
            self._local = self._local + first
            self._sizes.append(first.norm())

    @property
    def rounding(self) -> float:
        """What rounding may do to the sum, in the dtype in which it is added up."""
        sizes = float(torch.stack(self._sizes).sum()) if self._sizes else 0.0
        return 4 * torch.finfo(self.parameter.dtype).eps * sizes

    def compared(self) -> tuple[Tensor, Tensor | None]:
        """Return what all ranks' passes gave together, and what arrived; first elements of both."""
        return self._summed(), self._arrived()

    def _summed(self, *others: Tensor) -> Tensor:
        """Return the sum over ranks of what passes gave, and of others, one after another."""
        summed = torch.cat([self._local, *others])
        if self._group is not None:
            with arriving(torch.distributed.get_world_size(self._group)):
                begin_sum(summed, self._group).wait()
        return summed

    def _arrived(self) -> Tensor | None:
        arrived = arrived_for(self.parameter)
        if arrived is None:
            return None
        return _first(arrived.full_tensor() if is_distributed(arrived) else arrived)


class Engine(Smallest):
    """What averages the gradients of a pass over ranks, made before it.

    In the passes of a first step it is asked: the gradient of one parameter, the smallest, is
    summed over ranks and compared with what arrives. That is a collective that later steps do not
    have. All ranks have to ask at once, so they give the same parameters in the same order, or
    share some of those that they were asked about before.
    """

    def __init__(self, parameters: Iterable[Tensor], group: Any) -> None:
        held = list(parameters)
        super().__init__(held, group)
        self._held, self._is_asked = held, has_answered(held)
        self.before: Tensor | None = None
        """Square of the gradients that were there before the pass, 0-d."""
        shared = [of_fully_shard(one, search=False) for one in held]
        pieces = [one.sharded_param for one in shared if one is not None]
        given: list[Any] = [one.grad for one in (*held, *pieces) if one.grad is not None]
        if given:
            squares = SquareSums()
            for gradient in given:
                squares.square(0, gradient.to_local() if is_distributed(gradient) else gradient)
            # At once, since the pass adds to them.
            self.before = squares.by_group(int, 1, given[0].device)[0]

    def see(self, gradients: Sequence[Tensor | None]) -> None:
        """Note what this rank's pass gives the parameter, called before that is added."""
        if not self._is_asked:
            super().see(gradients)

    def check(self, examples: int = 0, batch: int = 0) -> None:
        """Raise ValueError on every rank if the engine does not take the mean.

        Warn where all ranks have made the same gradient.

        Args:
            examples: How many this rank had in the pass, of a microbatch perhaps.
            batch: How many all ranks have in all microbatches.
        """
        if self._is_asked:
            return
        self._is_asked = True
        answer = _answer_of(self._held)
        # The last microbatch may be the first to be reduced, together with those before.
        self._local = answer.local = self._local + answer.local
        nothing = torch.zeros_like(self._local)
        arrived = self._arrived()
        counts = self._local.new_tensor([examples, batch])
        found = self._summed(nothing if arrived is None else arrived, counts)
        summed, arrived, counts = found.split([_ELEMENTS, _ELEMENTS, len(counts)])
        size, ranks = float(summed.norm()), torch.distributed.get_world_size(self._group)
        answer.examples += int(counts[0])
        # Of sums that are the same on all ranks, so that all ask again or none.
        if answer.examples >= int(counts[1]) // ranks:
            answer.times = _ANSWERED if 0.0 < size < math.inf else answer.times + 1
            answer.examples, answer.local = 0, 0.0
        is_alike = float((summed - ranks * self._local).norm()) <= _SAME * size
        if is_alike and ranks > 1 and size > 0.0:
            warnings.warn(
                f"all {ranks} ranks have made the same gradient of {describe(self.parameter)}, as "
                "they do for the same examples: give each rank a share of the batch of its own, "
                "as cabs_torch.loader does",
                RuntimeWarning,
                stacklevel=3,
            )
        # What is neither sum nor mean was not reduced, which the squares tell in every step.
        if float((arrived - ranks * summed).norm()) < 0.01 * ranks * size:
            raise ValueError(
                f"{describe(self.parameter)}, has the sum of the gradients of {ranks} ranks, where "
                "their mean was expected: let the engine average gradients, as "
                "DistributedDataParallel and fully_shard do unless they are told otherwise "
                "(set_gradient_divide_factor, communication hooks)"
            )


@dataclass(slots=True)
class _Answer:
    """What is known of that which averages some parameters' gradients."""

    times: int = 0
    """How often it was asked; all times if it has answered."""
    examples: int = 0
    """How many the microbatches of all ranks had, since it was asked about a whole batch."""
    local: Tensor | float = 0.0
    """What they gave on this rank."""


def has_answered(parameters: Iterable[Tensor]) -> bool:
    """Return whether what averages some of the parameters' gradients has said what it does."""
    return any(one.times >= _ANSWERED for one in _answers(parameters))


def _answers(parameters: Iterable[Tensor]) -> Iterator[_Answer]:
    for one in parameters:
        known, answer = _asked.get(id(one), (None, None))
        if known is not None and answer is not None and known() is one:
            yield answer


def _answer_of(parameters: Sequence[Tensor]) -> _Answer:
    """Return what is known, the same from now on for all of the parameters."""
    answer = max(_answers(parameters), key=lambda one: one.times, default=_Answer())
    _asked.update((id(one), (weakref.ref(one), answer)) for one in parameters)
    return answer


def _first(gradient: Tensor) -> Tensor:
    """Return the first elements in double precision, always as many."""
    dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    flat = dense.flatten()[:_ELEMENTS].double()
    return pad(flat, (0, _ELEMENTS - len(flat)))
