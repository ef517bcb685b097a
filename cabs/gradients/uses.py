"""All that is made of a parameter: its uses, and what lies between it and a use.

Guarantees: the gradients of all uses are added before they are squared, whatever lies between:
from their factors where all meet the parameter as a matrix or as a table, else materialized, some
examples at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from cabs.gradients import shared_weights
from cabs.gradients.arrays import Array, Arrays, Squares, SummingArrays
from cabs.gradients.layout import Shape
from cabs.gradients.terms import Lookup, Product, Term


@dataclass(frozen=True)
class Pulled:
    """Gradients of what was made of a parameter, pulled back to the parameter.

    Args:
        term: Those of what was made.
        pull: From these, shape (n, *term.shape), to the parameter's, (n, *shape).
        shape: The parameter's.
        is_rearranged: Whether it was only rearranged or cut, so that squared norms are the same,
            and ``pull`` serves squares of elements, too: it keeps their signs, and their type.
        how: How it was rearranged; two that have the same were rearranged alike. None if that is
            not known.
        part: What cut it into parts that do not overlap, and which of them this is; None if it was
            not.
    """

    term: Any
    pull: Callable[[Array], Array]
    shape: Shape
    is_rearranged: bool = False
    how: object = None
    part: tuple[object, int] | None = None

    @property
    def operands(self) -> tuple[Array, ...]:
        """What the gradients are made of, with the examples in front."""
        operands: tuple[Array, ...] = self.term.operands
        return operands

    def gradient(self, arrays: Any, *operands: Array) -> Array:
        """Return the gradients of some examples, shape (n, *shape), from their operands."""
        return self.pull(self.term.gradient(arrays, *operands))

    def squares(self, arrays: Any) -> Squares:
        """Return the squared norms of all examples' gradients."""
        return total_squares(arrays, [self])

    def coordinate_squares(self, arrays: Any) -> Array:
        """Return the sum over examples of the gradients' elementwise squares, (1, *shape)."""
        return coordinate_squares(arrays, [self])


def total_squares(arrays: Arrays, uses: Sequence[Term]) -> Squares:
    """Return |g_i|^2 of the sum over the uses of a parameter."""
    inner = _of_what_was_made(uses)
    if inner is not None:
        return total_squares(arrays, inner)
    if len(uses) == 1 and not isinstance(uses[0], Pulled):
        return uses[0].squares(arrays)
    parts = _by_part(uses)
    if parts is not None:
        first, *more = (total_squares(arrays, some) for some in parts)
        return sum(more, first)
    found = _from_factors(arrays, uses)
    if found is not None:
        return found

    def some(*operands: Array) -> Squares:
        return arrays.squares(gradient(arrays, uses, *operands))

    return arrays.in_chunks(some, operands_of(uses), 2 * math.prod(uses[0].shape))


def coordinate_squares(arrays: SummingArrays, uses: Sequence[Any]) -> Array:
    """Return the sum over examples of the elementwise squares of the same, (1, *shape)."""
    inner = _of_what_was_made(uses)
    if inner is not None:
        pulled: Array = uses[0].pull(coordinate_squares(arrays, inner))
        return pulled
    parts = _by_part(uses)
    if parts is not None:
        first, *more = (coordinate_squares(arrays, some) for some in parts)
        return sum(more, first)
    one = uses[0] if len(uses) == 1 else as_one(arrays, uses)
    if one is not None and not isinstance(one, Pulled):
        found: Array = one.coordinate_squares(arrays)
        return found
    rows, needed = partial(gradient, arrays, uses), 2 * math.prod(uses[0].shape)
    return arrays.coordinate_squares(rows, operands_of(uses), needed)[0]


def operands_of(uses: Sequence[Term]) -> list[Array]:
    """Return what the gradients of all uses are made of, with the examples in front."""
    return [operand for use in uses for operand in use.operands]


def gradient(arrays: Any, uses: Sequence[Term], *operands: Array) -> Array:
    """Return the gradients of some examples, the sums over the uses, from their operands."""
    left = iter(operands)
    first, *more = (use.gradient(arrays, *islice(left, len(use.operands))) for use in uses)
    return sum(more, first)


def _of_what_was_made(uses: Sequence[Term]) -> list[Term] | None:
    """Return the uses of what was made of a parameter, if all rearranged it in the same way."""
    made = [use for use in uses if isinstance(use, Pulled) and use.is_rearranged]
    ways = {use.how for use in made}
    is_alike = len(uses) == 1 or (len(ways) == 1 and None not in ways)
    return [use.term for use in made] if len(made) == len(uses) and is_alike else None


def _by_part(uses: Sequence[Term]) -> list[list[Term]] | None:
    """Return the uses by which part of a parameter they are of, if one operation cut it."""
    found: dict[object, list[Term]] = {}
    for use in uses:
        found.setdefault(use.part if isinstance(use, Pulled) else None, []).append(use)
    cuts = {part[0] for part in found if isinstance(part, tuple)}
    return [*found.values()] if len(found) > 1 and None not in found and len(cuts) == 1 else None


def _from_factors(arrays: Arrays, uses: Sequence[Term]) -> Squares | None:
    """Return |g_i|^2 from the factors of all uses, None if there is one that has none."""
    kinds = _by_kind(uses)
    if kinds is None:
        return None
    products, taken = kinds
    return shared_weights.squares(
        arrays,
        [(one.left, one.right) for one in products],
        [(one.ids, one.rows) for one in taken],
        uses[0].shape[0],
    )


def as_one(arrays: Arrays, terms: Sequence[Term]) -> Product | Lookup | None:
    """Return the sum of terms as one of their kind, None if there is none."""
    products, taken = _by_kind(terms) or ([], [])
    if products and not taken:
        sides = shared_weights.joined(arrays, [(one.left, one.right) for one in products], 2)
        return replace(products[0], left=sides[0], right=sides[1])
    if taken and not products:
        return Lookup(
            *shared_weights.joined(arrays, [(one.ids, one.rows) for one in taken], 1),
            taken[0].shape,
        )
    return None


def _by_kind(terms: Sequence[Term]) -> tuple[list[Product], list[Lookup]] | None:
    """Return the uses as a matrix and those as a table, all in the same order of sides.

    None if there are others, or their sides differ.
    """
    taken = [term for term in terms if isinstance(term, Lookup)]
    products = [term for term in terms if isinstance(term, Product)]
    if len(taken) + len(products) < len(terms):
        return None
    # Lookups decide which side is left.
    first = (0,) if taken else products[0].rows
    products = [one if one.rows == first else one.turned() for one in products]
    kinds = {(one.blocks, one.rows, one.columns, one.shape) for one in products}
    kinds |= {((), (0,), tuple(range(1, len(one.shape))), one.shape) for one in taken}
    return (products, taken) if len(kinds) == 1 else None
