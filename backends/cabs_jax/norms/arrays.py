"""The array operations of JAX, in which the core computes squared norms.

Guarantees: sums are taken in float32 or better, in types that strict promotion allows; nothing
waits for a device. Squares have shape (n,), one an example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from cabs_jax.norms import reductions

# Elements of gradients that are squared and summed at a time: 16 MiB in float32. Taking some
# examples out of a batch costs more than the cache gains.
_SUMMED = 2**22


class JaxArrays:
    """Those of JAX."""

    # Measured.
    pair_cost = 0.75
    symmetric: int | None = 2
    patch_width = 512

    def shape(self, array: Array) -> tuple[int, ...]:
        return tuple(array.shape)

    def sizes(self, array: Array) -> list[int]:
        return [*array.shape]

    def wide(self, array: Array) -> Array:
        return reductions.wide(array)

    # As wide as JAX was told to have it.
    double = wide

    def contract(self, left: Array, right: Array, axis: int) -> Array:
        if left.dtype != right.dtype:
            both = max(
                reductions.wide_type(left.dtype),
                reductions.wide_type(right.dtype),
                key=lambda dtype: dtype.itemsize,
            )
            left, right = left.astype(both), right.astype(both)
        return lax.dot_general(
            left,
            right,
            (((axis,), (axis,)), ((0, 1), (0, 1))),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=reductions.wide_type(left.dtype),
        )

    def squares(self, array: Array) -> Array:
        return reductions.square(array)

    def inner(self, left: Array, right: Array) -> Array:
        found: Array = jnp.sum(left * right, axis=range(1, left.ndim))
        return found

    def row_norms(self, array: Array) -> Array:
        if array.shape[1] == 1:
            # The axes of :func:`reductions.square`, so that XLA sees when it has this sum already.
            return lax.sqrt(reductions.square(array))[:, None]
        squares: Array = jnp.sum(lax.square(reductions.wide(array)), axis=(2, 3))
        return lax.sqrt(squares)

    def root_sums(self, left: Array, right: Array) -> Array:
        terms = jnp.diagonal(left, axis1=2, axis2=3) * jnp.diagonal(right, axis1=2, axis2=3)
        found: Array = jnp.sum(jnp.sqrt(jnp.maximum(terms, 0.0)), axis=2)
        return found

    def reshape(self, array: Array, sizes: Sequence[int]) -> Array:
        return array.reshape(len(array), *sizes)

    def transpose(self, array: Array, order: Sequence[int]) -> Array:
        return array.transpose(0, *(1 + axis for axis in order))

    def pad(self, array: Array, first: int, sides: Sequence[tuple[int, int, int]]) -> Array:
        none = [(0, 0, 0)]
        whole = [*none * first, *sides, *none * (array.ndim - first - len(sides))]
        return lax.pad(array, jnp.zeros((), array.dtype), whole)

    def strided(self, array: Array, axis: int, start: int, stop: int, step: int) -> Array:
        return lax.slice_in_dim(array, start, stop, step, axis=axis)

    def part(self, array: Array, axis: int, start: int, stop: int) -> Array:
        return lax.slice_in_dim(array, start, stop, axis=axis)

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array:
        return jnp.concatenate([*arrays], axis=axis)

    def argsort(self, ids: Array) -> Array:
        return jnp.argsort(ids, axis=1)

    def take(self, array: Array, places: Array) -> Array:
        return jnp.take_along_axis(array, places.reshape(*places.shape, *[1] * (array.ndim - 2)), 1)

    def number(self, ids: Array) -> Array:
        is_next = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
        return jnp.cumsum(is_next, axis=1)

    def columns(self, array: Array, ids: Array) -> Array:
        return jnp.take_along_axis(array, ids[:, None, :], axis=2)

    def scatter(self, places: Array, rows: Array, count: int) -> Array:
        table = jnp.zeros((len(rows), count, rows.shape[2]), rows.dtype)
        at = jnp.arange(len(rows))[:, None]
        return table.at[at, places].add(rows, mode="promise_in_bounds")

    def in_chunks(
        self, function: Callable[..., Any], operands: Sequence[Array], needed: int
    ) -> Any:
        return reductions.in_chunks(function, operands, needed)

    def squares_and_sum(
        self, rows: Callable[..., Array], operands: Sequence[Array], needed: int
    ) -> tuple[Array, Array]:
        def some(*operands: Array) -> tuple[Array, Array]:
            found = self.wide(rows(*operands))
            return reductions.square(found), jnp.sum(found, axis=0, keepdims=True)

        return reductions.each_and_sum(some, operands, needed, _SUMMED)

    def coordinate_squares(
        self,
        rows: Callable[..., Array],
        operands: Sequence[Array],
        needed: int,
        *,
        is_summed: bool = False,
    ) -> tuple[Array, Array | None]:
        def some(*operands: Array) -> tuple[tuple[()], list[Array]]:
            found = self.wide(rows(*operands))
            wanted = [lax.square(found), *([found] if is_summed else [])]
            return (), [jnp.sum(one, axis=0, keepdims=True) for one in wanted]

        squares, *total = reductions.each_and_sum(some, operands, needed)[1]
        return squares, total[0] if is_summed else None

    def merged(self, array: Array, axis: int) -> Array:
        moved = jnp.moveaxis(array, 0, axis - 1)
        return moved.reshape(1, *moved.shape[: axis - 1], -1, *moved.shape[axis + 1 :])

    def unless_cancelled(
        self, total: Array, bound: Array, limit: float, otherwise: Callable[[], Array]
    ) -> Array:
        # Not a number compares false, and has cancelled.
        is_good = jnp.sum(bound) <= limit * jnp.sum(total)
        squares: Array = lax.cond(is_good, lambda: total, otherwise)
        return squares

    def prefer(
        self,
        in_pairs: Callable[..., Array],
        materialized: Callable[..., Array],
        operands: Sequence[Array],
    ) -> Array:
        # On a GPU, products of small matrices cost more than they save.
        squares: Array = lax.platform_dependent(*operands, cpu=in_pairs, default=materialized)
        return squares


ARRAYS = JaxArrays()
