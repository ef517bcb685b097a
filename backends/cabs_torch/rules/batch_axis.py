"""Where the examples lie in an operation's input, given where they lie in its output.

Guarantees: derived from what the operation does, never guessed from shapes; an operation that mixes
examples is said to do so, and one that is not known here is said to be unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from cabs.gradients.layout import Layout, MixedError, Shape, along_examples
from cabs_torch.errors import UnknownError
from cabs_torch.graph.autograd_nodes import Node, axes, name_of, saved_axes, shape_of, signed
from cabs_torch.tracing import is_traced


def of_input(node: Node, output: int, layout: Layout, index: int, shape: Shape) -> Layout | None:
    """Return the layout of a node's ``index``-th input, of a shape, given that of an output.

    None if that input is broadcast over the examples, so that it is no example's own.

    Raises:
        MixedError: If the operation mixes examples.
        UnknownError: If the operation has no rule.
    """
    if name_of(node) in ("CudnnRnn", "MkldnnRnnLayer"):
        return _recurrent(node, layout, index, shape)
    if name_of(node) in _SPLITTING:
        return _split(node, output, layout, shape)
    if name_of(node) == "Cat":
        return _joined(node, layout, index, shape)
    find = _RULES.get(name_of(node))
    if find is None:
        raise UnknownError
    return find(node, layout, shape)


def permutation(node: Node, rank: int) -> list[int]:
    """Return which axis of its input each axis of a transposing node's output is."""
    order = list(range(rank))
    name = name_of(node)
    if name == "Permute":
        return axes(node._saved_dims, rank)
    if name == "T":
        return order[::-1]
    one, two = axes([node._saved_dim0, node._saved_dim1], rank)
    order[one], order[two] = order[two], order[one]
    return order


def _repeat(node: Node, layout: Layout, shape: Shape) -> Layout | None:  # noqa: ARG001
    axis, inside = layout.axis()
    aligned = axis - (len(layout.shape) - len(shape))
    size = shape[aligned] if aligned >= 0 else 1
    batch = layout.shape[axis] // inside
    if size % batch == 0:
        # Whole batches were repeated.
        outer = math.prod(shape[:aligned]) * (size // batch)
        return Layout(shape, outer, layout.examples)
    if batch // layout.examples % size:
        raise MixedError("repeats the axis that holds the examples")
    return None


def _reshape(node: Node, layout: Layout, shape: Shape) -> Layout:  # noqa: ARG001
    return layout.reshaped(shape)


def _permute(node: Node, layout: Layout, shape: Shape) -> Layout:
    return layout.permuted(shape, permutation(node, len(shape)))


def _within(node: Node, layout: Layout, shape: Shape) -> Layout:
    run = saved_axes(node, len(shape))
    if name_of(node) in ("Gather", "IndexSelect") and layout.axis()[0] in run:
        # Rows that were picked may come from a parameter, and are tried out.
        raise UnknownError
    return layout.within(shape, run)


def _split(node: Node, output: int, layout: Layout, shape: Shape) -> Layout:
    # Part of an axis was taken. Where that is the examples', as when pairs go through a model in
    # one pass, every example must come once for each block of the axis.
    axis, _ = layout.axis()
    (cut,) = axes([node._saved_dim], len(shape))
    if axis != cut:
        return layout.moved(shape, axis)
    length, whole, step = layout.shape[axis], shape[axis], 1
    if name_of(node) == "Slice":
        ends = signed(node._saved_start), signed(node._saved_end)
        start, _, step = slice(*ends, node._saved_step).indices(whole)
    else:
        sizes = getattr(node, "_saved_split_sizes", None)
        start = sum(sizes[:output]) if sizes else output * node._saved_split_size
    if step == 1:
        return layout.blocks(shape, axis, start, whole)
    if whole == step * length:
        # Every example's elements are followed by others of its own.
        return layout._replace(shape=shape)
    raise along_examples()


def _joined(node: Node, layout: Layout, index: int, shape: Shape) -> Layout:
    # The same the other way round: inputs that lie one after another along an axis.
    axis, _ = layout.axis()
    (cut,) = axes([node._saved_dim], len(shape))
    if axis != cut:
        return layout.moved(shape, axis)
    edges = node.next_functions
    known = [edge[0] is not None for edge in edges]
    sizes = [shape_of(edge)[axis] if edge[0] is not None else 0 for edge in edges]
    if all(known[:index]):
        start = sum(sizes[:index])
    elif all(known[index:]):
        start = layout.shape[axis] - sum(sizes[index:])
    else:
        # Inputs without a graph, whose sizes are not known, lie on both sides.
        raise along_examples()
    return layout.blocks(shape, axis, start, shape[axis])


def _index(node: Node, layout: Layout, shape: Shape) -> Layout:
    indices = node._saved_indices
    indexed = [place for place, index in enumerate(indices) if index is not None]
    given = [indices[place] for place in indexed]
    if any(index.dtype in (torch.bool, torch.uint8) for index in given):
        raise UnknownError
    joint = torch.broadcast_shapes(*(index.shape for index in given))
    # The axes of what was looked up stand where the indexed ones were, or, if those did not lie
    # side by side, in front.
    is_adjacent = indexed[-1] - indexed[0] + 1 == len(indexed)
    first = indexed[0] if is_adjacent else 0
    kept = [axis for axis in range(len(shape)) if axis not in indexed]
    origin: list[int | None] = [*kept]
    origin[first:first] = [None] * len(joint)
    axis, _ = layout.axis()
    found = origin[axis]
    if found is not None:
        return layout.moved(shape, found)
    if is_traced():
        raise UnknownError
    if axis == 0 and indexed[0] == 0 and layout.shape[0] == shape[0] == layout.examples:
        # Something was taken from each example, if the values of the indices say so.
        rows = given[0].broadcast_to(joint).reshape(layout.examples, -1)
        if bool((rows == torch.arange(layout.examples, device=rows.device)[:, None]).all()):
            return layout.moved(shape, 0)
    raise UnknownError


def _reduce(node: Node, layout: Layout, shape: Shape) -> Layout:
    if len(layout.shape) == len(shape):
        return layout.moved(shape, layout.axis()[0])
    return layout.reduced(shape, saved_axes(node, len(shape)))


def _stack(node: Node, layout: Layout, shape: Shape) -> Layout:
    (added,) = saved_axes(node, len(layout.shape))
    return layout.stacked(shape, added)


def _unfold(node: Node, layout: Layout, shape: Shape) -> Layout:
    # The patches along an axis, whose elements get an axis of their own at the end.
    return layout.within(shape, (len(shape), *axes([node._saved_dimension], len(shape))))


def _spatial(rank: int) -> Callable[[Node, Layout, Shape], Layout]:
    """Return the rule of operations that mix the last ``rank`` axes only."""
    return lambda node, layout, shape: layout.trailing(shape, rank)  # noqa: ARG005


def _padded(node: Node, layout: Layout, shape: Shape) -> Layout:
    return layout.trailing(shape, len(node._saved_pad) // 2)


def _class_loss(node: Node, layout: Layout, shape: Shape) -> Layout:
    # From (m, classes, ...) to (m, ...), one target each.
    if node._saved_reduction != 0:
        raise along_examples()
    return layout.leading(shape)


def _attention(node: Node, layout: Layout, shape: Shape) -> Layout | None:  # noqa: ARG001
    # (..., heads, positions, width), with examples in one of the leading axes. A bias of the
    # scores is broadcast over them.
    axis, _ = layout.axis()
    if axis >= len(layout.shape) - 2:
        raise along_examples()
    return layout.broadcast(shape)


def _recurrent(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | None:
    # A sequence, weights, and two states. Sequences have three axes, and the batch first if cuDNN
    # was asked for that; states, (layers, batch, width) or (batch, width), have it next to last.
    states = len(node.next_functions) - 2
    if 0 < index < states:
        return None
    sequence = shape_of((node, 0))
    first = 0 if name_of(node) == "CudnnRnn" and node._saved_batch_first else 1
    axis, _ = layout.axis()
    if axis != (first if layout.shape == sequence else len(layout.shape) - 2):
        raise along_examples()
    return layout.moved(shape, len(shape) - 2 if index >= states else first)


_ELEMENTWISE = """
    Abs Acos Add Addcdiv Addcmul Asin Atan Atan2 BinaryCrossEntropy BinaryCrossEntropyWithLogits
    Celu Clamp ClampMax ClampMin Clone Cos Cosh Div Elu Erf Erfc Exp Exp2 Expand Expm1 Fmod Gelu
    Hardshrink Hardsigmoid Hardswish Hardtanh HuberLoss Hypot LeakyRelu Lerp Log Log10 Log1P Log2
    LogSigmoid Logaddexp Logit MaskedFill Maximum Minimum Mish MseLoss Mul NanToNum NativeDropout
    Neg Pow PreluKernel Reciprocal Relu Remainder RreluWithNoise Rsqrt Rsub Sigmoid Sign Silu
    Sin Sinc Sinh SmoothL1Loss SoftMarginLoss Softplus Softshrink Sqrt Sub Tan Tanh Threshold
    ToCopy Where Xlogy
""".split()
RESHAPING = frozenset("Alias ReshapeAlias Squeeze UnsafeView Unsqueeze View".split())
"""Operations that keep the row-major order of the elements."""
KEEPING = frozenset({*RESHAPING, "Clone", "ToCopy"})
"""The same, and copies."""
PERMUTING = frozenset("Permute T Transpose".split())
"""Operations that reorder the axes."""
_ALONG = """
    Cummax Cummin Cumprod Cumsum Flip Gather Glu IndexSelect LogSoftmax Logcumsumexp Roll
    SafeSoftmax Scatter Softmax Sort Topk
""".split()
_SPLITTING = "Slice Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes".split()
_REDUCING = """
    Amax Amin Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Prod Select Std Sum Unbind
    Var
""".split()
_LINEAR = "UpsampleLinear1D UpsampleNearest1D".split()
_PLANAR = """
    AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool2D MaxPool2DWithIndices Tril Triu UpsampleBicubic2D
    UpsampleBilinear2D UpsampleNearest2D UpsampleNearestExact2D
""".split()
_CUBIC = """
    AdaptiveAvgPool3D AdaptiveMaxPool3D AvgPool3D MaxPool3DWithIndices UpsampleNearest3D
    UpsampleTrilinear3D
""".split()
_ATTENTION = """
    ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention ScaledDotProductFlashAttention
    ScaledDotProductFlashAttentionForCpu ScaledDotProductFusedAttentionOverrideable
""".split()


def _broadcast(node: Node, layout: Layout, shape: Shape) -> Layout | None:  # noqa: ARG001
    return layout.broadcast(shape)


def _leading(node: Node, layout: Layout, shape: Shape) -> Layout:  # noqa: ARG001
    return layout.leading(shape)


_Rule = Callable[[Any, Layout, Shape], Layout | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _broadcast),
    **dict.fromkeys(RESHAPING, _reshape),
    **dict.fromkeys(PERMUTING, _permute),
    **dict.fromkeys(_ALONG, _within),
    **dict.fromkeys(_REDUCING, _reduce),
    **dict.fromkeys(_LINEAR, _spatial(1)),
    **dict.fromkeys(_PLANAR, _spatial(2)),
    **dict.fromkeys(_CUBIC, _spatial(3)),
    **dict.fromkeys(_ATTENTION, _attention),
    **{f"ReflectionPad{rank}D": _spatial(rank) for rank in (1, 2, 3)},
    **{f"ReplicationPad{rank}D": _spatial(rank) for rank in (1, 2, 3)},
    **dict.fromkeys(("NllLoss", "NllLoss2D"), _class_loss),
    **dict.fromkeys(("Col2Im", "GridSampler2D", "GridSampler3D", "Im2Col"), _leading),
    "ConstantPadNd": _padded,
    "Index": _index,
    "PixelShuffle": _spatial(3),
    "PixelUnshuffle": _spatial(3),
    "Repeat": _repeat,
    "Stack": _stack,
    "Unfold": _unfold,
}

ELEMENTWISE = frozenset(_ELEMENTWISE)
"""Operations whose output at a place depends on the inputs at that place, after broadcasting."""
LOOKING = frozenset({"Index"})
"""Operations of which a rule looks at tensors that they saved."""
MIXING = frozenset({*_ALONG, *_REDUCING, *_SPLITTING, "Cat"})
"""Operations that run along some of the axes."""
