"""Squared norms of per-example gradients, without forming the gradients of matrices.

Guarantees: exact up to rounding, summed in float32 or better, and never negative; examples are
taken a few at a time, since large temporaries cost more than the arithmetic on them; nothing waits
for a device.

Arrays have the examples in front, n of them; squared norms have shape (n,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

# Elements of the temporaries that some examples may need at a time: 1 MiB in float32.
_CHUNK = 2**18

# How much larger than the sum its terms may be, for every row, before rounding errors show.
_CANCELLING = 64.0

# What a product of rows costs, measured, in products of columns.
_PAIRS = 0.75

# Rows of a table for each one looked up, from which sorting is faster than the whole table.
_SCATTERED = 4


def wide_type(dtype: Any) -> Any:
    """Return single precision for a type of half precision, and the type itself for others."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def sum_type(dtype: Any) -> Any:
    """Return the real type in which squares of elements of a type are summed."""
    real = jnp.zeros((), dtype).real.dtype
    return wide_type(real)


def wide(array: Array) -> Array:
    """Return an array in single precision, or in double if it is."""
    return array.astype(wide_type(array.dtype))


def square(array: Array) -> Array:
    """Return the sums of squares over all axes but the first."""
    found = wide(array)
    if jnp.issubdtype(found.dtype, jnp.complexfloating):
        found = jnp.abs(found)
    # Two axes, whatever there were, so that XLA sees when it has this sum already.
    squares: Array = jnp.sum(lax.square(found.reshape(len(found), -1)), axis=1)
    return squares


def in_chunks(function: Callable[..., Array], arrays: Sequence[Array], needed: int) -> Array:
    """Return ``function(*arrays)``, some examples at a time.

    Args:
        function: From arrays of some examples to an array with them in front.
        arrays: The arrays of all examples.
        needed: How many elements the temporaries of an example have.
    """
    examples = len(arrays[0])
    chunks = min(examples, -(-examples * needed // _CHUNK))
    if chunks <= 1:
        return function(*arrays)
    size = examples // chunks
    # Chunks that leave no rest are compiled once.
    even = max(some for some in range(1, size + 1) if examples % some == 0)
    size = even if 2 * even >= size else size
    chunks = examples // size

    def head(array: Array) -> Array:
        return array[: chunks * size].reshape(chunks, size, *array.shape[1:])

    found: Array = lax.map(lambda some: function(*some), tuple(map(head, arrays)))
    found = found.reshape(-1, *found.shape[2:])
    if chunks * size == examples:
        return found
    return jnp.concatenate([found, function(*(array[chunks * size :] for array in arrays))])


def product(left: Array, right: Array) -> Array:
    """Return |g_i|^2 of g_i = left_i' right_i, summed over a batch of such products.

    Args:
        left: Shape (n, B, T, k).
        right: Shape (n, B, T, h).

    For T = 1 that is |left_i|^2 |right_i|^2, and otherwise computed from g_i, or, on a CPU, as the
    sum over pairs of rows of (left_t . left_s)(right_t . right_s), whichever is cheaper.
    """
    _, batch, length, width = left.shape
    height = right.shape[3]
    if length == batch == 1:
        return square(left) * square(right)
    if length == 1:
        rows = [jnp.sum(lax.square(wide(factor)), axis=(2, 3)) for factor in (left, right)]
        return jnp.sum(rows[0] * rows[1], axis=1)

    def formed(left: Array, right: Array) -> Array:
        return in_chunks(
            lambda left, right: square(times(left, right, 2)), (left, right), batch * width * height
        )

    def in_pairs(left: Array, right: Array) -> Array:
        found = _pairs(left, right)
        return _unless_cancelled(found, length, lambda: formed(left, right))

    if _PAIRS * length * (width + height) >= width * height:
        return formed(left, right)
    squares: Array = lax.platform_dependent(left, right, cpu=in_pairs, default=formed)
    return squares


def times(left: Array, right: Array, axis: int) -> Array:
    """Return products of matrices, shape (n, B, ., .), which sum over an axis, 2 or 3, of both."""
    if left.dtype != right.dtype:
        both = max(wide_type(left.dtype), wide_type(right.dtype), key=lambda dtype: dtype.itemsize)
        left, right = left.astype(both), right.astype(both)
    return lax.dot_general(
        left,
        right,
        (((axis,), (axis,)), ((0, 1), (0, 1))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide_type(left.dtype),
    )


def _pairs(left: Array, right: Array) -> Array:
    """Return the sum over pairs of rows, and how large its terms can be.

    Returns:
        Shape (n, 2): the sum, and the square of a bound on the sum of the terms' square roots.
    """
    n, batch, length, _ = left.shape
    half = length // 2 if length % 2 == 0 else length
    # The matrices are symmetric: two blocks on the diagonal, and one of the two beside it.
    blocks = [array.reshape(n, -1, half, array.shape[3]) for array in (left, right)]
    products = [times(array, array, 3) for array in blocks]
    diagonals = [jnp.diagonal(array, axis1=2, axis2=3) for array in products]
    roots = jnp.sqrt(jnp.maximum(diagonals[0] * diagonals[1], 0.0)).reshape(n, batch, length)
    bound = jnp.sum(lax.square(jnp.sum(roots, axis=2)), axis=1)
    total = jnp.sum(products[0] * products[1], axis=(1, 2, 3))
    if half < length:
        beside = [times(array[:, :, :half], array[:, :, half:], 3) for array in (left, right)]
        total += 2.0 * jnp.sum(beside[0] * beside[1], axis=(1, 2, 3))
    return jnp.stack([total, bound], axis=1)


def _unless_cancelled(found: Array, length: int, otherwise: Callable[[], Array]) -> Array:
    """Return what :func:`_pairs` found, or something else if rounding errors would show in it."""
    total, bound = jnp.sum(found, axis=0)
    # Not a number compares false, and has cancelled.
    is_good = bound <= _CANCELLING * length * total
    squares: Array = lax.cond(is_good, lambda: found[:, 0], otherwise)
    return squares


def lookup(ids: Array, rows: Array, length: int) -> Array:
    """Return |g_i|^2 of a table's gradient, which has rows[i, t] added to its row ids[i, t].

    Args:
        ids: Shape (n, T).
        rows: Shape (n, T, h).
        length: How many rows the table has.
    """
    _, count, height = rows.shape
    if count == 1:
        return square(rows)

    def some(ids: Array, rows: Array) -> Array:
        rows, size = wide(rows), length
        if length > _SCATTERED * count:
            # Only the rows that are looked up, numbered in their order.
            order = jnp.argsort(ids, axis=1)
            ids = jnp.take_along_axis(ids, order, axis=1)
            rows = jnp.take_along_axis(rows, order[:, :, None], axis=1)
            is_next = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
            ids, size = jnp.cumsum(is_next, axis=1), count
        table = jnp.zeros((len(ids), size, height), rows.dtype)
        at = jnp.arange(len(ids))[:, None]
        return square(table.at[at, ids].add(rows, mode="promise_in_bounds"))

    return in_chunks(some, (ids, rows), min(length, 3 * count) * height)
