"""How the gradients of a variable are squared: by functions that equal ones share, or summed too.

Guarantees: what :mod:`cabs.gradients.uses` says of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cabs.gradients import outer_products, uses
from cabs.gradients.terms import Formed, Materialized, Product, Term
from cabs.gradients.uses import Pulled
from cabs_tensorflow.norms.arrays import ARRAYS
from cabs_tensorflow.norms.convolution import Convolution
from cabs_tensorflow.rules.shared_functions import SharedFunctions


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
    while isinstance(term, Pulled) and term.is_rearranged:
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
    """Return the sum over examples of the squared norm of a variable's gradient, over its uses."""
    if len(terms) > 1:
        return uses.total_squares(ARRAYS, terms)
    (term,) = terms
    while isinstance(term, Pulled) and term.is_rearranged:
        term = term.term
    return _ask(functions, _of_norms, term)


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
