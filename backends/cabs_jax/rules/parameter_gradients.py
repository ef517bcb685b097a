"""What the gradient of a parameter is made of, where it meets the example in an operation we know.

Guarantees: a rule is exact for every case that it accepts; all others take the operation's own
VJP, example by example.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from cabs.gradients import lookups, outer_products
from cabs.gradients.terms import Product
from cabs_jax.norms import convolution, reductions
from cabs_jax.norms.arrays import ARRAYS


class Rule(Protocol):
    """The gradient of an operand, from another operand and the cotangent of the output."""

    @property
    def name(self) -> str:
        """What it is called in the table of :func:`cabs_jax.verify`."""

    @property
    def other(self) -> int | None:
        """The position of the operand that the gradient takes; None if it takes none."""

    def square(self, others: Sequence[Array], cotangents: Array) -> Array:
        """Return |g_i|^2, shape (n,), from arrays with n examples in front."""

    def spares(self, others: Sequence[Any], cotangent: Any, shape: Sequence[int]) -> bool:
        """Return whether summing the gradients while they are squared spares more than it takes.

        From shapes of one example. Only then there is a :meth:`square_and_sum`.
        """


class Axes(NamedTuple):
    """Which axes of a parameter are batched, which a product sums over, and which are left."""

    batch: tuple[int | None, ...]
    left: tuple[int | None, ...]
    right: tuple[int | None, ...]


@dataclass(frozen=True)
class Dot:
    """A product of matrices, or of vectors, or of batches of them."""

    position: int
    axes: Axes
    batch: tuple[int, ...]
    """The axes of the other operand that are batched."""
    contracted: tuple[int, ...]
    name = "matrix"

    @property
    def other(self) -> int:
        return 1 - self.position

    def factors(self, others: Sequence[Array], cotangents: Array) -> tuple[Array, Array]:
        """Return left and right with g = sum over t of left_t right_t', for one example.

        Shapes are (batch..., T, left...) and (batch..., T, right...).
        """
        (other,) = others
        rows = [a for a in range(other.ndim) if a not in (*self.batch, *self.contracted)]
        left = other.transpose(*self.batch, *rows, *self.contracted)
        batch, free = len(self.batch), len(self.axes.right)
        if self.position == 0:
            # The axes of the left operand come first in the output.
            middle = range(batch, batch + free)
            last = range(batch + free, cotangents.ndim)
            cotangents = cotangents.transpose(*range(batch), *last, *middle)
        length = cotangents.shape[batch : cotangents.ndim - free]
        count = 1
        for size in length:
            count *= size
        return (
            left.reshape(*left.shape[:batch], count, *left.shape[batch + len(rows) :]),
            cotangents.reshape(
                *cotangents.shape[:batch], count, *cotangents.shape[cotangents.ndim - free :]
            ),
        )

    def square(self, others: Sequence[Array], cotangents: Array) -> Array:
        squares: Array = outer_products.squares(ARRAYS, *self.sides(others, cotangents))
        return squares

    def square_and_sum(
        self, others: Sequence[Array], cotangents: Array, shape: Sequence[int]
    ) -> tuple[Array, Array]:
        left, right = self.sides(others, cotangents)
        axes: tuple[Any, ...] = self.axes
        term = Product(left, right, tuple(shape), axes[0], axes[1], axes[2])
        squares, total = term.formed(ARRAYS).squares_and_sum(ARRAYS)
        return squares, total[0]

    def spares(self, others: Sequence[Any], cotangent: Any, shape: Sequence[int]) -> bool:
        axes: tuple[Any, ...] = self.axes
        blocks, width, height = [math.prod(shape[axis] for axis in some) for some in axes]
        if _has_threads() or 0 in (cotangent.size, others[0].size):
            return False
        length = others[0].size // (blocks * width)
        return outer_products.spared(ARRAYS, length, width, height) > 0

    def sides(self, others: Sequence[Array], cotangents: Array) -> tuple[Array, ...]:
        """Return both factors of all examples, in shape (n, B, T, k)."""
        factors = jax.vmap(self.factors)(others, cotangents)
        return tuple(flat(side, len(self.batch)) for side in factors)


@dataclass(frozen=True)
class Lookup:
    """Rows of a table, by their numbers."""

    length: int
    """How many rows there are."""
    axes: Axes
    offsets: tuple[int, ...]
    """Where the axes of a row are in the output."""
    mode: Any
    name = "lookup"
    other = 1

    def factors(self, others: Sequence[Array], cotangents: Array) -> tuple[Array, Array]:
        """Return the numbers, shape (T,), and the rows' cotangents, shape (T, right...)."""
        (indices,) = others
        ids = indices.reshape(-1)
        # The number of rows may not fit into a type in which the numbers of rows do.
        ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
        rest = [axis for axis in range(cotangents.ndim) if axis not in self.offsets]
        rows = cotangents.transpose(*rest, *self.offsets)
        rows = rows.reshape(len(ids), *rows.shape[len(rest) :])
        if self.mode is not lax.GatherScatterMode.CLIP:
            # JAX drops them, whatever the mode promises.
            is_row = (ids >= 0) & (ids < self.length)
            rows = jnp.where(is_row.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)
        return jnp.clip(ids, 0, self.length - 1).astype(jnp.int32), rows

    def square(self, others: Sequence[Array], cotangents: Array) -> Array:
        ids, rows = jax.vmap(self.factors)(others, cotangents)
        flat_rows = rows.reshape(*ids.shape, -1)
        squares: Array = lookups.squares(ARRAYS, ids, flat_rows, self.length)
        return squares

    def spares(self, *_: Any) -> bool:
        return False


@dataclass(frozen=True)
class Convolution:
    """The kernel of a convolution."""

    kernel: tuple[int, ...]
    params: dict[str, Any]
    name = "convolution"
    other = 0

    def square(self, others: Sequence[Array], cotangents: Array) -> Array:
        (inputs,) = others
        return convolution.square(inputs, cotangents, self.kernel, self.params)

    def square_and_sum(
        self,
        others: Sequence[Array],
        cotangents: Array,
        shape: Sequence[int],  # noqa: ARG002
    ) -> tuple[Array, Array]:
        return convolution.square_and_sum(others[0], cotangents, self.kernel, self.params)

    def spares(self, others: Sequence[Any], cotangent: Any, shape: Sequence[int]) -> bool:
        del others
        channels = shape[self.params["dimension_numbers"].rhs_spec[0]]
        return bool(cotangent.size > outer_products.ADDED * channels)


@dataclass(frozen=True)
class Selection:
    """Elements of a parameter, none more than once."""

    name = "selection"
    other = None

    def square(self, others: Sequence[Array], cotangents: Array) -> Array:
        del others
        return reductions.square(cotangents)

    def spares(self, *_: Any) -> bool:
        return False


def _has_threads() -> bool:
    """Return whether XLA has several threads, of which a stack of products takes one."""
    known = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() if known is None else len(known(0))) != 1


def flat(array: Array, batch: int) -> Array:
    """Return a factor with n examples in front in shape (n, B, T, k)."""
    sizes = array.shape
    b = k = 1
    for size in sizes[1 : 1 + batch]:
        b *= size
    for size in sizes[2 + batch :]:
        k *= size
    return array.reshape(sizes[0], b, sizes[1 + batch], k)


def rule_for(primitive: str, params: dict[str, Any], avals: Sequence[Any], at: int) -> Rule | None:
    """Return the rule for an operand of an operation, if there is one.

    Args:
        primitive: The primitive's name.
        params: Its parameters.
        avals: Shapes and types of all operands.
        at: Which operand the parameter is.
    """
    if jnp.issubdtype(avals[at].dtype, jnp.complexfloating):
        return None
    shape = avals[at].shape
    if primitive == "dot_general":
        contracted, batch = params["dimension_numbers"]
        kept = [a for a in range(len(shape)) if a not in (*contracted[at], *batch[at])]
        axes = Axes(tuple(batch[at]), tuple(contracted[at]), tuple(kept))
        return Dot(at, axes, tuple(batch[1 - at]), tuple(contracted[1 - at]))
    if primitive == "conv_general_dilated" and at == 1 and params["batch_group_count"] == 1:
        spatial = params["dimension_numbers"].rhs_spec[2:]
        return Convolution(tuple(shape[axis] for axis in spatial), params)
    if primitive == "gather" and at == 0:
        return _lookup(params, shape)
    if primitive == "dynamic_slice" and at == 0:
        return Selection()
    return None


def _lookup(params: dict[str, Any], shape: tuple[int, ...]) -> Lookup | None:
    layout = params["dimension_numbers"]
    if len(layout.start_index_map) != 1 or layout.operand_batching_dims:
        return None
    (axis,) = layout.start_index_map
    whole = tuple(1 if a == axis else size for a, size in enumerate(shape))
    if layout.collapsed_slice_dims != (axis,) or tuple(params["slice_sizes"]) != whole:
        return None
    mode = lax.GatherScatterMode.from_any(params["mode"])
    rest = tuple(a for a in range(len(shape)) if a != axis)
    return Lookup(shape[axis], Axes((), (axis,), rest), tuple(layout.offset_dims), mode)
