"""The array operations that the arithmetic of per-example gradients is written in.

Guarantees: what this package computes, it computes with these, so that a framework that has them
has all of it. :class:`NumpyArrays` is the reference: float64, one number an example.

Arrays have the examples in front, n of them. The result of a sum over everything but the examples
is called *squares*: one number an example, or their sum over the examples, as a framework chooses.
Squares can be added, and multiplied by numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = Any
Squares: TypeAlias = Any


class Arrays(Protocol):
    """A framework's. E, T and S count matrices side by side, positions, and positions again."""

    pair_cost: float
    """What a product of pairs of positions costs, in products that form a gradient."""
    symmetric: int | None
    """From how many positions half of a symmetric matrix is cheaper than all of it; None: never."""

    def shape(self, array: Array) -> tuple[Any, ...]:
        """Return the sizes, integers where they are known, else None."""

    def wide(self, array: Array) -> Array:
        """Return an array in the precision of sums: single, or double if it is."""

    def double(self, array: Array) -> Array:
        """Return an array in double precision, where the framework has it."""

    def contract(self, left: Array, right: Array, axis: int) -> Array:
        """Return products of matrices, shape (n, E, ., .), summed over axis 2 or 3 of both."""

    def squares(self, array: Array) -> Squares:
        """Return sums of squares over all axes but the examples'."""

    def inner(self, left: Array, right: Array) -> Squares:
        """Return sums of products over all axes but the examples'; may overwrite the first."""

    def row_norms(self, array: Array) -> Array:
        """Return the norms over the last two axes of shape (n, E, T, k), shape (n, E)."""

    def root_sums(self, left: Array, right: Array) -> Array:
        """Return the sums over t of sqrt(left_tt right_tt), shape (n, E), of (n, E, T, T)."""

    def reshape(self, array: Array, sizes: Sequence[Any]) -> Array:
        """Return an array with other axes behind that of the examples."""

    def transpose(self, array: Array, order: Sequence[int]) -> Array:
        """Return an array with the axes behind that of the examples in another order, from 0."""

    def part(self, array: Array, axis: int, start: int, stop: int) -> Array:
        """Return some places of an axis."""

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array:
        """Return arrays one after another."""

    def argsort(self, ids: Array) -> Array:
        """Return the places that sort each row of integers of shape (n, T), equal ones in order."""

    def take(self, array: Array, places: Array) -> Array:
        """Return the elements along axis 1 at places of shape (n, T)."""

    def number(self, ids: Array) -> Array:
        """Return sorted integers of shape (n, T) numbered from 0, equal ones alike."""

    def columns(self, array: Array, ids: Array) -> Array:
        """Return the elements (n, T, S) of shape (n, T, V) in columns of numbers (n, S)."""

    def scatter(self, places: Array, rows: Array, count: Any) -> Array:
        """Return shape (n, count, h), with rows (n, T, h) added at places (n, T)."""

    def in_chunks(
        self, function: Callable[..., Any], operands: Sequence[Array], needed: int
    ) -> Any:
        """Return the squares, or the tuple of them, of a function of some examples' operands.

        ``needed`` is how many elements the temporaries of an example have.
        """

    def unless_cancelled(
        self, total: Squares, bound: Squares, limit: float, otherwise: Callable[[], Squares]
    ) -> Squares:
        """Return ``total``, or otherwise, where sum(bound) <= limit sum(total) does not hold."""

    def prefer(
        self,
        in_pairs: Callable[..., Squares],
        materialized: Callable[..., Squares],
        operands: Sequence[Array],
    ) -> Squares:
        """Run the first where its guard against cancellation can be read; otherwise the second."""


class SummingArrays(Arrays, Protocol):
    """Operations that also return the batch gradient, while per-example gradients are at hand."""

    def squares_and_sum(
        self, rows: Callable[..., Array], operands: Sequence[Array], needed: int
    ) -> tuple[Squares, Array]:
        """Return the squares of what a function returns for each example, and their sum, (1, ...).

        ``needed`` is how many elements it returns for an example.
        """

    def coordinate_squares(
        self,
        rows: Callable[..., Array],
        operands: Sequence[Array],
        needed: int,
        *,
        is_summed: bool = False,
    ) -> tuple[Array, Array | None]:
        """Return the sum over examples of the elementwise squares of what a function returns.

        And that of what it returns itself, if it is wanted; both have shape (1, ...).
        """

    def merged(self, array: Array, axis: int) -> Array:
        """Return shape (1, ...), with the examples before the places of an axis, as one axis."""


class PatchArrays(Arrays, Protocol):
    """What convolutions and labelled axes are written in besides, of patches if need be."""

    patch_width: int
    """Patches of up to so many elements are unfolded whole; larger ones a kernel row at a time."""

    def sizes(self, array: Array) -> list[Any]:
        """Return the sizes, integers or what stands for them until they are known."""

    def pad(self, array: Array, first: int, sides: Sequence[tuple[Any, Any, int]]) -> Array:
        """Return an array with zeros before, behind, and between elements of axes from one on."""

    def strided(self, array: Array, axis: int, start: int, stop: Any, step: int) -> Array:
        """Return every so many-th place of an axis."""


def known(*sizes: Any) -> bool:
    """Return whether all sizes are integers."""
    return all(isinstance(size, int) for size in sizes)


class NumpyArrays:
    """The reference."""

    pair_cost = 1.0
    symmetric = 8
    patch_width = 32
    chunk = 2**18

    def shape(self, array: Array) -> tuple[int, ...]:
        return tuple(array.shape)

    def sizes(self, array: Array) -> list[int]:
        return [*array.shape]

    def wide(self, array: Array) -> Array:
        return np.asarray(array, np.float64)

    double = wide

    def contract(self, left: Array, right: Array, axis: int) -> Array:
        left, right = self.wide(left), self.wide(right)
        return np.einsum("netk,neth->nekh" if axis == 2 else "netk,nesk->nets", left, right)

    def squares(self, array: Array) -> Squares:
        return (self.wide(array).reshape(len(array), -1) ** 2).sum(axis=1)

    def inner(self, left: Array, right: Array) -> Squares:
        return (left * right).reshape(len(left), -1).sum(axis=1)

    def row_norms(self, array: Array) -> Array:
        return np.sqrt((self.wide(array) ** 2).sum(axis=(2, 3)))

    def root_sums(self, left: Array, right: Array) -> Array:
        both = (np.diagonal(one, axis1=2, axis2=3) for one in (left, right))
        return np.sqrt(np.maximum(np.multiply(*both), 0.0)).sum(axis=2)

    def reshape(self, array: Array, sizes: Sequence[int]) -> Array:
        return array.reshape(len(array), *sizes)

    def transpose(self, array: Array, order: Sequence[int]) -> Array:
        return array.transpose(0, *(1 + axis for axis in order))

    def pad(self, array: Array, first: int, sides: Sequence[tuple[int, int, int]]) -> Array:
        for axis, (low, high, between) in enumerate(sides, start=first):
            apart = np.insert(array, np.repeat(np.arange(1, array.shape[axis]), between), 0, axis)
            wide = [(0, 0)] * array.ndim
            wide[axis] = (max(low, 0), max(high, 0))
            array = np.pad(apart, wide)
            # Less than nothing is cut off.
            stop = array.shape[axis] + min(high, 0)
            array = self.part(array, axis, -min(low, 0), stop)
        return array

    def strided(self, array: Array, axis: int, start: int, stop: int, step: int) -> Array:
        return array[(slice(None),) * axis + (slice(start, stop, step),)]

    def part(self, array: Array, axis: int, start: int, stop: int) -> Array:
        return array[(slice(None),) * axis + (slice(start, stop),)]

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array:
        return np.concatenate(arrays, axis)

    def argsort(self, ids: Array) -> Array:
        return np.argsort(ids, axis=1, kind="stable")

    def take(self, array: Array, places: Array) -> Array:
        return array[np.arange(len(array))[:, None], places]

    def number(self, ids: Array) -> Array:
        return np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)

    def columns(self, array: Array, ids: Array) -> Array:
        return np.take_along_axis(array, ids[:, None, :], axis=2)

    def scatter(self, places: Array, rows: Array, count: int) -> Array:
        table = np.zeros((len(rows), count, rows.shape[2]))
        np.add.at(table, (np.arange(len(rows))[:, None], places), rows)
        return table

    def in_chunks(
        self, function: Callable[..., Any], operands: Sequence[Array], needed: int
    ) -> Any:
        size, examples = max(1, self.chunk // max(needed, 1)), len(operands[0])
        starts = range(0, max(examples, 1), size)
        found = [function(*(one[at : at + size] for one in operands)) for at in starts]
        if isinstance(found[0], tuple):
            return tuple(map(np.concatenate, zip(*found, strict=True)))
        return np.concatenate(found)

    def squares_and_sum(
        self, rows: Callable[..., Array], operands: Sequence[Array], needed: int
    ) -> tuple[Squares, Array]:
        def some(*operands: Array) -> tuple[Squares, Array]:
            found = rows(*operands)
            return self.squares(found), found.sum(axis=0, keepdims=True)

        squares, sums = self.in_chunks(some, operands, needed)
        return squares, sums.sum(axis=0, keepdims=True)

    def coordinate_squares(
        self,
        rows: Callable[..., Array],
        operands: Sequence[Array],
        needed: int,
        *,
        is_summed: bool = False,
    ) -> tuple[Array, Array | None]:
        def some(*operands: Array) -> tuple[Array, Array]:
            found = self.wide(rows(*operands))
            return (found**2).sum(axis=0, keepdims=True), found.sum(axis=0, keepdims=True)

        found = self.in_chunks(some, operands, needed)
        squares, total = (one.sum(axis=0, keepdims=True) for one in found)
        return squares, total if is_summed else None

    def merged(self, array: Array, axis: int) -> Array:
        sizes = array.shape[1:axis], array.shape[axis + 1 :]
        return np.moveaxis(array, 0, axis - 1).reshape(1, *sizes[0], -1, *sizes[1])

    def unless_cancelled(
        self, total: Squares, bound: Squares, limit: float, otherwise: Callable[[], Squares]
    ) -> Squares:
        return total if bound.sum() <= limit * total.sum() else otherwise()

    def prefer(
        self,
        in_pairs: Callable[..., Squares],
        materialized: Callable[..., Squares],  # noqa: ARG002
        operands: Sequence[Array],
    ) -> Squares:
        return in_pairs(*operands)
