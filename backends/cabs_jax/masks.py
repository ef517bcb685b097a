"""Examples that a mask leaves out, made copies of one that counts.

Guarantees: what was in them reaches nothing, not even as 0 times infinity; no device sends more
than that one example.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from cabs_jax.graph import meshes


def filled(leaf: Array, axis: int, mask: Array) -> Array:
    """Return a leaf in which examples that do not count are the first one that does.

    Args:
        leaf: An array, or random keys, with the examples along an axis.
        axis: That axis.
        mask: Which count, booleans of shape (m,).
    """
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = filled(jax.random.key_data(leaf), axis, mask)
        keys: Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return keys

    def some(leaf: Array, mask: Array) -> Array:
        places = jnp.arange(len(mask))
        is_first = places == jnp.min(jnp.where(mask, places, len(mask)))
        shape = [1] * leaf.ndim
        shape[axis] = len(mask)
        # A sum, and no look-up, which would collect all that is sharded.
        others = jnp.zeros((), leaf.dtype)
        one = jnp.where(is_first.reshape(shape), leaf, others)
        one = jnp.any(one, axis, keepdims=True) if one.dtype == bool else _sum(one, axis)
        return jnp.where(mask.reshape(shape), leaf, lax.stop_gradient(one))

    made: Array = meshes.automatic(some, leaf, mask, like=jax.typeof(leaf))
    return made


def _sum(array: Array, axis: int) -> Array:
    return jnp.sum(array, axis, dtype=array.dtype, keepdims=True)
