"""The array operations of TensorFlow, in which the core computes squared norms.

Guarantees: sums are taken in float32 or better; every shape that XLA has to know follows from the
shapes of what is given. Squares are 0-d tensors, sums over the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from cabs_tensorflow.norms import reductions
from cabs_tensorflow.norms.reductions import sizes_of


class TensorflowArrays:
    """Those of TensorFlow."""

    # Measured.
    pair_cost = 0.75
    symmetric: int | None = None
    patch_width = 128

    def shape(self, array: Any) -> tuple[Any, ...]:
        return tuple(array.shape.as_list())

    def sizes(self, array: Any) -> list[Any]:
        return sizes_of(array)

    def wide(self, array: Any) -> Any:
        return reductions.wide(array)

    def double(self, array: Any) -> Any:
        return tf.cast(array, tf.float64)

    def contract(self, left: Any, right: Any, axis: int) -> Any:
        left, right = self.wide(left), self.wide(right)
        return tf.matmul(left, right, transpose_a=axis == 2, transpose_b=axis == 3)

    def squares(self, array: Any) -> Any:
        return reductions.square(array)

    def inner(self, left: Any, right: Any) -> Any:
        return tf.reduce_sum(left * right)

    def row_norms(self, array: Any) -> Any:
        return tf.sqrt(tf.reduce_sum(tf.square(self.wide(array)), axis=(2, 3)))

    def root_sums(self, left: Any, right: Any) -> Any:
        terms = tf.linalg.diag_part(left) * tf.linalg.diag_part(right)
        return tf.reduce_sum(tf.sqrt(tf.maximum(terms, 0.0)), axis=2)

    def reshape(self, array: Any, sizes: Sequence[Any]) -> Any:
        return tf.reshape(array, [tf.shape(array)[0], *sizes])

    def transpose(self, array: Any, order: Sequence[int]) -> Any:
        return tf.transpose(array, [0, *(1 + axis for axis in order)])

    def pad(self, array: Any, first: int, sides: Sequence[tuple[Any, Any, int]]) -> Any:
        # TensorFlow has no convolution of an input that is spread.
        around = [(low, high) for low, high, _ in sides]
        behind = array.shape.rank - first - len(sides)
        return tf.pad(array, [*[(0, 0)] * first, *around, *[(0, 0)] * behind])

    def strided(self, array: Any, axis: int, start: int, stop: Any, step: int) -> Any:
        if step == 1:
            return array[(slice(None),) * axis + (slice(start, stop),)]
        # On a CPU, slices with a step take ten times as long.
        return tf.gather(array, tf.range(start, stop, step), axis=axis)

    def part(self, array: Any, axis: int, start: int, stop: int) -> Any:
        return array[(slice(None),) * axis + (slice(start, stop),)]

    def concatenate(self, arrays: Sequence[Any], axis: int) -> Any:
        return tf.concat([*arrays], axis=axis)

    def argsort(self, ids: Any) -> Any:
        return tf.argsort(ids, axis=1, stable=True)

    def take(self, array: Any, places: Any) -> Any:
        return tf.gather(array, places, axis=1, batch_dims=1)

    def number(self, ids: Any) -> Any:
        is_next = tf.cast(ids[:, 1:] != ids[:, :-1], tf.int32)
        return tf.cumsum(tf.pad(is_next, [[0, 0], [1, 0]]), axis=1)

    def columns(self, array: Any, ids: Any) -> Any:
        return tf.gather(array, ids, axis=2, batch_dims=1)

    def scatter(self, places: Any, rows: Any, count: Any) -> Any:
        n, length, height = sizes_of(rows)
        count = length if count is None else count
        start = tf.range(n, dtype=places.dtype)[:, None] * tf.cast(count, places.dtype)
        flat = tf.reshape(rows, [n * length, height])
        table = tf.math.unsorted_segment_sum(
            flat, tf.reshape(places + start, [n * length]), n * count
        )
        return tf.reshape(table, [n, count, height])

    def in_chunks(self, function: Callable[..., Any], operands: Sequence[Any], needed: int) -> Any:
        return reductions.in_chunks(function, operands, needed)

    def squares_and_sum(
        self, rows: Callable[..., Any], operands: Sequence[Any], needed: int
    ) -> tuple[Any, Any]:
        """Return these of a nest of gradients, and their sums as the same nest."""

        def some(*operands: Any) -> tuple[Any, Any]:
            found = rows(*operands)
            squares = [self.squares(one) for one in tf.nest.flatten(found)]
            return tf.add_n(squares), tf.nest.map_structure(_summed, found)

        both: tuple[Any, Any] = reductions.in_chunks(some, operands, needed)
        return both

    def coordinate_squares(
        self,
        rows: Callable[..., Any],
        operands: Sequence[Any],
        needed: int,
        *,
        is_summed: bool = False,
    ) -> tuple[Any, Any]:
        def some(*operands: Any) -> tuple[Any, Any]:
            found = tf.nest.map_structure(self.wide, rows(*operands))
            squares = tf.nest.map_structure(lambda one: _summed(tf.square(one)), found)
            return squares, tf.nest.map_structure(_summed, found) if is_summed else ()

        both: tuple[Any, Any] = reductions.in_chunks(some, operands, needed)
        return both

    def merged(self, array: Any, axis: int) -> Any:
        sizes = sizes_of(array)
        order = [*range(1, axis), 0, *range(axis, len(sizes))]
        places = [*sizes[1:axis], sizes[0] * sizes[axis], *sizes[axis + 1 :]]
        return tf.reshape(tf.transpose(array, order), [1, *places])

    def unless_cancelled(
        self, total: Any, bound: Any, limit: float, otherwise: Callable[[], Any]
    ) -> Any:
        # Not a number compares false, and has cancelled.
        return tf.cond(
            bound <= limit * total, lambda: total, lambda: tf.cast(otherwise(), total.dtype)
        )

    def prefer(
        self,
        in_pairs: Callable[..., Any],
        materialized: Callable[..., Any],  # noqa: ARG002
        operands: Sequence[Any],
    ) -> Any:
        return in_pairs(*operands)


def _summed(gradients: Any) -> Any:
    """Return the sum over the examples, shape (1, ...)."""
    return tf.reduce_sum(reductions.wide(gradients), axis=0, keepdims=True)


ARRAYS = TensorflowArrays()
