"""The gradient of a parameter that is used several times: tied, recurrent, looked up.

Guarantees: the gradients of all uses are added before they are squared, cross terms included; where
they cancel each other so much that rounding would show, they are materialized, if the array
operations can read that without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

from cabs.gradients import lookups, outer_products
from cabs.gradients.arrays import Array, Arrays, Squares, known

# How much larger than the sum its parts may be before rounding errors show.
_CANCELLED = 100.0


def squares(
    arrays: Arrays,
    products: Sequence[tuple[Array, Array]],
    taken: Sequence[tuple[Array, Array]],
    length: int,
) -> Squares:
    """Return |g_i|^2 of the sum over the uses of a parameter as a matrix, and as a table.

    Args:
        arrays: The framework's array operations.
        products: Left, shape (n, E, T, k), and right, (n, E, T, h), of each use as a matrix; any
            T. With uses as a table, E is 1 and k the number of its rows.
        taken: The numbers of rows, shape (n, S), and their cotangents, (n, S, h), of each use as a
            table.
        length: How many rows the table has.
    """
    if not taken:
        return outer_products.squares(arrays, *joined(arrays, products, 2))
    ids, rows = joined(arrays, taken, 1)
    if not products:
        return lookups.squares(arrays, ids, rows, length)
    left, right = joined(arrays, products, 2)
    everything = (left, right, ids, rows)
    count, height = arrays.shape(rows)[1:]

    def materialized(left: Array, right: Array, ids: Array, rows: Array) -> Squares:
        table = outer_products.gradient(arrays, left, right)[:, 0]
        return arrays.squares(table + lookups.gradient(arrays, ids, rows, length))

    def crossed(left: Array, right: Array, ids: Array, rows: Array) -> Squares:
        # The sum over t, s of left_t[id_s] (right_t . row_s).
        met = arrays.wide(arrays.columns(left[:, 0], ids))
        return arrays.inner(met, arrays.contract(right, rows[:, None], 3)[:, 0])

    def whole() -> Squares:
        return arrays.in_chunks(materialized, everything, 2 * length * (height or 1))

    if known(count, height) and length * height <= count * (length + height):
        return whole()
    positions = arrays.shape(left)[2]
    needed = 2 * count * positions if known(count, positions) else 2
    alone = lookups.squares(arrays, ids, rows, length)
    alone = alone + outer_products.squares(arrays, left, right)
    total = alone + 2.0 * arrays.in_chunks(crossed, everything, needed)
    return arrays.unless_cancelled(total, alone, _CANCELLED, whole)


def joined(arrays: Arrays, pairs: Sequence[tuple[Array, Array]], axis: int) -> tuple[Array, Array]:
    """Return pairs put one after another along their positions."""
    if len(pairs) == 1:
        return pairs[0]
    first = [one for one, _ in pairs]
    # The numbers of rows are no numbers to be made wider.
    first = [*map(arrays.wide, first)] if axis == 2 else first
    second = [arrays.wide(one) for _, one in pairs]
    return arrays.concatenate(first, axis), arrays.concatenate(second, axis)
