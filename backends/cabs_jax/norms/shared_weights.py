"""The squared norm of the gradient of a table that is looked up and multiplied with.

Guarantees: the cross term is included.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from cabs_jax.norms import ghost_norms

# How much smaller than its terms a sum may be before rounding errors show.
_CANCELLING = 1e-2


def tied(ids: Array, looked: Array, left: Array, right: Array, rows: int) -> Array:
    """Return |g_i|^2 of a table that is looked up and multiplied with.

    Args:
        ids: Shape (n, S).
        looked: What is added to the rows of these numbers, shape (n, S, h).
        left: Shape (n, 1, T, rows).
        right: Shape (n, 1, T, h).
        rows: How many rows the table has.
    """

    def crossed(ids: Array, looked: Array, left: Array, right: Array) -> Array:
        met = jnp.take_along_axis(left[:, 0], ids[:, None, :], axis=2)
        return jnp.sum(
            ghost_norms.wide(met) * ghost_norms.times(right, looked[:, None], 3)[:, 0], axis=(1, 2)
        )

    def formed(ids: Array, looked: Array, left: Array, right: Array) -> Array:
        table = ghost_norms.times(left, right, 2)[:, 0]
        at = jnp.arange(len(ids))[:, None]
        return ghost_norms.square(table.at[at, ids].add(looked, mode="promise_in_bounds"))

    everything = (ids, looked, left, right)
    size = rows * looked.shape[2]
    if size <= ids.shape[1] * (rows + looked.shape[2]):
        return ghost_norms.in_chunks(formed, everything, size)
    needed = ids.shape[1] * left.shape[2]
    alone = ghost_norms.lookup(ids, looked, rows) + ghost_norms.product(left, right)
    total = alone + 2.0 * ghost_norms.in_chunks(crossed, everything, 2 * needed)
    found: Array = lax.cond(
        jnp.sum(total) >= _CANCELLING * jnp.sum(alone),
        lambda: total,
        lambda: ghost_norms.in_chunks(formed, everything, size),
    )
    return found
