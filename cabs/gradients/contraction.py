"""Products of matrices, as sums over labelled axes.

Guarantees: products of matrices, of stacks of them, and einsums are one operation here, with one
rule for where the examples lie and one for the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from cabs.gradients.arrays import Array, PatchArrays
from cabs.gradients.layout import Layout, MixedError, Shape
from cabs.gradients.terms import Product

Labels = tuple[object, ...]


class Contraction(NamedTuple):
    """The labels of the operands' axes and of the output's; what that lacks is summed over.

    Example:
        >>> Contraction.of_einsum("tk,kh->th", [(5, 2), (2, 3)])
        Contraction(operands=(('t', 'k'), ('k', 'h')), output=('t', 'h'))
    """

    operands: tuple[Labels, ...]
    output: Labels

    @classmethod
    def of_einsum(cls, equation: str, shapes: Sequence[Shape]) -> Contraction:
        """Return what ``equation`` sums over, for operands of some shapes.

        Raises:
            MixedError: If it takes a diagonal, or broadcasts an axis that has a label.
        """
        before, _, after = equation.replace(" ", "").partition("->")
        ranks = [
            len(shape) - len(term.replace("...", ""))
            for term, shape in zip(before.split(","), shapes, strict=True)
        ]
        widest = max(ranks, default=0)

        def labels(term: str, rank: int) -> Labels:
            if "..." not in term:
                return tuple(term)
            left, _, right = term.partition("...")
            return (*left, *range(widest - rank, widest), *right)

        operands = tuple(
            labels(term, rank) for term, rank in zip(before.split(","), ranks, strict=True)
        )
        output = labels(after, widest)
        for one in (*operands, output):
            if len(set(one)) < len(one):
                raise MixedError("takes a diagonal")
        sizes: dict[object, int] = {}
        for one, shape in zip(operands, shapes, strict=True):
            for label, size in zip(one, shape, strict=True):
                if sizes.setdefault(label, size) != size:
                    raise MixedError("broadcasts an axis of length one")
        return cls(operands, output)

    @classmethod
    def of_matrices(cls, shapes: Sequence[Shape], is_turned: Sequence[bool]) -> Contraction:
        """Return what a product of two stacks of matrices sums over, some of them transposed.

        The axes ahead of the matrices' are broadcast.
        """
        first = ("sum", "row") if is_turned[0] else ("row", "sum")
        second = ("column", "sum") if is_turned[1] else ("sum", "column")
        ahead = max(map(len, shapes)) - 2

        def size(shape: Shape, at: int) -> int:
            skipped = ahead - (len(shape) - 2)
            return 1 if at < skipped else shape[at - skipped]

        operands: list[Labels] = []
        for shape, last in zip(shapes, (first, second), strict=True):
            skipped = ahead - (len(shape) - 2)
            wide = [
                at
                if size(shape, at) > 1 or all(size(other, at) == 1 for other in shapes)
                # An axis of length one that is broadcast is this operand's own.
                else ("single", len(operands), at)
                for at in range(skipped, ahead)
            ]
            operands.append((*wide, *last))
        return cls(tuple(operands), (*range(ahead), "row", "column"))

    def carried(self, layout: Layout, index: int, shape: Shape) -> Layout | None:
        """Return where the examples lie in an operand, None if it is the same for all of them.

        Args:
            layout: Where they lie in the output.
            index: Which operand.
            shape: Its shape.
        """
        label = self.output[layout.axis()[0]]
        mine = self.operands[index]
        return layout.moved(shape, mine.index(label)) if label in mine else None

    def sides(self, index: int, shape: Shape) -> Sides:
        """Return how the gradients of an operand of some shape follow.

        Raises:
            MixedError: If it is one of more than two, or is summed over an axis of its own.
        """
        if len(self.operands) != 2:
            raise MixedError("takes a number of operands for which there is no rule")
        mine, theirs, output = self.operands[index], self.operands[1 - index], self.output
        for axis, label in enumerate(mine):
            if label not in theirs and label not in output and shape[axis] > 1:
                raise MixedError("sums over an axis of the parameter alone")
        return Sides(mine, theirs, output, shape)


class Sides:
    """The two factors of an operand's gradients: the other operand, and the output's cotangent.

    Args:
        mine: The labels of the operand's axes.
        theirs: Those of the other's.
        output: Those of the output's.
        shape: The operand's shape.
    """

    def __init__(self, mine: Labels, theirs: Labels, output: Labels, shape: Shape) -> None:
        self._mine, self._theirs, self._output, self._shape = mine, theirs, output, shape
        self._blocks = [one for one in mine if one in theirs and one in output]
        self._rows = [one for one in mine if one in theirs and one not in output]
        self._columns = [one for one in mine if one not in theirs and one in output]
        self._length = [one for one in theirs if one not in mine and one in output]

    @cached_property
    def summed(self) -> list[int]:
        """The axes that the other operand alone has, over which it is to be summed first."""
        known = (*self._mine, *self._output)
        return [axis for axis, label in enumerate(self._theirs) if label not in known]

    def product(self, arrays: PatchArrays, other: Array, cotangent: Array) -> Product:
        """Return the gradients, from the examples' parts of the other operand and the cotangent.

        Args:
            arrays: The framework's array operations.
            other: Shape (n, ...), summed over ``summed``.
            cotangent: Shape (n, ...).
        """
        theirs = [one for axis, one in enumerate(self._theirs) if axis not in self.summed]
        blocks, length = self._blocks, self._length
        where = (tuple(map(self._mine.index, one)) for one in (blocks, self._rows, self._columns))
        return Product(
            _arranged(arrays, other, theirs, (blocks, length, self._rows)),
            _arranged(arrays, cotangent, self._output, (blocks, length, self._columns)),
            self._shape,
            *where,
        )


def _arranged(
    arrays: PatchArrays, parts: Array, labels: Sequence[object], groups: Sequence[Sequence[object]]
) -> Array:
    """Return examples' parts with their axes in groups, each of which becomes one axis."""
    order = [labels.index(label) for group in groups for label in group]
    if order != sorted(order):
        parts = arrays.transpose(parts, order)
    left = iter(arrays.sizes(parts)[1:])
    return arrays.reshape(parts, [math.prod(next(left) for _ in group) for group in groups])
