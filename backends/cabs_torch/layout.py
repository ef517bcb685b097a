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


def is_measurable(node: Node, index: int) -> bool:
    """Return whether a node's ``index``-th output holds real numbers, one at least."""
    described = node._input_metadata[index]
    return described.dtype.is_floating_point and 0 not in described.shape


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
    return layout.moved(shape, _permutation(node, len(shape))[axis])


def _permutation(node: Node, rank: int) -> list[int]:
    """Return which axis of its input each axis of a transposing node's output is."""
    order = list(range(rank))
    name = name_of(node)
    if name == "Permute":
        return _axes(node._saved_dims, rank)
    if name == "T":
        return order[::-1]
    one, two = _axes([node._saved_dim0, node._saved_dim1], rank)
    order[one], order[two] = order[two], order[one]
    return order


def _within(node: Node, layout: Layout, shape: Shape) -> Layout:
    axis, _ = layout.axis()
    if axis in _saved_axes(node, len(shape)):
        raise along_examples()
    return layout.moved(shape, axis)


def _reduce(node: Node, layout: Layout, shape: Shape) -> Layout:
    axis, _ = layout.axis()
    if len(layout.shape) < len(shape):
        reduced = _saved_axes(node, len(shape))
        axis = [position for position in range(len(shape)) if position not in reduced][axis]
    return layout.moved(shape, axis)


def _stack(node: Node, layout: Layout, shape: Shape) -> Layout:
    axis, _ = layout.axis()
    (added,) = _saved_axes(node, len(layout.shape))
    if axis == added:
        raise along_examples()
    return layout.moved(shape, axis - (axis > added))


def _spatial(rank: int) -> Callable[[Node, Layout, Shape], Layout]:
    """Return the rule of operations that mix the last ``rank`` axes only."""

    def find(node: Node, layout: Layout, shape: Shape) -> Layout:  # noqa: ARG001
        axis, _ = layout.axis()
        if axis >= len(shape) - rank:
            raise along_examples()
        return layout.moved(shape, axis)

    return find


def _padded(node: Node, layout: Layout, shape: Shape) -> Layout:
    return _spatial(len(node._saved_pad) // 2)(node, layout, shape)


def _class_loss(node: Node, layout: Layout, shape: Shape) -> Layout:
    # From (m, classes, ...) to (m, ...), one target each.
    if layout.axis()[0] != 0 or node._saved_reduction != 0:
        raise along_examples()
    return layout.moved(shape, 0)


def along_examples() -> MixedError:
    """Return the error for an operation that runs along the examples' axis."""
    return MixedError("runs along the axis that holds the examples")


def _saved_axes(node: Node, rank: int) -> list[int]:
    """Return the axes along which an operation runs; all of them if it saved none."""
    saved = getattr(node, "_saved_dims", getattr(node, "_saved_dim", None))
    if saved is None:
        return list(range(rank))
    return _axes([saved] if isinstance(saved, int) else saved, rank)


def _axes(saved: Sequence[int], rank: int) -> list[int]:
    """Return axes as autograd saves them, where -1 can read 2**64 - 1, as indices from 0."""
    return [(axis - 2**64 if axis >= 2**63 else axis) % max(rank, 1) for axis in saved]


_ELEMENTWISE = """
    Abs Addcdiv Addcmul Atan Atan2 BinaryCrossEntropy BinaryCrossEntropyWithLogits Celu Clamp
    ClampMax ClampMin Clone Cos Cosh Div Elu Erf Exp Exp2 Expm1 Gelu Hardshrink Hardsigmoid
    Hardswish Hardtanh HuberLoss LeakyRelu Lerp Log Log10 Log1P Log2 LogSigmoid Logaddexp
    MaskedFill Maximum Minimum Mish MseLoss Mul NanToNum NativeDropout Neg Pow Reciprocal Relu
    RreluWithNoise Rsqrt Rsub Selu Sigmoid Silu Sin Sinh SmoothL1Loss SoftMarginLoss Softplus
    Softshrink Sqrt Tanh Threshold ToCopy Where Xlogy
""".split()
_RESHAPING = "Alias ReshapeAlias Squeeze UnsafeView Unsqueeze View".split()
_PERMUTING = "Permute T Transpose".split()
_ALONG = """
    Cat Cumsum Flip Gather Glu LogSoftmax Slice Softmax Split SplitWithSizes
""".split()
_REDUCING = """
    Amax Amin LinalgVectorNorm Logsumexp Max Mean Min Prod Select Std Sum Unbind Var
""".split()
_PLANAR = """
    AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool2D MaxPool2DWithIndices UpsampleBilinear2D
    UpsampleNearest2D
""".split()

ADDING = frozenset({"Add", "Expand", "Sub"})
"""Operations whose gradient for a broadcast input is a sum of the output's, up to a factor."""

_Rule = Callable[[Any, Layout, Shape], Layout | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys((*ADDING, *_ELEMENTWISE), _elementwise),
    **dict.fromkeys(_RESHAPING, _reshape),
    **dict.fromkeys(_PERMUTING, _permute),
    **dict.fromkeys(_ALONG, _within),
    **dict.fromkeys(_REDUCING, _reduce),
    **dict.fromkeys(_PLANAR, _spatial(2)),
    **dict.fromkeys(("AdaptiveAvgPool3D", "AvgPool3D", "MaxPool3DWithIndices"), _spatial(3)),
    **{f"ReflectionPad{rank}D": _spatial(rank) for rank in (1, 2, 3)},
    **{f"ReplicationPad{rank}D": _spatial(rank) for rank in (1, 2, 3)},
    **dict.fromkeys(("NllLoss", "NllLoss2D"), _class_loss),
    "ConstantPadNd": _padded,
    "PixelShuffle": _spatial(3),
    "Stack": _stack,
}

REARRANGING = frozenset({*_RESHAPING, *_PERMUTING, "Clone", "ToCopy"})
"""Operations that move or cast a tensor's elements and keep the sum of their squares."""
