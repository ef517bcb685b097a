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
    found = wide(array)
    if jnp.issubdtype(found.dtype, jnp.complexfloating):
        found = jnp.abs(found)
    # Two axes, whatever there were, so that XLA sees when it has this sum already.
    squares: Array = jnp.sum(lax.square(found.reshape(len(found), -1)), axis=1)
    return squares


def in_chunks(function: Callable[..., Any], arrays: Sequence[Array], needed: int) -> Any:
    """Return ``function(*arrays)``, some examples at a time.

    Args:
        function: From arrays of some examples to arrays with them in front, a pytree.
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

    found = lax.map(lambda some: function(*some), tuple(map(head, arrays)))
    found = jax.tree.map(lambda one: one.reshape(-1, *one.shape[2:]), found)
    if chunks * size == examples:
        return found
    rest = function(*(array[chunks * size :] for array in arrays))
    return jax.tree.map(lambda *both: jnp.concatenate(both), found, rest)
