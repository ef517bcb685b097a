"""The gradient of a matrix: an outer product for each position, summed over T of them.

Guarantees: squared norms are exact up to rounding, whether the gradients are materialized or not;
where terms cancel so much that rounding would show, they are materialized in double precision.

An example's gradient is g = left' right, with left (T, k) what went into the matrix and right
(T, h) the cotangents of what came out. For T = 1, |g| = |left| |right| (Goodfellow, "Efficient
Per-Example Gradient Computations", arXiv 1510.01799). Else |g|^2 is the sum over pairs of positions
of the product of two Gram matrices, the *ghost norm* (Li and others, arXiv 2110.05679), or that of
the materialized g, whichever is cheaper.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from cabs.gradients.arrays import Array, Arrays, Squares, SummingArrays, known

# How much larger than the sum its terms may be, for every position, before rounding errors show.
CANCELLING = 64.0

# What it costs to read an element of a gradient again and add it up, in products, measured.
ADDED = 16


def gradient(arrays: Arrays, left: Array, right: Array) -> Array:
    """Return the gradients, shape (n, E, k, h)."""
    return arrays.contract(left, right, 2)


def squares(arrays: Arrays, left: Array, right: Array) -> Squares:
    """Return |g_i|^2, summed over E matrices side by side.

    Args:
        arrays: The framework's array operations.
        left: Shape (n, E, T, k).
        right: Shape (n, E, T, h).
    """
    _, blocks, length, width = arrays.shape(left)
    height = arrays.shape(right)[3]
    if known(length) and length == 1:
        return arrays.squares(norms(arrays, left, right))
    if not known(blocks, length, width, height):
        return _of_gradient(arrays, left, right)
    whole = partial(_materialized, arrays, blocks * width * height)
    if is_materialized(arrays, length, width, height):
        return whole(left, right)
    return arrays.prefer(partial(_in_pairs, arrays, blocks, length), whole, (left, right))


def norms(arrays: Arrays, left: Array, right: Array) -> Array:
    """Return the norm of each gradient, shape (n, E), for T = 1."""
    return arrays.row_norms(left) * arrays.row_norms(right)


def coordinate_squares(arrays: SummingArrays, left: Array, right: Array) -> Array:
    """Return the sum over examples of the gradients' elementwise squares, (1, E, k, h), for T = 1.

    The square of a product is that of its factors, so that it takes one product of matrices.
    """
    left, right = (arrays.merged(arrays.wide(side), 2) for side in (left, right))
    return arrays.contract(left * left, right * right, 2)


def is_materialized(arrays: Arrays, length: int, width: int, height: int) -> bool:
    """Return whether gradients of shape (width, height), of T = ``length``, are materialized."""
    return length > 1 and arrays.pair_cost * length * (width + height) >= width * height


def spared(arrays: Arrays, length: int, width: int, height: int) -> int:
    """Return how many products an example spares where its gradient is needed for the batch's too.

    The batch's gradient takes T x width x height by itself. Where it is the sum of the examples',
    these are materialized, squared and added, and no other products are done.
    """
    if length == 1:
        return 0
    size = width * height
    is_formed = is_materialized(arrays, length, width, height)
    alone = length * size if is_formed else arrays.pair_cost * length**2 * (width + height)
    return max(0, int(alone - ADDED * size))


def _of_gradient(arrays: Arrays, left: Array, right: Array) -> Squares:
    return arrays.squares(arrays.contract(left, right, 2))


def _materialized(arrays: Arrays, needed: int, left: Array, right: Array) -> Squares:
    return arrays.in_chunks(partial(_of_gradient, arrays), (left, right), needed)


def _in_pairs(arrays: Arrays, blocks: int, length: int, left: Array, right: Array) -> Squares:
    needed = 2 * blocks * length**2
    total, bound = arrays.in_chunks(partial(_grams, arrays, length), (left, right), needed)

    def in_double() -> Squares:
        def some(left: Array, right: Array) -> Squares:
            return _of_gradient(arrays, arrays.double(left), arrays.double(right))

        size = arrays.shape(left)[3] * arrays.shape(right)[3]
        return arrays.in_chunks(some, (left, right), 2 * blocks * size)

    return arrays.unless_cancelled(total, bound, CANCELLING * length, in_double)


def _grams(arrays: Arrays, length: int, left: Array, right: Array) -> tuple[Squares, Squares]:
    """Return the sum over pairs of positions, and the square of what bounds its terms' roots."""
    # The matrices are symmetric: two blocks on the diagonal, and one of the two beside it.
    halved = arrays.symmetric is not None and length >= arrays.symmetric
    cuts = (0, length // 2, length) if halved else (0, length)
    sides = [
        [arrays.part(one, 2, start, stop) for start, stop in pairwise(cuts)] if halved else [one]
        for one in map(arrays.wide, (left, right))
    ]
    roots, totals = [], []
    for x, b in zip(*sides, strict=True):
        grams = [arrays.contract(one, one, 3) for one in (x, b)]
        # No term of an example is larger than a product of two norms on the diagonal.
        roots.append(arrays.root_sums(*grams))
        totals.append(arrays.inner(*grams))
    if halved:
        beside = [arrays.contract(first, second, 3) for first, second in sides]
        totals.append(2.0 * arrays.inner(*beside))
    return sum(totals[1:], totals[0]), arrays.squares(sum(roots[1:], roots[0]))
