"""Where the examples lie in an operation's input, given where they lie in its output.

Guarantees: derived from what the operation does, never guessed from shapes; an operation that mixes
examples is said to do so, and one that is not known here is said to be unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from cabs.gradients.layout import Layout, MixedError, along_examples
from cabs_tensorflow.graph.program import ancestors
from cabs_tensorflow.graph.symbolic_shapes import Sizes


def of_input(
    operation: Any, sizes: Sizes, output: int, layout: Layout, index: int
) -> Layout | None:
    """Return the layout of an operation's ``index``-th input, given that of one of its outputs.

    None if that input is broadcast over the examples, so that it is no example's own.

    Raises:
        MixedError: If the operation mixes examples, or has no rule.
    """
    find = _RULES.get(operation.type)
    if find is None:
        raise MixedError("is not known to keep examples apart")
    return find(_Step(operation, sizes, output, layout, index))


def check_inside(operation: Any) -> None:
    """Raise MixedError if an operation runs others, which are not seen."""
    if operation.type in _LOOPS:
        raise MixedError(
            f"{operation.type} (operation {operation.name!r}) is a loop or a branch, such as that "
            "of tf.while_loop, tf.cond or a recurrent layer of Keras, whose inside is not seen. "
            "Recurrent layers can be given unroll=True"
        )


def is_asked(tensor: Any) -> bool:
    """Return whether a tensor is nothing but the sizes of another one."""
    return tensor.op.type in _ASKING


class _Step:
    """An operation, one of its outputs and one of its inputs.

    Args:
        operation: The operation.
        sizes: Those of its graph.
        output: Which of its outputs.
        layout: Where the examples lie in that.
        index: Which of its inputs.
    """

    def __init__(
        self, operation: Any, sizes: Sizes, output: int, layout: Layout, index: int
    ) -> None:
        self.operation, self.sizes, self.output = operation, sizes, output
        self.layout, self.index = layout, index
        self.axis, self.inside = layout.axis()
        self.shape = sizes.shape(operation.inputs[index])

    @property
    def is_unknown(self) -> bool:
        """Whether the size of the axis that holds the examples is not known."""
        return self.sizes.known(self.layout.shape[self.axis]) is None

    def constant(self, index: int) -> list[int]:
        """Return the integers that an input holds."""
        found: list[int] = self.sizes.constant(self.operation.inputs[index]).ravel().tolist()
        return found

    def axes(self, index: int, rank: int) -> set[int]:
        """Return the axes that an input holds, of a tensor of some rank."""
        return {axis % rank for axis in self.constant(index)}

    def place(self, index: int, entry: int) -> int | None:
        """Return one of the places that an input holds, None if it is not known for all sizes.

        Where the number of examples is not known, what stands for it shows how many of them a place
        is away, as long as nothing but multiples are computed on the way to it.
        """
        places = self.operation.inputs[index]
        found = tf.get_static_value(places, partial=True)
        if found is not None and found[entry] is not None:
            return int(found[entry]) if not (self.is_unknown and found[entry]) else None
        if any(one.type not in _SIZING for one in ancestors([places], is_asked)):
            return None
        return self.constant(index)[entry]

    def block(self, axis: int, begin: int) -> Layout:
        """Return the layout of the input, of whose blocks of examples the output has some.

        ``begin`` is where they begin in that axis of the input.
        """
        size = self.shape[axis]
        begin = begin + size if begin < 0 else begin
        return self.layout.blocks(self.shape, axis, begin, size)

    def at(self, axis: int) -> Layout:
        """Return the layout of the input, if the examples lie in one of its axes as they did."""
        return self.layout.moved(self.shape, axis)


def _broadcast(step: _Step) -> Layout | None:
    return step.layout.broadcast(step.shape)


def _leading(step: _Step) -> Layout:
    return step.layout.leading(step.shape)


def _choice(step: _Step) -> Layout | None:
    # A vector of conditions chooses rows.
    if step.index == 0 and len(step.shape) == 1 < len(step.layout.shape):
        return _leading(step)
    return _broadcast(step)


def _reshape(step: _Step) -> Layout:
    return step.layout.reshaped(step.shape)


def _transpose(step: _Step) -> Layout:
    return step.layout.permuted(step.shape, [axis % len(step.shape) for axis in step.constant(1)])


def _reduce(step: _Step) -> Layout:
    axes = step.axes(1, len(step.shape))
    if step.operation.get_attr("keep_dims"):
        return step.layout.within(step.shape, axes)
    return step.layout.reduced(step.shape, axes)


def _along(place: int) -> Callable[[_Step], Layout]:
    """Return the rule of operations that run along the axes that an input holds."""

    def find(step: _Step) -> Layout:
        axes = step.axes(place % len(step.operation.inputs), len(step.shape))
        return step.layout.within(step.shape, axes)

    return find


def _trailing(rank: int) -> Callable[[_Step], Layout]:
    """Return the rule of operations that mix the last ``rank`` axes of their inputs only."""
    return lambda step: step.layout.trailing(step.shape, rank)


def _same_size(step: _Step) -> Layout:
    # What is cut off, or added at the sides, are parts of other axes.
    if step.index:
        raise MixedError("takes a parameter for what is added at the sides")
    if step.is_unknown and tf.get_static_value(step.operation.inputs[1]) is None:
        raise MixedError("cuts or pads by sizes that follow from the batch")
    if step.is_unknown and step.operation.type == "Slice":
        taken = tf.get_static_value(step.operation.inputs[2], partial=True)
        if taken is None or taken[step.axis] != -1:
            raise along_examples()
    if step.shape[step.axis] != step.layout.shape[step.axis]:
        raise along_examples()
    return step.at(step.axis)


def _strided_slice(step: _Step) -> Layout:
    axis = origins(step.operation, step.sizes)[step.axis]
    if axis is None:
        raise along_examples()
    entry = next(at for one, at in _entries(step.operation, step.sizes) if one == axis)
    if entry is None:
        return step.block(axis, 0)
    begin: int | None = 0
    if not step.operation.get_attr("begin_mask") >> entry & 1:
        begin = step.place(1, entry)
    is_open = step.operation.get_attr("end_mask") >> entry & 1
    if not is_open and step.is_unknown and step.place(2, entry) is None:
        # As many as there are only by chance.
        raise along_examples()
    if begin is None or step.constant(3)[entry] != 1:
        raise along_examples()
    return step.block(axis, begin)


def origins(operation: Any, sizes: Sizes) -> list[int | None]:
    """Return for each axis of a strided slice's output which axis of its input it is."""
    return [axis for axis, _ in _entries(operation, sizes) if axis != _DROPPED]


_DROPPED = -1


def _entries(operation: Any, sizes: Sizes) -> list[tuple[int | None, int | None]]:
    """Return, in order, the axes of a strided slice's output, and which entry says what is taken.

    An axis is that of the input, None for a new one, and -1 for one that is gone.
    """
    count = sizes.shape(operation.inputs[1])[0]
    rank = len(sizes.shape(operation.inputs[0]))
    masks = ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    ellipsis, new, shrink = (operation.get_attr(name) for name in masks)
    named = sum(1 for at in range(count) if not (ellipsis | new) >> at & 1)
    found: list[tuple[int | None, int | None]] = []
    axis = 0
    for at in range(count):
        bit = 1 << at
        if ellipsis & bit:
            skipped = rank - named
            found.extend((one, None) for one in range(axis, axis + skipped))
            axis += skipped
        elif new & bit:
            found.append((None, at))
        else:
            found.append((_DROPPED if shrink & bit else axis, at))
            axis += 1
    found.extend((one, None) for one in range(axis, rank))
    return found


def _concatenated(step: _Step) -> Layout:
    last = len(step.operation.inputs) - 1
    if step.axis not in step.axes(last, len(step.shape)):
        return step.at(step.axis)
    shapes = [step.sizes.shape(one) for one in step.operation.inputs[: step.index]]
    begin = sum(shape[step.axis] for shape in shapes)
    if not step.shape[step.axis]:
        raise along_examples()
    return step.block(step.axis, begin)


def _split(step: _Step) -> Layout:
    is_even = step.operation.type == "Split"
    if step.axis not in step.axes(0 if is_even else 2, len(step.shape)):
        return step.at(step.axis)
    shapes = [step.sizes.shape(one) for one in step.operation.outputs[: step.output]]
    return step.block(step.axis, sum(shape[step.axis] for shape in shapes))


def _pack(step: _Step) -> Layout:
    added = step.operation.get_attr("axis") % len(step.layout.shape)
    return step.layout.stacked(step.shape, added)


def _unpack(step: _Step) -> Layout:
    return step.layout.reduced(step.shape, [step.operation.get_attr("axis") % len(step.shape)])


def _bias(step: _Step) -> Layout | None:
    if step.index == 0:
        return step.at(step.axis)
    is_first = step.operation.get_attr("data_format") == b"NCHW"
    if step.axis == (1 if is_first else len(step.layout.shape) - 1):
        raise along_examples()
    return None


def _tile(step: _Step) -> Layout | None:
    times = step.constant(1)[step.axis]
    if times == 1:
        return step.at(step.axis)
    if step.shape[step.axis] == 1 and times % step.layout.examples == 0:
        return None
    raise MixedError("repeats the axis that holds the examples")


def _gather(step: _Step) -> Layout | None:
    table, ids = (step.sizes.shape(step.operation.inputs[at]) for at in (0, 1))
    if step.operation.type == "ResourceGather":
        axis, batched = 0, 0
        if step.operation.get_attr("batch_dims") or step.axis >= len(ids):
            raise along_examples()
    else:
        axis = step.constant(2)[0] % len(table)
        batched = step.operation.get_attr("batch_dims")
    looked = len(ids) - batched
    if step.axis < axis:
        if step.index == 0:
            return step.at(step.axis)
        return step.at(step.axis) if step.axis < batched else None
    if step.axis >= axis + looked:
        if step.index == 1:
            return None
        return step.at(step.axis - looked + 1)
    if step.index == 0:
        return None
    return step.at(step.axis - axis + batched)


def _space_to_batch(step: _Step) -> Layout:
    # Blocks of the batch, one for each offset, lie one after another.
    blocks = math.prod(step.constant(1))
    if step.axis != 0 or step.inside % blocks:
        raise along_examples()
    inside = step.inside // blocks
    return Layout(step.shape, inside, step.layout.examples)


def _batch_to_space(step: _Step) -> Layout:
    blocks = math.prod(step.constant(1))
    if step.axis != 0:
        raise along_examples()
    return Layout(step.shape, step.inside * blocks, step.layout.examples)


ELEMENTWISE = frozenset(
    """
    Abs Acos Acosh Add AddN AddV2 Asin Asinh Atan Atan2 Atanh BesselI0e BesselI1e Cast CheckNumerics
    ClipByValue Cos Cosh Digamma Div DivNoNan Elu Erf Erfc Erfinv Exp Expm1 FloorDiv FloorMod
    Identity Inv LeakyRelu Lgamma Log Log1p Maximum Minimum Mod Mul MulNoNan Ndtri Neg Pow
    PreventGradient RealDiv Reciprocal Relu Relu6 Rsqrt SelectV2 Selu Sigmoid Sin Sinh Snapshot
    Softplus Softsign Sqrt Square SquaredDifference Sub Tan Tanh TruncateDiv Xdivy Xlog1py Xlogy
    """.split()
)
"""Operations whose output at a place depends on the inputs at that place, after broadcasting."""
RESHAPING = frozenset("EnsureShape ExpandDims Reshape Squeeze".split())
"""Operations that keep the row-major order of the elements."""
KEEPING = frozenset({*RESHAPING, "Cast", "Identity", "PreventGradient", "Snapshot"})
"""The same, and copies."""
_SIZING = frozenset("Cast Const FloorDiv Identity Mul Neg Pack Prod StridedSlice".split())
"""Operations in which sizes become multiples of sizes."""
_ASKING = frozenset("Shape ShapeN Size".split())
_LOOPS = frozenset("Case If StatelessCase StatelessIf StatelessWhile While".split())
_LEADING = """
    AvgPool AvgPool3D DepthToSpace ExtractImagePatches ExtractVolumePatches LRN MaxPool MaxPool3D
    MaxPoolV2 ResizeArea ResizeBicubic ResizeBilinear ResizeNearestNeighbor
    SoftmaxCrossEntropyWithLogits SpaceToDepth SparseSoftmaxCrossEntropyWithLogits
""".split()

_Rule = Callable[[_Step], Layout | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(ELEMENTWISE, _broadcast),
    **dict.fromkeys(RESHAPING, _reshape),
    **dict.fromkeys(_LEADING, _leading),
    **dict.fromkeys("EuclideanNorm Max Mean Min Prod Sum".split(), _reduce),
    **dict.fromkeys("CumulativeLogsumexp Cumprod Cumsum ReverseV2".split(), _along(1)),
    "ConcatV2": _concatenated,
    "Roll": _along(-1),
    **dict.fromkeys("LogSoftmax Softmax TopKV2".split(), _trailing(1)),
    **dict.fromkeys(
        "Cholesky MatrixBandPart MatrixDeterminant MatrixDiagPartV3".split(), _trailing(2)
    ),
    **dict.fromkeys("MirrorPad Pad PadV2 Slice".split(), _same_size),
    "MatrixInverse": _trailing(2),
    "BatchToSpaceND": _batch_to_space,
    "BiasAdd": _bias,
    "BroadcastTo": _broadcast,
    "GatherV2": _gather,
    "ResourceGather": _gather,
    "Pack": _pack,
    "Select": _choice,
    "SpaceToBatchND": _space_to_batch,
    "Split": _split,
    "SplitV": _split,
    "StridedSlice": _strided_slice,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unpack": _unpack,
}
