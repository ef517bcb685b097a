"""The parts of a batch's examples, taken out of tensors, while a function is traced.

Guarantees: no tensor's values are read; sizes that tracing does not know stay open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from cabs.gradients.layout import Layout, MixedError
from cabs_tensorflow.norms.reductions import sizes_of


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
        outward: Any = self.known(inside)
        inward: Any = self.known(rest)
        if outward is None and inward is None:
            raise MixedError("has an axis of examples whose parts have sizes that are not known")
        # A replica may have no example.
        if inward is None:
            inward = sizes[axis] // tf.maximum(self.examples * outward, 1)
        elif outward is None:
            outward = sizes[axis] // tf.maximum(self.examples * inward, 1)
        if axis == 0 and inside == 1:
            return self._first(tf.reshape(tensor, [self.examples, inward, *after]))
        split = tf.reshape(tensor, [*before, outward, self.examples, inward, *after])
        others = [at for at in range(len(sizes) + 2) if at != axis + 1]
        parts = self._first(tf.transpose(split, [axis + 1, *others]))
        return tf.reshape(parts, [self.taken, *before, outward * inward, *after])

    def _first(self, parts: Any) -> Any:
        """Return what norms are taken over of a tensor with the examples in front."""
        return parts if self.sample is None else parts[: self.sample]
