"""Where the examples of a batch lie in a tensor, and how to take them out one after another.

Guarantees: a position says which elements belong to which example, for sequences first, flattened
rows, heads beside examples alike; no tensor's values are read.

In row-major order the elements of a tensor that holds a batch of m examples are numbered by
(outer, example, inner). How many values ``outer`` takes is all that has to be known besides the
shape; a reshape leaves it as it is.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class MixedError(Exception):
    """An operation whose gradient does not belong to one example at a time; says how.

    ``node`` is the operation's, where that is not the one that was asked about.
    """

    def __init__(self, problem: str, node: object = None) -> None:
        super().__init__(problem)
        self.node = node


class HiddenError(Exception):
    """An operation that can hide parameters from the graph; says how."""


class Layout(NamedTuple):
    """A tensor's shape, and how many blocks of m examples, at least two, lie one after another."""

    shape: Shape
    outer: int
    examples: int

    def axis(self) -> tuple[int, int]:
        """Return the axis that holds the examples, and the part of ``outer`` that lies in it.

        Raises:
            MixedError: If the examples are spread over several axes.
        """
        return _axis(self)

    def moved(self, shape: Shape, axis: int) -> Layout:
        """Return the layout of a tensor that holds the examples in the same way in ``axis``."""
        here, inside = self.axis()
        if shape[axis] != self.shape[here]:
            raise MixedError("changes the axis that holds the examples")
        return Layout(shape, math.prod(shape[:axis]) * inside, self.examples)

    def take(self, tensor: Tensor, examples: int) -> Tensor:
        """Return the first examples' parts of a tensor, shape (examples, *shape).

        ``shape`` is the tensor's own, with the examples' axis divided by their number.
        """
        axis, inside = self.axis()
        if axis == 0 and inside == 1:
            return tensor.reshape(self.examples, -1, *tensor.shape[1:])[:examples]
        split = (*self.shape[:axis], inside, self.examples, -1, *self.shape[axis + 1 :])
        taken = tensor.reshape(split).movedim(axis + 1, 0)[:examples]
        return taken.flatten(axis + 1, axis + 2)

    def only(self, tensor: Tensor, members: list[int]) -> Tensor:
        """Return the tensor with the elements of all other examples replaced by zeros."""
        is_kept = torch.zeros(self.examples, 1, dtype=torch.bool, device=tensor.device)
        is_kept[members] = True
        blocks = tensor.reshape(self.outer, self.examples, -1)
        return torch.where(is_kept, blocks, 0.0).reshape(self.shape)


@lru_cache(maxsize=4096)
def _axis(layout: Layout) -> tuple[int, int]:
    before = 1
    for axis, size in enumerate(layout.shape):
        if layout.outer < before * size:
            inside = layout.outer // before
            if before * inside == layout.outer and size % (inside * layout.examples) == 0:
                return axis, inside
            break
        before *= size
    raise MixedError("spreads the examples over several axes")
