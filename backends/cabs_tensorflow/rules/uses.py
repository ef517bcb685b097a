"""The gradients of a variable: of one use that something lies ahead of, and of all uses.

Guarantees: the gradients of several uses are added before they are squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from cabs.gradients import outer_products
from cabs.gradients.layout import Shape
from cabs.gradients.terms import Formed, Materialized, Product, Term, together
from cabs_tensorflow.norms import reductions
from cabs_tensorflow.norms.arrays import ARRAYS, TensorflowArrays
from cabs_tensorflow.norms.convolution import Convolution
from cabs_tensorflow.rules.shared_functions import SharedFunctions


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


def squares_and_sum(
    functions: SharedFunctions, term: Term, positions: int | None, *, is_elementwise: bool
) -> tuple[Any, Any] | None:
    """Return the squares of gradients and their sum, where that is cheaper than a gradient beside.

    Args:
        functions: What equal terms share.
        term: The only use of a variable.
        positions: How many elements of what was computed from it an example has; None if unknown.
        is_elementwise: Whether the squares of elements are wanted, in the parameter's shape, and
            not those of norms.
    """
    pulls = []
    while isinstance(term, Pulled):
        if not term.keeps_norm:
            return None
        pulls.append(term.pull)
        term = term.term
    if not _is_to_be_summed(term, positions):
        return None
    question = _of_elements_and_sum if is_elementwise else _of_norms_and_sum
    squares, total = _ask(functions, question, term)
    for pull in reversed(pulls):
        total = pull(total)
        squares = pull(squares) if is_elementwise else squares
    return squares[0] if is_elementwise else squares, total[0]


def total_squares(functions: SharedFunctions, terms: Sequence[Term]) -> Any:
    """Return the sum over examples of the squared norm of a variable's gradient.

    Where there are several uses, the gradients of all are added before they are squared: from their
    factors where all are uses as a matrix or a table; else they are materialized.
    """
    pulled = [term for term in terms if isinstance(term, Pulled)]
    keys = {one.key for one in pulled}
    if len(terms) == 1 and pulled and pulled[0].keeps_norm:
        return total_squares(functions, [pulled[0].term])
    if len(terms) == 1:
        return _ask(functions, _of_norms, terms[0])
    if len(pulled) == len(terms) and len(keys) == 1 and None not in keys:
        return total_squares(functions, [one.term for one in pulled])
    found = together(ARRAYS, terms)
    return materialized_squares(terms) if found is None else found


def _is_to_be_summed(term: Any, positions: int | None) -> bool:
    """Return whether gradients are formed, and their sum is cheaper than a gradient beside them."""
    if isinstance(term, Convolution):
        return term.spared() > 0
    if isinstance(term, Product):
        sizes = (*term.left.shape[1:], term.right.shape[3])
        return None in sizes or outer_products.spared(ARRAYS, *sizes[1:]) > 0
    # They were summed over positions, which are many, and are at hand.
    return isinstance(term, Materialized) and positions != math.prod(term.shape)


def _formed(term: Any) -> Formed:
    formed: Formed = term.formed(ARRAYS)
    return formed._replace(needed=0) if isinstance(term, Materialized) else formed


def _of_norms(term: Any) -> Any:
    return term.squares(ARRAYS)


def _of_norms_and_sum(term: Any) -> Any:
    return _formed(term).squares_and_sum(ARRAYS)


def _of_elements_and_sum(term: Any) -> Any:
    return _formed(term).coordinate_squares_and_sum(ARRAYS)


def _ask(functions: SharedFunctions, question: Callable[[Any], Any], term: Any) -> Any:
    """Return ``question(term)``, by a shared function if it takes more than a call of one does."""
    is_little = not isinstance(term, Convolution | Product) or (
        isinstance(term, Product) and term.left.shape[2] == 1
    )
    return question(term) if is_little else functions.ask(question, term)


def weighted_squares(terms: Sequence[Term], weight: Any) -> Any:
    """Return the same with each coordinate's square multiplied by its weight, (parameter's shape).

    Products of one position, whose elements' squares are products too, are not materialized.
    """
    (term, *more) = terms
    if more or not isinstance(term, Product) or term.left.shape[2] != 1:
        return materialized_squares(terms, weight)
    squares = term.coordinate_squares(ARRAYS)[0]
    return tf.reduce_sum(squares * tf.cast(weight, squares.dtype))


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
