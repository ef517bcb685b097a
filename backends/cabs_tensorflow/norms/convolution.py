"""The gradients of a convolution's kernel.

Guarantees: they are those of a matrix that meets what the kernel sees, by groups of channels, in
any number of dimensions; no more is laid out at a time than what the whole kernel sees, where that
is little, or a row of it, or, where products of pairs of positions are fewer, nothing is formed at
all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from cabs.gradients import convolution
from cabs.gradients.layout import Shape
from cabs.gradients.outer_products import ADDED, CANCELLING
from cabs.gradients.terms import Formed
from cabs_tensorflow.norms import reductions
from cabs_tensorflow.norms.arrays import TensorflowArrays

# What it costs to add an offset's products, in products.
_MOVED = 1

# How much faster a convolution's own gradient is than products that form it for each example.
_CONVOLVED = 1.6


@dataclass(frozen=True)
class Convolution:
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
    def operands(self) -> tuple[Any, ...]:
        return (self.inputs, self.cotangents)

    def gradient(self, arrays: TensorflowArrays, *operands: Any) -> Any:
        return self._arranged(arrays, self._parts(arrays, *operands))

    def formed(self, arrays: TensorflowArrays) -> Formed:
        """Return how the gradients are formed, as a list of the kernel's parts."""
        needed = convolution.needed(arrays, self.inputs, self.cotangents, self._geometry)
        parts, arranged = partial(self._parts, arrays), partial(self._arranged, arrays)
        return Formed(parts, self.operands, needed, arranged)

    def coordinate_squares(self, arrays: TensorflowArrays) -> Any:
        return self.formed(arrays).coordinate_squares(arrays)

    def spared(self) -> int:
        """Return how many products an example spares if its gradient is summed, too."""
        if None in (*self.inputs.shape[1:], *self.cotangents.shape[1:]):
            return 1
        size = math.prod(self.shape)
        formed = size * math.prod(self.cotangents.shape[1:-1])
        alone = min(formed, self._in_pairs_products()) + formed / _CONVOLVED
        return max(0, int(alone - formed - ADDED * size))

    def _parts(self, arrays: TensorflowArrays, *operands: Any) -> list[Any]:
        inputs, cotangents = operands
        return list(convolution.parts(arrays, inputs, cotangents, self._geometry))

    def _arranged(self, arrays: TensorflowArrays, found: list[Any]) -> Any:
        """Return gradients in the shape of the parameter, from those of the kernel's parts."""
        # The channels that go in come before the groups, and these before those that come out.
        rank = len(self.kernel)
        order = [*range(2, 2 + rank), 2 + rank, 0, 1]
        gradients = convolution.whole(arrays, found, self._geometry)
        return arrays.reshape(arrays.transpose(gradients, order), self.shape)

    def squares(self, arrays: TensorflowArrays) -> Any:
        if not self._is_cheaper_in_pairs():
            return convolution.squares(arrays, self.inputs, self.cotangents, self._geometry)
        count = math.prod(self._grid())
        total, bound = arrays.in_chunks(self._in_pairs, self.operands, 2 * count**2)

        def in_double() -> Any:
            double = arrays.double(self.inputs), arrays.double(self.cotangents)
            return convolution.squares(arrays, double[0], double[1], self._geometry)

        return arrays.unless_cancelled(total, bound, CANCELLING * count, in_double)

    @property
    def _geometry(self) -> convolution.Geometry:
        padding = [(before, after, 0) for before, after in self.padding]
        return convolution.Geometry(self.kernel, self.stride, self.dilation, padding, self.groups)

    def _is_cheaper_in_pairs(self) -> bool:
        """Return whether there are fewer products of pairs of positions than of channels."""
        if None in (*self.inputs.shape[1:], *self.cotangents.shape[1:]):
            return False
        places = math.prod(self.cotangents.shape[1:-1])
        is_cheaper: bool = self._in_pairs_products() < places * math.prod(self.shape)
        return is_cheaper

    def _in_pairs_products(self) -> float:
        """Return what pairs of positions cost, in products that form a gradient."""
        is_plain = self.groups == self.inputs.shape[1] == 1
        if not is_plain or {*self.stride, *self.dilation} != {1}:
            return math.inf
        channels = self.inputs.shape[-1] + self.cotangents.shape[-1]
        in_pairs: int = channels + _MOVED * math.prod(self.kernel)
        return 1.2 * math.prod(self._grid()) ** 2 * in_pairs

    def _grid(self) -> list[int]:
        """Return the shape of the padded input."""
        sizes = zip(self.inputs.shape[1:-1], self.padding, strict=True)
        return [size + before + after for size, (before, after) in sizes]

    def _in_pairs(self, inputs: Any, cotangents: Any) -> tuple[Any, Any]:
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
            padded = tf.pad(reductions.wide(array), [(0, 0), *sides, (0, 0)])
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
        return total, tf.reduce_sum(tf.square(roots))


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
