"""Products of matrices, as sums over labelled axes.

Guarantees: MatMul, BatchMatMul and Einsum are one operation here, whose labels are read from
the graph; the core's rules say the rest.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from cabs.gradients.contraction import Contraction
from cabs.gradients.layout import Layout, MixedError
from cabs.gradients.terms import Term
from cabs_tensorflow.graph.symbolic_shapes import Sizes
from cabs_tensorflow.norms.arrays import ARRAYS
from cabs_tensorflow.rules.layout import Batch

PRODUCTS = frozenset("BatchMatMul BatchMatMulV2 BatchMatMulV3 Einsum MatMul".split())


def contraction_of(operation: Any, sizes: Sizes) -> Contraction:
    """Return what an operation sums over."""
    shapes = [sizes.shape(one) for one in operation.inputs]
    if operation.type == "Einsum":
        return Contraction.of_einsum(operation.get_attr("equation").decode(), shapes)
    names = ("transpose_a", "transpose_b") if operation.type == "MatMul" else ("adj_x", "adj_y")
    return Contraction.of_matrices(shapes, [operation.get_attr(name) for name in names])


def carry(operation: Any, sizes: Sizes, layout: Layout, index: int) -> Layout | None:
    """Return where the examples lie in an operand, None if it is the same for all of them."""
    shape = sizes.shape(operation.inputs[index])
    return contraction_of(operation, sizes).carried(layout, index, shape)


def term(
    operation: Any, sizes: Sizes, batch: Batch, layout: Layout, index: int, cotangent: Any
) -> Term:
    """Return the gradients of an operand that is the same for all examples."""
    found = contraction_of(operation, sizes)
    sides = found.sides(index, sizes.shape(operation.inputs[index]))
    other = operation.inputs[1 - index]
    place = found.carried(layout, 1 - index, sizes.shape(other))
    if place is None:
        raise MixedError("has no operand that holds the examples")
    taken = batch.take(other, place)
    if sides.summed:
        taken = tf.reduce_sum(taken, axis=[1 + axis for axis in sides.summed])
    return sides.product(ARRAYS, taken, batch.take(cotangent, layout))
