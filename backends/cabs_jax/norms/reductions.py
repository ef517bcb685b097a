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
    chunks, rest = _chunks(arrays, needed)
    if not chunks:
        return function(*rest)
    found = lax.map(lambda some: function(*some), chunks)
    found = jax.tree.map(lambda one: one.reshape(-1, *one.shape[2:]), found)
    if not rest:
        return found
    return jax.tree.map(lambda *both: jnp.concatenate(both), found, function(*rest))


def sum_of_chunks(function: Callable[..., Array], arrays: Sequence[Array], needed: int) -> Array:
    """Return the sum of what a function returns for some examples at a time; as above."""
    chunks, rest = _chunks(arrays, needed)
    if not chunks:
        return function(*rest)
    like = jax.eval_shape(function, *(array[0] for array in chunks))
    zero = jnp.zeros(like.shape, like.dtype)
    total, _ = lax.scan(lambda total, some: (total + function(*some), None), zero, chunks)
    return total + function(*rest) if rest else total


def _chunks(arrays: Sequence[Array], needed: int) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return arrays cut into chunks, with these in front, and what is left; one chunk is left."""
    examples = len(arrays[0])
    chunks = min(examples, -(-examples * needed // _CHUNK))
    if chunks <= 1:
        return (), tuple(arrays)
    size = examples // chunks
    # Chunks that leave no rest are compiled once.
    even = max(some for some in range(1, size + 1) if examples % some == 0)
    size = even if 2 * even >= size else size
    count = examples // size
    whole = tuple(a[: count * size].reshape(count, size, *a.shape[1:]) for a in arrays)
    is_even = count * size == examples
    return whole, () if is_even else tuple(array[count * size :] for array in arrays)
