"""What one operation contributes to the per-example gradients of a variable.

Guarantees: ``form`` gives the gradients themselves, and ``square_sum`` the sum of their squared
norms without forming more of them than has to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tensorflow as tf

from cabs.gradients.layout import Shape
from cabs_tensorflow.norms import ghost_norms
from cabs_tensorflow.norms.ghost_norms import sizes_of


class Term(Protocol):
    """The gradients of n examples with respect to what an operation took as its parameter."""

    @property
    def shape(self) -> Shape:
        """Shape of one gradient."""

    @property
    def tensors(self) -> tuple[Any, ...]:
        """What the gradients are made of, with the examples in front."""

    def form(self, *tensors: Any) -> Any:
        """Return the gradients of some examples, shape (n, *shape), from their tensors."""

    def square_sum(self) -> Any:
        """Return the sum over examples of the squared norm of their gradients."""


@dataclass(frozen=True)
class Formed:
    """Gradients that are at hand, shape (n, *shape)."""

    gradients: Any
    shape: Shape

    @property
    def tensors(self) -> tuple[Any, ...]:
        return (self.gradients,)

    def form(self, *tensors: Any) -> Any:
        return ghost_norms.wide(tensors[0])

    def square_sum(self) -> Any:
        return ghost_norms.square(self.gradients)


@dataclass(frozen=True)
class Product:
    """Gradients g_i = left_i' right_i of a matrix, or of E matrices side by side.

    ``left`` has shape (n, E, T, k), ``right`` (n, E, T, h), and the parameter has the axes of E, of
    k and of h in some order; those in none of them have length one.
    """

    left: Any
    right: Any
    shape: Shape
    blocks: Shape
    rows: Shape
    columns: Shape

    @property
    def tensors(self) -> tuple[Any, ...]:
        return (self.left, self.right)

    def form(self, *tensors: Any) -> Any:
        left, right = map(ghost_norms.wide, tensors)
        formed = tf.matmul(left, right, transpose_a=True)
        order = (*self.blocks, *self.rows, *self.columns)
        sizes = [self.shape[axis] for axis in order]
        formed = tf.reshape(formed, [tf.shape(left)[0], *sizes])
        places = [1 + order.index(axis) for axis in sorted(order)]
        return tf.reshape(tf.transpose(formed, [0, *places]), [tf.shape(left)[0], *self.shape])

    def square_sum(self) -> Any:
        return ghost_norms.product(self.left, self.right)

    def turned(self) -> Product:
        """Return the same gradients with the sides exchanged."""
        return Product(self.right, self.left, self.shape, self.blocks, self.columns, self.rows)

    def placed(self, shape: Shape, order: Sequence[int]) -> Product:
        """Return the same gradients, of a parameter of a shape whose axes were transposed."""
        groups = (self.blocks, self.rows, self.columns)
        placed = (tuple(order[axis] for axis in group) for group in groups)
        return Product(self.left, self.right, shape, *placed)


@dataclass(frozen=True)
class Lookup:
    """Gradients of a table of which each example took some rows, some perhaps more than once.

    ``ids`` has shape (n, T), ``rows``, the cotangents of what was taken, (n, T, h), and ``shape``
    is the table's, (V, ...).
    """

    ids: Any
    rows: Any
    shape: Shape

    @property
    def tensors(self) -> tuple[Any, ...]:
        return (self.ids, self.rows)

    def form(self, *tensors: Any) -> Any:
        ids, rows = tensors
        n, length, height = sizes_of(ghost_norms.wide(rows))
        start = tf.range(n, dtype=ids.dtype)[:, None] * self.shape[0]
        flat = tf.reshape(ghost_norms.wide(rows), [n * length, height])
        places = tf.reshape(ids + start, [n * length])
        table = tf.math.unsorted_segment_sum(flat, places, n * self.shape[0])
        return tf.reshape(table, [n, *self.shape])

    def square_sum(self) -> Any:
        height = math.prod(self.shape[1:])
        length = self.rows.shape[1] or 1
        return ghost_norms.in_chunks(ghost_norms.lookup, self.tensors, 3 * length * height)


@dataclass(frozen=True)
class Pulled:
    """Gradients of another term, pushed on to what its parameter was made of.

    Args:
        term: The other term.
        pull: From its gradients to those of what it was made of.
        shape: Shape of one of these.
        keeps_norm: Whether what it was made of was only rearranged.
        key: What was done to it, if that is to be told apart from other things; None if it is not
            known to be the same as anything else.
    """

    term: Term
    pull: Callable[[Any], Any]
    shape: Shape
    keeps_norm: bool = False
    key: object = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self.term.tensors

    def form(self, *tensors: Any) -> Any:
        return self.pull(self.term.form(*tensors))

    def square_sum(self) -> Any:
        return self.term.square_sum() if self.keeps_norm else formed_square_sum([self])


# Share of its terms' size under which a sum in single precision has lost too many digits.
_CANCELLED = 0.01


def formed_square_sum(terms: Sequence[Term]) -> Any:
    """Return the sum over examples of the squared norm of the sum of some terms, forming it."""
    counts = [len(term.tensors) for term in terms]

    def some(*tensors: Any) -> Any:
        left = iter(tensors)
        formed = [
            term.form(*(next(left) for _ in range(count)))
            for term, count in zip(terms, counts, strict=True)
        ]
        return ghost_norms.square(tf.add_n(formed) if len(formed) > 1 else formed[0])

    tensors = [tensor for term in terms for tensor in term.tensors]
    return ghost_norms.in_chunks(some, tensors, 2 * math.prod(terms[0].shape))


def total_square_sum(terms: Sequence[Term]) -> Any:
    """Return the sum over examples of the squared norm of a variable's gradient.

    Where there are several uses, the gradients of all are added before they are squared: uses as a
    matrix or a table are put one after the other along T, others are formed.
    """
    if len(terms) == 1:
        return terms[0].square_sum()
    together = _together(terms)
    return formed_square_sum(terms) if together is None else together


def _together(terms: Sequence[Term]) -> Any:
    """Return the sum for uses of a variable as a matrix and as a table, None for others."""
    pulled = [term for term in terms if isinstance(term, Pulled)]
    keys = {one.key for one in pulled}
    if len(pulled) == len(terms) and len(keys) == 1 and None not in keys:
        return total_square_sum([one.term for one in pulled])
    lookups = [term for term in terms if isinstance(term, Lookup)]
    products = [term for term in terms if isinstance(term, Product)]
    if len(lookups) + len(products) < len(terms):
        return None
    first = (0,) if lookups else products[0].rows
    products = [one if one.rows == first else one.turned() for one in products]
    kinds = {(one.blocks, one.rows, one.columns, one.shape) for one in products}
    kinds |= {((), (0,), tuple(range(1, len(one.shape))), one.shape) for one in lookups}
    if len(kinds) > 1:
        return None
    sums = []
    if products:
        left = tf.concat([ghost_norms.wide(one.left) for one in products], axis=2)
        right = tf.concat([ghost_norms.wide(one.right) for one in products], axis=2)
        sums.append(ghost_norms.product(left, right))
    if lookups:
        ids = tf.concat([one.ids for one in lookups], axis=1)
        rows = tf.concat([ghost_norms.wide(one.rows) for one in lookups], axis=1)
        sums.append(Lookup(ids, rows, lookups[0].shape).square_sum())
    if not (products and lookups):
        return sums[0]
    # 2 sum over t, s of left_t[id_s] (right_t . row_s).
    needed = 2 * (ids.shape[1] or 1) * (left.shape[2] or 1)

    def crossed(left: Any, right: Any, ids: Any, rows: Any) -> Any:
        taken = tf.gather(left[:, 0], ids, axis=2, batch_dims=1)
        met = tf.matmul(right[:, 0], rows, transpose_b=True)
        return 2.0 * tf.reduce_sum(taken * met)

    total = tf.add_n([*sums, ghost_norms.in_chunks(crossed, (left, right, ids, rows), needed)])
    # Not a number compares false, and has cancelled.
    return tf.cond(
        total >= _CANCELLED * tf.add_n(sums),
        lambda: total,
        lambda: formed_square_sum(terms),
    )
