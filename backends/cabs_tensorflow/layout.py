"""Where the examples of a batch lie in a tensor, and how to take them out one after another.

Guarantees: a position says which elements belong to which example, for sequences first, flattened
rows, heads beside examples alike; no tensor's values are read.

In row-major order the elements of a tensor that holds a batch of m examples are numbered by
(outer, example, inner). How many values ``outer`` takes is all that has to be known besides the
shape; a reshape leaves it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from cabs_tensorflow.errors import MixedError

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """A tensor's shape, and how many blocks of m examples lie one after another.

    Sizes that are not known while a function is traced are stood for by numbers, see
    :mod:`cabs_tensorflow.sizes`.
    """

    shape: Shape
    outer: int
    examples: int

    def axis(self) -> tuple[int, int]:
        """Return the axis that holds the examples, and the part of ``outer`` that lies in it.

        Raises:
            MixedError: If the examples are spread over several axes.
        """
        before = 1
        for axis, size in enumerate(self.shape):
            if self.outer < before * size:
                inside = self.outer // before
                if before * inside == self.outer and size % (inside * self.examples) == 0:
                    return axis, inside
                break
            before *= size
        raise MixedError("spreads the examples over several axes")

    def moved(self, shape: Shape, axis: int) -> Layout:
        """Return the layout of a tensor that holds the examples in the same way in ``axis``."""
        here, inside = self.axis()
        if shape[axis] != self.shape[here]:
            raise MixedError("changes the axis that holds the examples")
        return Layout(shape, math.prod(shape[:axis]) * inside, self.examples)

    @property
    def one(self) -> Shape:
        """Shape of one example's part: the tensor's own, the examples' axis divided by m."""
        axis, _ = self.axis()
        return tuple(
            size // self.examples if at == axis else size for at, size in enumerate(self.shape)
        )


def sizes_of(tensor: Any) -> list[Any]:
    """Return the sizes of a tensor, as integers where they are known."""
    known = tensor.shape.as_list()
    dynamic: Any = tf.shape(tensor) if None in known else None
    return [dynamic[axis] if size is None else size for axis, size in enumerate(known)]


@dataclass(frozen=True)
class Batch:
    """The batch that the losses are of, while a function is traced.

    Args:
        examples: m, an integer, or a tensor of shape () where it is not known yet.
        sample: Over how many examples norms are taken; all of them if None.
        known: From a size that may stand for another one, or follow from one that does, to the
            size, None if it is not known.
    """

    examples: Any
    sample: int | None
    known: Callable[[int], int | None]

    @property
    def taken(self) -> Any:
        """Over how many examples norms are taken, an integer or a tensor."""
        if self.sample is None:
            return self.examples
        if isinstance(self.examples, int):
            return min(self.sample, self.examples)
        return tf.minimum(self.sample, self.examples)

    def take(self, tensor: Any, layout: Layout) -> Any:
        """Return the parts of the examples that norms are taken over, shape (n, *layout.one)."""
        axis, inside = layout.axis()
        rest = layout.shape[axis] // (inside * layout.examples)
        if axis == 0 and inside == rest == 1:
            return tf.expand_dims(self._first(tensor), 1)
        sizes = sizes_of(tensor)
        before, after = sizes[:axis], sizes[axis + 1 :]
        outward: Any = 1 if inside == 1 else self.known(inside)
        inward: Any = 1 if rest == 1 else self.known(rest)
        if inside == 1:
            inward = sizes[axis] // self.examples
        elif rest == 1:
            outward = sizes[axis] // self.examples
        elif outward is None or inward is None:
            raise MixedError("has an axis of examples whose parts have sizes that are not known")
        if axis == 0 and inside == 1:
            return self._first(tf.reshape(tensor, [self.examples, inward, *after]))
        split = tf.reshape(tensor, [*before, outward, self.examples, inward, *after])
        others = [at for at in range(len(sizes) + 2) if at != axis + 1]
        parts = self._first(tf.transpose(split, [axis + 1, *others]))
        return tf.reshape(parts, [self.taken, *before, outward * inward, *after])

    def _first(self, parts: Any) -> Any:
        """Return what norms are taken over of a tensor with the examples in front."""
        return parts if self.sample is None else parts[: self.sample]
