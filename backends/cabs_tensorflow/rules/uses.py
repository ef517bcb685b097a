"""The gradients of a variable: of one use that something lies ahead of, and of all uses.

Guarantees: the gradients of several uses are added before they are squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from cabs.gradients.layout import Shape
from cabs.gradients.terms import Product, Term, together
from cabs_tensorflow.norms import reductions
from cabs_tensorflow.norms.arrays import ARRAYS, TensorflowArrays


@dataclass(frozen=True)
class Pulled:
    """Gradients of another term, pulled back to what its parameter was made of.

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
    def operands(self) -> tuple[Any, ...]:
        return self.term.operands

    def gradient(self, arrays: TensorflowArrays, *operands: Any) -> Any:
        return self.pull(self.term.gradient(arrays, *operands))

    def squares(self, arrays: TensorflowArrays) -> Any:
        return self.term.squares(arrays) if self.keeps_norm else materialized_squares([self])


def total_squares(terms: Sequence[Term]) -> Any:
    """Return the sum over examples of the squared norm of a variable's gradient.

    Where there are several uses, the gradients of all are added before they are squared: from their
    factors where all are uses as a matrix or a table; else they are materialized.
    """
    if len(terms) == 1:
        return terms[0].squares(ARRAYS)
    pulled = [term for term in terms if isinstance(term, Pulled)]
    keys = {one.key for one in pulled}
    if len(pulled) == len(terms) and len(keys) == 1 and None not in keys:
        return total_squares([one.term for one in pulled])
    found = together(ARRAYS, terms)
    return materialized_squares(terms) if found is None else found


def weighted_squares(terms: Sequence[Term], weight: Any) -> Any:
    """Return the same with each coordinate's square multiplied by its weight, (parameter's shape).

    Products of one position, whose elements' squares are products too, are not materialized.
    """
    (term, *more) = terms
    if not more and isinstance(term, Product) and term.left.shape[2] == 1:
        groups = (term.blocks, term.rows, term.columns)
        order = [axis for group in groups for axis in group]
        order += [axis for axis in range(len(term.shape)) if axis not in order]
        sizes = [math.prod(term.shape[axis] for axis in group) for group in groups]
        arranged = tf.reshape(tf.transpose(reductions.wide(weight), order), sizes)
        left, right = (
            tf.transpose(tf.square(reductions.wide(side[:, :, 0])), [1, 0, 2])
            for side in (term.left, term.right)
        )
        return tf.reduce_sum(tf.matmul(left, arranged) * right)
    return materialized_squares(terms, weight)


def materialized_squares(terms: Sequence[Term], weight: Any = None) -> Any:
    """Return the sum over examples of the squared norm of the sum of terms, materializing it."""
    counts = [len(term.operands) for term in terms]

    def some(*tensors: Any) -> Any:
        left = iter(tensors)
        formed = [
            term.gradient(ARRAYS, *(next(left) for _ in range(count)))
            for term, count in zip(terms, counts, strict=True)
        ]
        total = tf.add_n(formed) if len(formed) > 1 else formed[0]
        if weight is None:
            return reductions.square(total)
        return reductions.weighted_square(total, weight)

    tensors = [tensor for term in terms for tensor in term.operands]
    return reductions.in_chunks(some, tensors, 2 * math.prod(terms[0].shape))
