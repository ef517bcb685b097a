"""Where the examples of a batch lie in a tensor, in integers alone.

Guarantees: a position says which elements belong to which example, for sequences first, flattened
rows, heads beside examples alike; no tensor is read, and none is needed.

In row-major order the elements of a tensor that holds a batch of m examples are numbered by
(outer, example, inner). How many values ``outer`` takes is all that has to be known besides the
shape; a reshape leaves it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

Shape = tuple[int, ...]


class MixedError(Exception):
    """An operation whose gradient does not belong to one example at a time; says how.

    ``node`` is the operation's, where that is not the one that was asked about.
    """

    def __init__(self, problem: str, node: object = None) -> None:
        super().__init__(problem)
        self.node = node


def along_examples() -> MixedError:
    """Return the error for an operation that runs along the examples' axis."""
    return MixedError("runs along the axis that holds the examples")


class Layout(NamedTuple):
    """A tensor's shape, and how many blocks of m examples lie one after another in it.

    Each method but :meth:`axis` is one rule: from where the examples lie in an operation's output
    to where they lie in its input, of a given shape.

    Example:
        Two sequences of three positions, positions first, as rows of one matrix and back:

        >>> Layout((6, 4), outer=3, examples=2).reshaped((3, 2, 4)).axis()
        (1, 1)
    """

    shape: Shape
    outer: int
    examples: int

    def axis(self) -> tuple[int, int]:
        """Return the axis that holds the examples, and the part of ``outer`` that lies in it.

        Raises:
            MixedError: If the examples are spread over several axes.
        """
        return _axis(self)

    @property
    def one(self) -> Shape:
        """Shape of one example's part: the tensor's own, the examples' axis divided by m."""
        here, _ = self.axis()
        return tuple(
            size // self.examples if at == here else size for at, size in enumerate(self.shape)
        )

    def moved(self, shape: Shape, axis: int) -> Layout:
        """Find the examples in one axis of the input, as they are in that of the output."""
        here, inside = self.axis()
        if shape[axis] != self.shape[here]:
            raise MixedError("changes the axis that holds the examples")
        return Layout(shape, math.prod(shape[:axis]) * inside, self.examples)

    def reshaped(self, shape: Shape) -> Layout:
        """Find them where the order of the elements is kept."""
        return self._replace(shape=shape)

    def leading(self, shape: Shape) -> Layout:
        """Find them in the first axis of both."""
        if self.axis()[0] != 0:
            raise along_examples()
        return self.moved(shape, 0)

    def broadcast(self, shape: Shape) -> Layout | None:
        """Find them in an input that is broadcast to the output, None if it has none."""
        here, _ = self.axis()
        aligned = here - (len(self.shape) - len(shape))
        if aligned < 0 or shape[aligned] != self.shape[here]:
            return None
        return self.moved(shape, aligned)

    def broadcast_axes(self, shape: Shape) -> tuple[int, ...]:
        """Return along which axes of the examples' parts, (n, *one), a shape was broadcast."""
        aligned = (1,) * (len(self.shape) - len(shape)) + tuple(shape)
        pairs = enumerate(zip(aligned, self.one, strict=True), start=1)
        return tuple(axis for axis, (size, wide) in pairs if size == 1 and wide != 1)

    def permuted(self, shape: Shape, order: Sequence[int]) -> Layout:
        """Find them where axis ``order[k]`` of the input became axis k."""
        return self.moved(shape, order[self.axis()[0]])

    def within(self, shape: Shape, axes: Collection[int]) -> Layout:
        """Find them where an operation runs along some axes, and keeps all."""
        here, _ = self.axis()
        if here in axes:
            raise along_examples()
        return self.moved(shape, here)

    def trailing(self, shape: Shape, rank: int) -> Layout:
        """Find them where an operation mixes the last ``rank`` axes of its input."""
        here, _ = self.axis()
        if here >= len(shape) - rank:
            raise along_examples()
        return self.moved(shape, here)

    def reduced(self, shape: Shape, axes: Collection[int]) -> Layout:
        """Find them where some axes of the input are gone."""
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        return self.moved(shape, kept[self.axis()[0]])

    def stacked(self, shape: Shape, added: int) -> Layout:
        """Find them where the output has one axis more."""
        here, _ = self.axis()
        if here == added:
            raise along_examples()
        return self.moved(shape, here - (here > added))

    def blocks(self, shape: Shape, axis: int, start: int, length: int) -> Layout:
        """Find them where whole batches lie one after another in an axis of the input.

        ``length`` is how many places of that axis there are, and ``start`` how many places behind
        the beginning of a batch something begins.
        """
        here, inside = self.axis()
        batch = self.shape[here] // inside
        if start % batch or length % batch:
            raise along_examples()
        return Layout(shape, math.prod(shape[:axis]) * (length // batch), self.examples)


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
