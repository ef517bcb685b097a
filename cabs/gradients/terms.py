"""What one operation contributes to the per-example gradients of a parameter.

Guarantees: each term answers three questions, the gradients themselves, the sum of their squared
norms, and that of their elementwise squares, without materializing more of them than has to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from cabs.gradients import lookups, outer_products
from cabs.gradients.arrays import Array, Arrays, Squares, SummingArrays
from cabs.gradients.layout import Shape


class Term(Protocol):
    """The gradients of n examples with respect to what an operation took as its parameter."""

    @property
    def shape(self) -> Shape:
        """Shape of one gradient."""

    @property
    def operands(self) -> tuple[Array, ...]:
        """What the gradients are made of, with the examples in front."""

    def gradient(self, arrays: Any, *operands: Array) -> Array:
        """Return the gradients of some examples, shape (n, *shape), from their operands."""

    def squares(self, arrays: Any) -> Squares:
        """Return the squared norms of all examples' gradients."""


class ElementwiseTerm(Term, Protocol):
    """The same, for an adapter that has ``SummingArrays``."""

    def coordinate_squares(self, arrays: Any) -> Array:
        """Return the sum over examples of the gradients' elementwise squares, (1, *shape)."""


class Formed(NamedTuple):
    """How gradients are formed, to be squared and summed while they are at hand."""

    rows: Callable[..., Array]
    """From some examples' operands, their gradients, the coordinates in any order."""
    operands: Sequence[Array]
    needed: int
    """How many elements the temporaries of an example have."""
    arranged: Callable[[Array], Array]
    """From a sum of these over examples, (1, ...), the same in shape (1, *shape)."""

    def squares_and_sum(self, arrays: SummingArrays) -> tuple[Squares, Array]:
        """Return the squared norms, and the sum of the gradients, shape (1, *shape)."""
        squares, total = arrays.squares_and_sum(self.rows, self.operands, self.needed)
        return squares, self.arranged(total)

    def coordinate_squares(self, arrays: SummingArrays) -> Array:
        """Return the sum over examples of the elementwise squares, shape (1, *shape)."""
        squares, _ = arrays.coordinate_squares(self.rows, self.operands, self.needed)
        return self.arranged(squares)

    def coordinate_squares_and_sum(self, arrays: SummingArrays) -> tuple[Array, Array]:
        """Return this and the sum of the gradients."""
        found = arrays.coordinate_squares(self.rows, self.operands, self.needed, is_summed=True)
        squares, total = map(self.arranged, found)
        return squares, total


@dataclass(frozen=True)
class Materialized:
    """Gradients that are at hand, shape (n, *shape)."""

    gradients: Array
    shape: Shape

    @property
    def operands(self) -> tuple[Array, ...]:
        return (self.gradients,)

    def gradient(self, arrays: Arrays, *operands: Array) -> Array:
        return arrays.wide(operands[0])

    def squares(self, arrays: Arrays) -> Squares:
        return arrays.squares(self.gradients)

    def formed(self, arrays: Arrays) -> Formed:
        return Formed(arrays.wide, self.operands, math.prod(self.shape), lambda total: total)

    def coordinate_squares(self, arrays: SummingArrays) -> Array:
        return self.formed(arrays).coordinate_squares(arrays)


@dataclass(frozen=True)
class Product:
    """Gradients left' right of a matrix, or of E matrices side by side.

    ``left`` has shape (n, E, T, k), ``right`` (n, E, T, h), and the parameter has the axes of E, of
    k and of h in some order; those in none of them have length one.
    """

    left: Array
    right: Array
    shape: Shape
    blocks: Shape
    rows: Shape
    columns: Shape

    @classmethod
    def of_matrix(cls, left: Array, right: Array, shape: Shape) -> Product:
        """Return the gradients of a parameter of shape (k, h) or (E, k, h), or (k,) for h = 1."""
        return cls(left, right, shape, *cls.axes(shape))

    @staticmethod
    def axes(shape: Shape) -> tuple[Shape, Shape, Shape]:
        """Return which axes of such a parameter are those of E, of k and of h."""
        axes, at = tuple(range(len(shape))), max(len(shape) - 2, 0)
        return axes[:at], axes[at : at + 1], axes[at + 1 :]

    @property
    def operands(self) -> tuple[Array, ...]:
        return (self.left, self.right)

    def gradient(self, arrays: Arrays, *operands: Array) -> Array:
        return self._arranged(arrays, outer_products.gradient(arrays, *operands))

    def formed(self, arrays: Arrays) -> Formed:
        rows, arranged = partial(outer_products.gradient, arrays), partial(self._arranged, arrays)
        return Formed(rows, self.operands, math.prod(self.shape), arranged)

    def coordinate_squares(self, arrays: SummingArrays) -> Array:
        if arrays.shape(self.left)[2] != 1:
            return self.formed(arrays).coordinate_squares(arrays)
        # In the parameter's order of axes, so that nothing is transposed.
        ordered = self if self.rows <= self.columns else self.turned()
        squares = outer_products.coordinate_squares(arrays, ordered.left, ordered.right)
        return ordered._arranged(arrays, squares)

    def _arranged(self, arrays: Arrays, formed: Array) -> Array:
        """Return gradients of shape (n, E, k, h) in that of the parameter."""
        order = (*self.blocks, *self.rows, *self.columns)
        formed = arrays.reshape(formed, [self.shape[axis] for axis in order])
        if list(order) != sorted(order):
            formed = arrays.transpose(formed, [order.index(axis) for axis in sorted(order)])
        return arrays.reshape(formed, self.shape)

    def squares(self, arrays: Arrays) -> Squares:
        return outer_products.squares(arrays, self.left, self.right)

    def turned(self) -> Product:
        """Return the same gradients with the sides exchanged."""
        return Product(self.right, self.left, self.shape, self.blocks, self.columns, self.rows)

    def placed(self, shape: Shape, order: Sequence[int]) -> Product:
        """Return the same gradients, of a parameter whose axis ``order[k]`` was axis k here."""
        groups = (self.blocks, self.rows, self.columns)
        placed = (tuple(order[axis] for axis in group) for group in groups)
        return Product(self.left, self.right, shape, *placed)


@dataclass(frozen=True)
class Lookup:
    """Gradients of an embedding table, of which an example may use a row several times.

    ``ids`` has shape (n, T), ``rows``, the cotangents of what was taken, (n, T, h), and ``shape``
    is the table's, (V, ...).
    """

    ids: Array
    rows: Array
    shape: Shape

    @property
    def operands(self) -> tuple[Array, ...]:
        return (self.ids, self.rows)

    def gradient(self, arrays: Arrays, *operands: Array) -> Array:
        ids, rows = operands
        return arrays.reshape(lookups.gradient(arrays, ids, rows, self.shape[0]), self.shape)

    def squares(self, arrays: Arrays) -> Squares:
        return lookups.squares(arrays, self.ids, self.rows, self.shape[0])

    def coordinate_squares(self, arrays: SummingArrays) -> Array:
        found = lookups.coordinate_squares(arrays, self.ids, self.rows, self.shape[0])
        return arrays.reshape(found, self.shape)
