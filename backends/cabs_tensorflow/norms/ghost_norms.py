"""Squared norms of per-example gradients, without forming the gradients of matrices.

Guarantees: exact up to rounding, summed in float32 or better, and never negative; examples are
taken a few at a time, since large temporaries cost more than the arithmetic on them; every shape
that XLA has to know follows from the shapes of what is given.

Sums are over examples, 0-d tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# Elements of the temporaries that some examples may need at a time: 4 MiB in float32.
_CHUNK = 2**20

# How much larger than the sum its terms may be, for every row, before rounding errors show.
_CANCELLING = 64.0

# What a product of rows costs, measured, in products of columns.
_PAIRS = 0.75


def sizes_of(tensor: Any) -> list[Any]:
    """Return the sizes of a tensor, as integers where they are known."""
    known = tensor.shape.as_list()
    dynamic: Any = tf.shape(tensor) if None in known else None
    return [dynamic[axis] if size is None else size for axis, size in enumerate(known)]


def wide(tensor: Any) -> Any:
    """Return a tensor in single precision, or in double if it is."""
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def square(tensor: Any) -> Any:
    """Return the sum of squares of all elements."""
    # Twice the half of it; the kernel reads the tensor once.
    return 2.0 * tf.nn.l2_loss(wide(tensor))


def square_of(gradients: Sequence[Any]) -> Any:
    """Return the sum of squares of gradients, which may be None or ``tf.IndexedSlices``."""
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        raise ValueError(
            "gradients must hold at least one that is not None, or nothing is measured, got "
            f"{len(gradients)} of None; does the loss depend on these variables, and does the tape "
            "watch them?"
        )
    sums = [tf.cast(_square_of_one(one), sum_type(given)) for one in given]
    return tf.add_n(sums)


def sum_type(tensors: Sequence[Any]) -> Any:
    """Return the type in which squares of tensors are summed."""
    return tf.float64 if any(one.dtype == tf.float64 for one in tensors) else tf.float32


def _square_of_one(gradient: Any) -> Any:
    if not isinstance(gradient, tf.IndexedSlices):
        return square(gradient)
    rows = wide(gradient.values)
    flat = tf.reshape(rows, [tf.shape(rows)[0], math.prod(rows.shape[1:])])
    return lookup(gradient.indices[None], flat[None])


def in_chunks(function: Callable[..., Any], tensors: Sequence[Any], needed: int) -> Any:
    """Return ``function(*tensors)``, sums over examples, taken some examples at a time.

    Args:
        function: From tensors of some examples, perhaps none, to sums over them.
        tensors: Tensors with the examples in front.
        needed: How many elements the temporaries of an example have.
    """
    size: Any = max(1, _CHUNK // max(needed, 1))
    examples = tensors[0].shape[0]
    if examples is not None and examples <= size:
        return function(*tensors)
    count = tf.shape(tensors[0])[0]
    # No more chunks than there have to be, and none that is much smaller than the others.
    size = -(-examples // -(-examples // size)) if examples else tf.minimum(size, count)
    whole = count // size

    def add(index: Any, total: Any) -> Any:
        return index + 1, total + function(*(_chunk(one, index, size) for one in tensors))

    rest = function(*(one[whole * size :] for one in tensors))
    _, total = tf.while_loop(
        lambda index, _: index < whole, add, (tf.constant(0), rest), parallel_iterations=2
    )
    return total


def _chunk(tensor: Any, index: Any, size: Any) -> Any:
    """Return one of the equal parts of a tensor; XLA has to know their size."""
    rank, known = tensor.shape.rank, size if isinstance(size, int) else None
    begin = tf.concat([(index * size)[None], tf.zeros([rank - 1], tf.int32)], 0)
    cut = tf.slice(tensor, begin, tf.stack([size, *[-1] * (rank - 1)]))
    return tf.ensure_shape(cut, [known, *tensor.shape[1:]])


def product(left: Any, right: Any) -> Any:
    """Return the sum over i of |g_i|^2 for g_i = left_i' right_i, of E such products each.

    Args:
        left: Shape (n, E, T, k).
        right: Shape (n, E, T, h).

    For E = T = 1 that is |left_i|^2 |right_i|^2, and otherwise computed from g_i, or as the sum
    over pairs of rows of (left_t . left_s)(right_t . right_s), whichever is cheaper.
    """
    _, blocks, length, width = left.shape
    height = right.shape[3]
    if length == 1:
        left, right = wide(left), wide(right)
        rows = [tf.reduce_sum(tf.square(side), axis=(2, 3)) for side in (left, right)]
        return tf.reduce_sum(rows[0] * rows[1])
    if None in (blocks, length, width, height):
        return _formed(left, right)
    if _PAIRS * length * (width + height) >= width * height:
        needed = blocks * width * height
        return in_chunks(_formed, (left, right), needed)

    def pairs(left: Any, right: Any) -> Any:
        grams = [tf.matmul(side, side, transpose_b=True) for side in (wide(left), wide(right))]
        diagonals = [tf.linalg.diag_part(gram) for gram in grams]
        roots = tf.sqrt(tf.maximum(diagonals[0] * diagonals[1], 0.0))
        bound = tf.reduce_sum(tf.square(tf.reduce_sum(roots, axis=2)))
        return tf.stack([tf.reduce_sum(grams[0] * grams[1]), bound])

    def formed(left: Any, right: Any) -> Any:
        return _formed(tf.cast(left, tf.float64), tf.cast(right, tf.float64))

    found = in_chunks(pairs, (left, right), 2 * blocks * length**2)
    return unless_cancelled(
        found, length, lambda: in_chunks(formed, (left, right), 2 * blocks * width * height)
    )


def _formed(left: Any, right: Any) -> Any:
    return square(tf.matmul(wide(left), wide(right), transpose_a=True))


def unless_cancelled(found: Any, length: int, otherwise: Callable[[], Any]) -> Any:
    """Return a sum over pairs of rows, or something else if rounding errors would show in it.

    Args:
        found: The sum, and the sum over examples of the square of a sum over rows, of the roots of
            what no term of a row is larger than; shape (2,).
        length: How many rows there are.
        otherwise: What gives the sum in another way.
    """
    total, bound = tf.unstack(found)
    # Not a number compares false, and has cancelled.
    is_good = bound <= _CANCELLING * length * total
    return tf.cond(is_good, lambda: total, lambda: tf.cast(otherwise(), total.dtype))


def lookup(ids: Any, rows: Any) -> Any:
    """Return the sum of |g_i|^2 of a table's gradient, to whose row ids[i, t] rows[i, t] is added.

    Args:
        ids: Shape (n, T), integers.
        rows: Shape (n, T, h).
    """
    if rows.shape[1] == 1:
        return square(rows)
    n, length, height = sizes_of(rows)
    # Equal rows lie side by side once sorted, and are numbered from 0, over all examples.
    order = tf.argsort(ids, axis=1, stable=True)
    ids = tf.gather(ids, order, axis=1, batch_dims=1)
    rows = tf.gather(wide(rows), order, axis=1, batch_dims=1)
    starts = tf.concat([tf.ones([n, 1], tf.bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    places = tf.cumsum(tf.reshape(tf.cast(starts, tf.int32), [n * length])) - 1
    flat = tf.reshape(rows, [n * length, height])
    return square(tf.math.unsorted_segment_sum(flat, places, n * length))
