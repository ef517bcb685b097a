"""The gradients of a convolution's kernel.

Guarantees: they are those of a matrix that meets what the kernel sees, by groups of channels, in
any number of dimensions; no more than one row of the kernel is laid out at a time, or, where
products of pairs of positions are fewer, nothing is formed at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from cabs.gradients.layout import Shape
from cabs_tensorflow.norms import ghost_norms
from cabs_tensorflow.norms.ghost_norms import sizes_of

# Elements of what the whole kernel sees, below which it is laid out at once.
_NARROW = 128

# What it costs to add an offset's products, in products.
_MOVED = 1


@dataclass(frozen=True)
class Windows:
    """Gradients of a convolution's kernel.

    ``inputs`` has shape (n, *spatial, channels in) and ``cotangents`` (n, *positions, channels
    out). ``shape`` is the parameter's, (*kernel, channels in / groups, channels out), or
    (*kernel, channels in, channels out / channels in) if it is depthwise; the kernel can have axes
    of length one besides. Stride and dilation are one number for each spatial axis, ``padding``
    two, what is added in front and behind.
    """

    inputs: Any
    cotangents: Any
    shape: Shape
    kernel: Shape
    stride: Sequence[int]
    padding: Sequence[tuple[Any, Any]]
    dilation: Sequence[int]
    groups: int

    @property
    def tensors(self) -> tuple[Any, ...]:
        return (self.inputs, self.cotangents)

    def form(self, *tensors: Any) -> Any:
        kernel, rank, at_once = self.kernel, len(self.kernel), self._at_once()
        parts = [tf.linalg.matrix_transpose(part) for part in self._gradients(*tensors)]
        parts = tf.stack(parts, axis=1)
        inward = self.inputs.shape[-1] // self.groups
        n = tf.shape(tensors[0])[0]
        sizes = (self.groups, *kernel[rank - at_once :], inward, -1)
        parts = tf.reshape(parts, [n, *kernel[: rank - at_once], *sizes])
        # The groups move behind the channels that go in, before those that come out.
        place = 1 + rank - at_once
        order = [at for at in range(rank + 4) if at != place]
        order.insert(rank + 2, place)
        return tf.reshape(tf.transpose(parts, order), [n, *self.shape])

    def square_sum(self) -> Any:
        positions = math.prod(size or 1 for size in self.cotangents.shape[1:-1])
        split = len(self.kernel) - self._at_once()
        seen = self.inputs.shape[-1] * math.prod(self.kernel[split:])
        channels = self.cotangents.shape[-1]
        needed = positions * (seen + channels) + seen * channels // self.groups

        def formed(*tensors: Any) -> Any:
            return tf.add_n([ghost_norms.square(part) for part in self._gradients(*tensors)])

        def in_double(*tensors: Any) -> Any:
            return formed(*(tf.cast(one, tf.float64) for one in tensors))

        if not self._is_cheaper_in_pairs():
            return ghost_norms.in_chunks(formed, self.tensors, needed)
        count = math.prod(self._grid())
        found = ghost_norms.in_chunks(self._in_pairs, self.tensors, 2 * count**2)
        return ghost_norms.unless_cancelled(
            found, count, lambda: ghost_norms.in_chunks(in_double, self.tensors, 2 * needed)
        )

    def _is_cheaper_in_pairs(self) -> bool:
        """Return whether there are fewer products of pairs of positions than of channels."""
        if None in (*self.inputs.shape[1:], *self.cotangents.shape[1:]):
            return False
        is_plain = self.groups == self.inputs.shape[1] == 1 and {*self.stride, *self.dilation} == {
            1
        }
        inward, outward = self.inputs.shape[-1], self.cotangents.shape[-1]
        in_pairs = inward + outward + _MOVED * math.prod(self.kernel)
        formed = math.prod(self.kernel) * inward * outward
        places = math.prod(self.cotangents.shape[1:-1])
        return is_plain and 1.2 * math.prod(self._grid()) ** 2 * in_pairs < places * formed

    def _grid(self) -> list[int]:
        """Return the shape of the padded input."""
        sizes = zip(self.inputs.shape[1:-1], self.padding, strict=True)
        return [size + before + after for size, (before, after) in sizes]

    def _in_pairs(self, inputs: Any, cotangents: Any) -> Any:
        """Sum over pairs of positions p, q: (b_p . b_q) sum over offsets d of x_{p+d} . x_{q+d}.

        A matrix of all pairs of places p, q on the padded grid is symmetric, and read as if its
        rows were longer by one it has p as its row and q - p as its column, for q >= p. So an
        offset moves along the rows, and the sum over offsets is that of average pooling.
        """
        grid, positions = self._grid(), self.cotangents.shape[1:-1]
        count, n = math.prod(grid), tf.shape(inputs)[0]
        beside = [size - part for size, part in zip(grid, positions, strict=True)]
        ahead = [(0, side) for side in beside]

        def by_distance(array: Any, sides: Sequence[tuple[Any, Any]]) -> Any:
            padded = tf.pad(ghost_norms.wide(array), [(0, 0), *sides, (0, 0)])
            rows = tf.reshape(padded, [n, count, array.shape[-1]])
            # A row more makes the matrix divisible into the longer rows.
            longer = tf.pad(rows, [(0, 0), (0, 1), (0, 0)])
            gram = tf.matmul(longer, rows, transpose_b=True)
            return tf.reshape(gram, [n, *grid, count + 1])

        size = math.prod(self.kernel)
        moved = by_distance(inputs, self.padding)
        # Frames, of which there is one, are no axis to pool along.
        pooled = tf.nn.avg_pool(tf.squeeze(moved, 1), self.kernel[1:], 1, "VALID")[:, None]
        met = by_distance(cotangents, ahead)
        met = met[(slice(None), *(slice(0, part) for part in positions))]
        # Twice for q > p; behind the last place follows what belongs to q < p.
        left = count - np.arange(count)[:, None] - np.arange(count + 1)[None, :]
        twice = np.where(left > 0, 2.0 * size, 0.0)
        twice[:, 0] = size
        weights = twice.reshape(*grid, count + 1)[tuple(slice(0, part) for part in positions)]
        total = tf.reduce_sum(pooled * met * tf.constant(weights, pooled.dtype))
        diagonals = tf.maximum(size * pooled[..., 0] * met[..., 0], 0.0)
        roots = tf.reduce_sum(tf.sqrt(diagonals), axis=list(range(1, 1 + len(grid))))
        return tf.stack([total, tf.reduce_sum(tf.square(roots))])

    def _at_once(self) -> int:
        """Return how many of the kernel's axes, the last ones, are laid out at a time."""
        inward = self.inputs.shape[-1] // self.groups
        return len(self.kernel) if inward * math.prod(self.kernel) <= _NARROW else 1

    def _gradients(self, inputs: Any, cotangents: Any) -> Iterator[Any]:
        """Yield the gradients of the kernel's parts, (n, groups, outward, elements * inward)."""
        kernel, rank, at_once = self.kernel, len(self.kernel), self._at_once()
        n, *positions, outward = sizes_of(cotangents)
        places = math.prod(positions)
        padded = tf.pad(ghost_norms.wide(inputs), [(0, 0), *self.padding, (0, 0)])
        inward = inputs.shape[-1] // self.groups

        def seen(array: Any, axis: int, at: int) -> Any:
            """Return what the elements of the kernel at a place along an axis see."""
            start, stride = at * self.dilation[axis], self.stride[axis]
            cut = [slice(None)] * (1 + axis)
            stop = start + (positions[axis] - 1) * stride + 1
            return array[(*cut, slice(start, stop, stride))]

        def in_groups(array: Any, width: int) -> Any:
            """Return an array in shape (n, groups, places, width)."""
            if self.groups == 1:
                return tf.reshape(array, [n, 1, places, width])
            return tf.transpose(tf.reshape(array, [n, places, self.groups, width]), [0, 2, 1, 3])

        right = in_groups(ghost_norms.wide(cotangents), outward // self.groups)
        split = rank - at_once
        ahead = padded
        if self.groups > 1:
            # The channels of a group stay together.
            ahead = tf.reshape(padded, [*sizes_of(padded)[:-1], self.groups, inward])
        for axis in reversed(range(split, rank)):
            parts = [seen(ahead, axis, at) for at in range(kernel[axis])]
            ahead = parts[0] if len(parts) == 1 else tf.concat(parts, axis=-1)
        width = inward * math.prod(kernel[split:])
        for place in itertools.product(*map(range, kernel[:split])):
            left = ahead
            for axis, at in enumerate(place):
                left = seen(left, axis, at)
            yield tf.matmul(right, in_groups(left, width), transpose_a=True)


def same_padding(
    sizes: Sequence[Any],
    positions: Sequence[Any],
    kernel: Shape,
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[tuple[Any, Any]]:
    """Return what "SAME" adds in front and behind, for each spatial axis."""
    found = []
    for size, count, reach, step, apart in zip(
        sizes, positions, kernel, stride, dilation, strict=True
    ):
        total = (count - 1) * step + (reach - 1) * apart + 1 - size
        total = max(total, 0) if isinstance(total, int) else tf.maximum(total, 0)
        found.append((total // 2, total - total // 2))
    return found
