"""Products of matrices, as sums over labelled axes.

Guarantees: MatMul, BatchMatMul and Einsum are one operation here, with one rule for where the
examples lie and one for the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from cabs.gradients.layout import Layout, MixedError, Shape
from cabs.gradients.terms import Product, Term
from cabs_tensorflow.graph.symbolic_shapes import Sizes
from cabs_tensorflow.norms.reductions import sizes_of
from cabs_tensorflow.rules.layout import Batch

PRODUCTS = frozenset("BatchMatMul BatchMatMulV2 BatchMatMulV3 Einsum MatMul".split())

Labels = tuple[object, ...]


class Contraction(NamedTuple):
    """The labels of the operands' axes and of the output's; what that lacks is summed over."""

    operands: tuple[Labels, ...]
    output: Labels


def contraction_of(operation: Any, sizes: Sizes) -> Contraction:
    """Return what an operation sums over."""
    shapes = [sizes.shape(one) for one in operation.inputs]
    if operation.type == "Einsum":
        return _einsum(operation.get_attr("equation").decode(), shapes)
    names = ("transpose_a", "transpose_b") if operation.type == "MatMul" else ("adj_x", "adj_y")
    turned = [operation.get_attr(name) for name in names]
    first = ("row", "sum") if not turned[0] else ("sum", "row")
    second = ("sum", "column") if not turned[1] else ("column", "sum")
    ahead = max(map(len, shapes)) - 2
    operands: list[Labels] = []
    for shape, last in zip(shapes, (first, second), strict=True):
        skipped = ahead - (len(shape) - 2)
        wide = [
            at + skipped
            if size > 1 or all(_size(other, at + skipped, ahead) == 1 for other in shapes)
            # An axis of length one that is broadcast is this operand's own.
            else ("single", len(operands), at)
            for at, size in enumerate(shape[:-2])
        ]
        operands.append((*wide, *last))
    return Contraction(tuple(operands), (*range(ahead), "row", "column"))


def _size(shape: Shape, at: int, ahead: int) -> int:
    """Return the size of one of the axes ahead of the matrices, counted from the longest shape."""
    skipped = ahead - (len(shape) - 2)
    return 1 if at < skipped else shape[at - skipped]


def _einsum(equation: str, shapes: Sequence[Shape]) -> Contraction:
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
    return Contraction(operands, output)


def carry(operation: Any, sizes: Sizes, layout: Layout, index: int) -> Layout | None:
    """Return where the examples lie in an operand, None if it is the same for all of them."""
    found = contraction_of(operation, sizes)
    axis, _ = layout.axis()
    label = found.output[axis]
    if label not in found.operands[index]:
        return None
    shape = sizes.shape(operation.inputs[index])
    return layout.moved(shape, found.operands[index].index(label))


def term(
    operation: Any, sizes: Sizes, batch: Batch, layout: Layout, index: int, cotangent: Any
) -> Term:
    """Return the gradients of an operand that is the same for all examples."""
    found = contraction_of(operation, sizes)
    if len(operation.inputs) != 2:
        raise MixedError("takes a number of operands for which there is no rule")
    other = operation.inputs[1 - index]
    place = carry(operation, sizes, layout, 1 - index)
    if place is None:
        raise MixedError("has no operand that holds the examples")
    mine, theirs, output = found.operands[index], found.operands[1 - index], found.output
    shape = sizes.shape(operation.inputs[index])
    for axis, label in enumerate(mine):
        if label not in theirs and label not in output and shape[axis] > 1:
            raise MixedError("sums over an axis of the parameter alone")
    blocks = [one for one in mine if one in theirs and one in output]
    rows = [one for one in mine if one in theirs and one not in output]
    columns = [one for one in mine if one not in theirs and one in output]
    length = [one for one in theirs if one not in mine and one in output]
    # What the other operand alone is summed over, and what was broadcast to it.
    alone = [axis for axis, one in enumerate(theirs) if one not in mine and one not in output]
    taken = batch.take(other, place)
    if alone:
        taken = tf.reduce_sum(taken, axis=[1 + axis for axis in alone])
        theirs = tuple(one for axis, one in enumerate(theirs) if axis not in alone)
    left = _arranged(batch, taken, theirs, (blocks, length, rows))
    right = _arranged(batch, batch.take(cotangent, layout), output, (blocks, length, columns))
    where = [tuple(map(mine.index, some)) for some in (blocks, rows, columns)]
    return Product(left, right, shape, *where)


def _arranged(batch: Batch, taken: Any, labels: Labels, groups: Sequence[Sequence[object]]) -> Any:
    """Return examples' parts with their axes in groups, each of which becomes one axis."""
    order = [labels.index(one) for group in groups for one in group]
    if order != sorted(order):
        taken = tf.transpose(taken, [0, *(1 + axis for axis in order)])
    left = iter(sizes_of(taken)[1:])
    return tf.reshape(taken, [batch.taken, *(math.prod(next(left) for _ in one) for one in groups)])
