"""Sums of squares, and the chunks in which examples are taken.

Guarantees: exact up to rounding, summed in float32 or better, and never negative; examples are
taken a few at a time, since large temporaries cost more than the arithmetic on them; nothing waits
for a device.

Arrays have the examples in front, n of them; squared norms have shape (n,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

# Elements of the temporaries that some examples may need at a time: 1 MiB in float32.
_CHUNK = 2**18


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
    # Two axes, whatever there were, so that XLA sees when it has this sum already.
    squares: Array = jnp.sum(_squares(array.reshape(len(array), -1)), axis=1)
    return squares


def whole_square(array: Array) -> Array:
    """Return the sum of squares over all axes, none of which is merged with one that is sharded."""
    total: Array = jnp.sum(_squares(array))
    return total


def _squares(array: Array) -> Array:
    found = wide(array)
    return lax.square(jnp.abs(found) if jnp.iscomplexobj(found) else found)


def in_chunks(function: Callable[..., Any], arrays: Sequence[Array], needed: int) -> Any:
    """Return ``function(*arrays)``, some examples at a time.

    Args:
        function: From arrays of some examples to arrays with them in front, a pytree.
        arrays: The arrays of all examples.
        needed: How many elements the temporaries of an example have.
    """
    return each_and_sum(lambda *some: (function(*some), ()), arrays, needed)[0]


def each_and_sum(
    function: Callable[..., tuple[Any, Any]],
    arrays: Sequence[Array],
    needed: int,
    chunk: int | None = None,
) -> tuple[Any, Any]:
    """Return ``function(*arrays)``, some examples at a time.

    Args:
        function: From arrays of some examples to a pytree of arrays with them in front, and to one
            that is summed over them.
        arrays: The arrays of all examples.
        needed: How many elements the temporaries of an example have.
        chunk: How many they may have at a time, if not 2**18.
    """
    examples = len(arrays[0])
    # Each chunk takes from every device as many, so that no example moves between them.
    devices = jax.device_count() if examples % jax.device_count() == 0 else 1
    share = examples // devices
    chunks = min(share, -(-share * needed // (chunk or _CHUNK)))
    if chunks <= 1:
        return function(*arrays)
    size = share // chunks
    # Chunks that leave no rest are compiled once.
    even = max(some for some in range(1, size + 1) if share % some == 0)
    size = even if 2 * even >= size else size
    count = share // size
    apart = [array.reshape(devices, share, *array.shape[1:]) for array in arrays]
    whole = [a[:, : count * size].reshape(devices, count, size, *a.shape[2:]) for a in apart]

    _, sums = jax.eval_shape(function, *(array[0, 0] for array in whole))
    is_summed = bool(jax.tree.leaves(sums))

    def of_all(*some: Array) -> tuple[Any, Any]:
        """Return what the function makes of some examples of each device, the devices in front."""
        if devices > 1 and is_summed:
            # Sums are added up between devices when all are complete.
            return jax.vmap(function)(*some)
        each, sums = function(*(array.reshape(-1, *array.shape[2:]) for array in some))
        return jax.tree.map(lambda one: one.reshape(devices, -1, *one.shape[1:]), each), sums

    def add(total: Any, at: Array) -> Any:
        some = (lax.dynamic_index_in_dim(array, at, 1, keepdims=False) for array in whole)
        each, sums = of_all(*some)
        return jax.tree.map(jnp.add, total, sums), each

    _, like = jax.eval_shape(of_all, *(array[:, 0] for array in whole))
    zeros = jax.tree.map(lambda one: _zeros(one, arrays[0]), like)
    total, each = lax.scan(add, zeros, jnp.arange(count))
    each = jax.tree.map(lambda one: jnp.moveaxis(one, 0, 1), each)
    each = jax.tree.map(lambda one: one.reshape(devices, -1, *one.shape[3:]), each)
    if count * size < share:
        last, sums = of_all(*(array[:, count * size :] for array in apart))
        each = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), each, last)
        total = jax.tree.map(jnp.add, total, sums)
    each = jax.tree.map(lambda one: one.reshape(examples, *one.shape[2:]), each)
    if devices > 1 and is_summed:
        total = jax.tree.map(lambda one: jnp.sum(one, axis=0), total)
    return each, total


def _zeros(like: Any, array: Array) -> Array:
    """Return zeros that differ between devices, as far as JAX knows, where an array does."""
    zeros = jnp.zeros(like.shape, like.dtype)
    first = array[(0,) * array.ndim]
    return jnp.where(lax.eq(first, first), zeros, zeros)
