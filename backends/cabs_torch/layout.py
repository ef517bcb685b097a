"""Where the examples of a batch lie in the tensors of an autograd graph.

Guarantees: a position is derived from the operations between a tensor and the losses, never
guessed from its shape; an operation that mixes examples, or that is not known here, is said to be
so. Reads the graph only, no tensor's values.

In row-major order the elements of a tensor that holds a batch of m examples are numbered by
(outer, example, inner). How many values ``outer`` takes is all that has to be known besides the
shape; a reshape leaves it as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

Node: TypeAlias = Any
"""A node of the autograd graph; what else it has depends on its operation."""

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """A tensor's shape, and how many blocks of m examples, at least two, lie one after another."""

    shape: Shape
    outer: int
    examples: int

    @property
    def inner(self) -> int:
        """How many elements of a block belong to one example."""
        return math.prod(self.shape) // (self.outer * self.examples)

    def axis(self) -> tuple[int, int]:
        """Return the axis that holds the examples, and the part of ``outer`` that lies in it.

        Raises:
            MixedError: If the examples are spread over several axes.
        """
        before = 1
        for axis, size in enumerate(self.shape):
            if self.outer < before * size:
                inside = self.outer // before
                if before * inside == self.outer and size % (inside * self.examples) == 0:
                    return axis, inside
                break
            before *= size
        raise MixedError("spreads the examples over several axes")

    def moved(self, shape: Shape, axis: int) -> Layout:
        """Return the layout of a tensor that holds the examples in the same way in ``axis``."""
        here, inside = self.axis()
        if shape[axis] != self.shape[here]:
            raise MixedError("changes the axis that holds the examples")
        return Layout(shape, math.prod(shape[:axis]) * inside, self.examples)


class MixedError(Exception):
    """An operation whose gradient does not belong to one example at a time; says how."""


def shape_of(node: Node, index: int) -> Shape:
    """Return the shape of a node's ``index``-th output in the forward pass."""
    return tuple(node._input_metadata[index].shape)


def name_of(node: Node) -> str:
    """Return the operation's name without the suffix that autograd adds.

    A function of a user's own may be called Relu and do something else; its node, ReluBackward,
    has no number at its end, and keeps its whole name.
    """
    return _name_of(node.name())


@cache
def _name_of(name: str) -> str:
    found = re.fullmatch(r"(\w+)Backward\d+", name)
    return found[1] if found else name


def of_input(node: Node, layout: Layout, index: int) -> Layout | None:
    """Return the layout of a node's ``index``-th input, given that of its output.

    None if that input is broadcast over the examples, so that it is no example's own.

    Raises:
        MixedError: If the operation mixes examples, or is not known.
    """
    find = _RULES.get(name_of(node))
    if find is None:
        raise MixedError("is an operation without a rule")
    return find(node, layout, shape_of(*node.next_functions[index]))


def _elementwise(node: Node, layout: Layout, shape: Shape) -> Layout | None:  # noqa: ARG001
    axis, _ = layout.axis()
    aligned = axis - (len(layout.shape) - len(shape))
    if aligned < 0 or shape[aligned] != layout.shape[axis]:
        return None
    return layout.moved(shape, aligned)


def _reshape(node: Node, layout: Layout, shape: Shape) -> Layout:  # noqa: ARG001
    return layout._replace(shape=shape)


def _permute(node: Node, layout: Layout, shape: Shape) -> Layout:
    axis, _ = layout.axis()
    return layout.moved(shape, permutation(node, len(shape))[axis])


def permutation(node: Node, rank: int) -> list[int]:
    """Return which axis of its input each axis of a transposing node's output is."""
    order = list(range(rank))
    name = name_of(node)
    if name == "Permute":
        return _axes(node._saved_dims, rank)
    if name == "T":
        return order[::-1]
    one, two = _axes((node._saved_dim0, node._saved_dim1), rank)
    order[one], order[two] = order[two], order[one]
    return order


def _within(*saved: str) -> Callable[[Node, Layout, Shape], Layout]:
    """Return the rule of operations along the axes in their attribute ``saved``."""

    def find(node: Node, layout: Layout, shape: Shape) -> Layout:
        axis, _ = layout.axis()
        along = next(getattr(node, name) for name in saved if hasattr(node, name))
        if axis in _axes(along, len(shape)):
            raise MixedError("runs along the axis that holds the examples")
        return layout.moved(shape, axis)

    return find


def _reduce(node: Node, layout: Layout, shape: Shape) -> Layout:
    axis, _ = layout.axis()
    reduced = _axes(node._saved_dim, len(shape))
    if len(layout.shape) < len(shape):
        kept = [position for position in range(len(shape)) if position not in reduced]
        return layout.moved(shape, kept[axis])
    return layout.moved(shape, axis)


def _spatial(rank: int) -> Callable[[Node, Layout, Shape], Layout]:
    """Return the rule of operations that mix the last ``rank`` axes only."""

    def find(node: Node, layout: Layout, shape: Shape) -> Layout:  # noqa: ARG001
        axis, _ = layout.axis()
        if axis >= len(shape) - rank:
            raise MixedError("runs along the axis that holds the examples")
        return layout.moved(shape, axis)

    return find


def _padded(node: Node, layout: Layout, shape: Shape) -> Layout:
    return _spatial(len(node._saved_pad) // 2)(node, layout, shape)


def _class_loss(node: Node, layout: Layout, shape: Shape) -> Layout:
    # From (m, classes, ...) to (m, ...), one target each.
    axis, _ = layout.axis()
    if axis != 0 or node._saved_reduction != 0:
        raise MixedError("runs along the axis that holds the examples")
    return layout.moved(shape, 0)


def _axes(saved: int | Sequence[int], rank: int) -> list[int]:
    """Return axes as autograd saves them, where -1 can read 2**64 - 1, as indices from 0."""
    axes = [saved] if isinstance(saved, int) else list(saved)
    return [(axis - 2**64 if axis >= 2**63 else axis) % max(rank, 1) for axis in axes]


_ELEMENTWISE = """
    Abs Add BinaryCrossEntropy BinaryCrossEntropyWithLogits Celu Clamp ClampMax ClampMin Clone Cos
    Div Elu Erf Exp Expm1 Gelu Hardsigmoid Hardswish Hardtanh HuberLoss LeakyRelu Log Log1P
    LogSigmoid Maximum Minimum Mish MseLoss Mul NativeDropout Neg Pow Reciprocal Relu Rsqrt Rsub
    Selu Sigmoid Silu Sin SmoothL1Loss Softplus Sqrt Sub Tanh Threshold ToCopy Where
""".split()
_RESHAPING = "Alias ReshapeAlias Squeeze UnsafeView Unsqueeze View".split()
_PERMUTING = "Permute T Transpose".split()

_Rule = Callable[[Any, Layout, Shape], Layout | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_RESHAPING, _reshape),
    **dict.fromkeys(_PERMUTING, _permute),
    **dict.fromkeys(("LogSoftmax", "Softmax", "Cat", "Gather"), _within("_saved_dim")),
    **dict.fromkeys(("Amax", "Logsumexp", "Mean", "Sum"), _reduce),
    **dict.fromkeys(("NllLoss", "NllLoss2D"), _class_loss),
    **dict.fromkeys(("MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D"), _spatial(2)),
    **dict.fromkeys(("MaxPool3DWithIndices", "AvgPool3D", "AdaptiveAvgPool3D"), _spatial(3)),
    **{
        f"{kind}Pad{rank}D": _spatial(rank)
        for kind in ("Reflection", "Replication")
        for rank in (1, 2, 3)
    },
    "ConstantPadNd": _padded,
}

REARRANGING = frozenset({*_RESHAPING, *_PERMUTING, "Clone", "ToCopy"})
"""Operations that move or cast a tensor's elements and keep the sum of their squares."""
