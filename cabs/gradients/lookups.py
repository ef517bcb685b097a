"""The gradient of a table of which each example takes some rows, some perhaps more than once.

Guarantees: rows that are taken again are added up before they are squared; the table is laid out
only where it is small.
"""

from __future__ import annotations

from cabs.gradients.arrays import Array, Arrays, Squares, SummingArrays, known

# Rows of a table for each one taken, up to which the table is laid out.
_SCATTERED = 4


def gradient(arrays: Arrays, ids: Array, rows: Array, length: int) -> Array:
    """Return the gradients, shape (n, length, h)."""
    return arrays.scatter(ids, arrays.wide(rows), length)


def squares(arrays: Arrays, ids: Array, rows: Array, length: int) -> Squares:
    """Return |g_i|^2.

    Args:
        arrays: The framework's array operations.
        ids: The numbers of the rows, shape (n, T).
        rows: The cotangents of what was taken, shape (n, T, h).
        length: How many rows the table has.
    """
    _, count, height = arrays.shape(rows)
    if known(count) and count == 1:
        return arrays.squares(rows)
    is_small = known(count) and length <= _SCATTERED * count

    def some(ids: Array, rows: Array) -> Squares:
        if is_small:
            return arrays.squares(gradient(arrays, ids, rows, length))
        order = arrays.argsort(ids)
        places = arrays.number(arrays.take(ids, order))
        ordered = arrays.take(arrays.wide(rows), order)
        return arrays.squares(arrays.scatter(places, ordered, arrays.shape(rows)[1]))

    # As many as an example has at least, where the number is not known.
    taken = count if known(count) else 1
    wide = height if known(height) else 1
    return arrays.in_chunks(some, (ids, rows), min(length, 3 * taken) * wide)


def coordinate_squares(arrays: SummingArrays, ids: Array, rows: Array, length: int) -> Array:
    """Return the sum over examples of the gradients' elementwise squares, shape (1, length, h).

    No example's table is laid out; arguments are those of :func:`squares`.
    """
    ids, squared = squared_rows(arrays, ids, rows)
    return arrays.scatter(arrays.merged(ids, 1), arrays.merged(squared, 1), length)


def squared_rows(arrays: Arrays, ids: Array, rows: Array) -> tuple[Array, Array]:
    """Return the sorted numbers, and rows whose sums, by number, are the squared gradient's rows.

    Arguments are those of :func:`squares`.
    """
    order = arrays.argsort(ids)
    ids, rows = arrays.take(ids, order), arrays.take(arrays.wide(rows), order)
    places = arrays.number(ids)
    sums = arrays.take(arrays.scatter(places, rows, arrays.shape(rows)[1]), places)
    # The square of a sum is its terms' sum, each times the sum.
    return ids, rows * sums
