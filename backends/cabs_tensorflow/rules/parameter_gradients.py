"""The operations in which variables meet the batch, and what follows for their gradients.

Guarantees: an input of such an operation that is the same for all examples has a rule that gives
the per-example gradients from the operation's inputs and its output's cotangent, or is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from cabs.gradients.layout import Layout, MixedError, Shape, along_examples
from cabs.gradients.terms import Lookup, Materialized, Term
from cabs_tensorflow.graph.program import copied
from cabs_tensorflow.graph.symbolic_shapes import Sizes
from cabs_tensorflow.norms import reductions
from cabs_tensorflow.norms.convolution import Convolution, same_padding
from cabs_tensorflow.norms.reductions import sizes_of
from cabs_tensorflow.rules import batch_axis, contraction
from cabs_tensorflow.rules.layout import Batch


@dataclass(frozen=True)
class ParameterInput:
    """An input of an operation that is the same for all examples.

    Args:
        operation: The operation.
        output: Which of its outputs the losses depend on.
        layout: Where the examples lie in that.
        index: Which of its inputs.
    """

    operation: Any
    output: int
    layout: Layout
    index: int

    @property
    def tensor(self) -> Any:
        """What is the same for all examples."""
        return self.operation.inputs[self.index]

    @property
    def target(self) -> Any:
        """The output whose cotangent the gradients follow from."""
        return self.operation.outputs[self.output]

    @property
    def rule(self) -> str:
        """How the gradients are computed, in a word."""
        return _NAMES[self.operation.type]

    def term(self, sizes: Sizes, batch: Batch, cotangent: Any) -> Term:
        """Return the gradients.

        Raises:
            MixedError: If they cannot be computed for these operands.
        """
        return _RULES[self.operation.type](_Context(self, sizes, batch, cotangent))


def enter(
    operation: Any, sizes: Sizes, output: int, layout: Layout, index: int
) -> Layout | ParameterInput:
    """Return the layout of an operation's input, or the ParameterInput that all examples share.

    Raises:
        MixedError: If the operation mixes examples, or there is no rule for it.
    """
    find = _CARRIERS.get(operation.type)
    if find is not None:
        inner = find(operation, sizes, output, layout, index)
    else:
        inner = batch_axis.of_input(operation, sizes, output, layout, index)
    if inner is not None:
        return inner
    if sum(one is operation.inputs[index] for one in operation.inputs) > 1:
        raise MixedError("takes the same tensor twice")
    if operation.type not in _RULES:
        raise MixedError("has no rule for what is the same for all examples")
    return ParameterInput(operation, output, layout, index)


class _Context:
    """What a rule is given: the parameter's input, and the cotangent of the operation's output."""

    def __init__(self, entered: ParameterInput, sizes: Sizes, batch: Batch, cotangent: Any) -> None:
        self.input, self.sizes, self.batch, self.cotangent = entered, sizes, batch, cotangent
        self.operation, self.layout, self.index = entered.operation, entered.layout, entered.index
        self.shape: Shape = sizes.shape(entered.tensor)

    def taken(self) -> Any:
        """Return the examples' parts of the cotangent, shape (n, *one)."""
        return self.batch.take(self.cotangent, self.layout)

    def other(self, index: int) -> Any:
        """Return the examples' parts of another input, aligned with those of the cotangent."""
        entered = self.input
        tensor = self.operation.inputs[index]
        layout = enter(self.operation, self.sizes, entered.output, entered.layout, index)
        if not isinstance(layout, Layout):
            # The same for all examples, and aligned from behind.
            return tensor
        taken = self.batch.take(tensor, layout)
        missing = len(self.layout.shape) - len(layout.shape)
        sizes = sizes_of(taken)
        return tf.reshape(taken, [sizes[0], *[1] * missing, *sizes[1:]]) if missing else taken

    def collected(self, parts: Any, aligned: Shape) -> Materialized:
        """Return gradients of what was broadcast as a tensor of the shape ``aligned`` would be."""
        axes = self.layout.broadcast_axes(aligned)
        if axes:
            parts = tf.reduce_sum(reductions.wide(parts), axis=axes, keepdims=True)
        sizes = sizes_of(self.input.tensor)
        return Materialized(tf.reshape(parts, [self.batch.taken, *sizes]), self.shape)


def _plus(meeting: _Context) -> Term:
    return meeting.collected(meeting.taken(), meeting.shape)


def _minus(meeting: _Context) -> Term:
    taken = meeting.taken()
    return meeting.collected(taken if meeting.index == 0 else -taken, meeting.shape)


def _times(meeting: _Context) -> Term:
    parts = reductions.wide(meeting.taken()) * reductions.wide(meeting.other(1 - meeting.index))
    return meeting.collected(parts, meeting.shape)


def _bias(meeting: _Context) -> Term:
    if meeting.operation.get_attr("data_format") == b"NCHW":
        after = len(meeting.layout.shape) - 2
        return meeting.collected(meeting.taken(), (*meeting.shape, *[1] * after))
    return meeting.collected(meeting.taken(), meeting.shape)


def _elementwise(meeting: _Context) -> Term:
    # TensorFlow's own derivative, of the same operation on a parameter that is broadcast first.
    entered, operation = meeting.input, meeting.operation
    tensor = entered.tensor
    wide = tf.broadcast_to(tensor, tf.shape(entered.target))
    (output,) = copied([operation], {tensor.name: wide}, [entered.target.name])
    (gradient,) = tf.gradients(output, [wide], grad_ys=[meeting.cotangent])
    if gradient is None:
        gradient = tf.zeros_like(wide)
    return meeting.collected(meeting.batch.take(gradient, meeting.layout), meeting.shape)


def _spread(meeting: _Context) -> Term:
    if meeting.operation.type == "Tile":
        times = meeting.sizes.constant(meeting.operation.inputs[1]).ravel()
        if any(one > 1 and size > 1 for one, size in zip(times, meeting.shape, strict=True)):
            raise MixedError("repeats a parameter along an axis of its own")
    return meeting.collected(meeting.taken(), meeting.shape)


def _contraction(meeting: _Context) -> Term:
    return contraction.term(
        meeting.operation,
        meeting.sizes,
        meeting.batch,
        meeting.layout,
        meeting.index,
        meeting.cotangent,
    )


def _table(meeting: _Context) -> Term:
    operation, batch = meeting.operation, meeting.batch
    if operation.type == "GatherV2":
        axis = meeting.sizes.constant(operation.inputs[2]).item()
        if operation.get_attr("batch_dims") or axis % len(meeting.shape):
            raise MixedError("looks a parameter up along an axis that is not its first")
    layout = enter(operation, meeting.sizes, meeting.input.output, meeting.layout, 1)
    if not isinstance(layout, Layout):
        raise MixedError("looks the same rows up for all examples")
    return lookup(
        batch,
        batch.take(operation.inputs[1], layout),
        batch.take(meeting.cotangent, meeting.layout),
        meeting.shape,
    )


def lookup(batch: Batch, ids: Any, rows: Any, shape: Shape) -> Lookup:
    """Return the gradients of a table of some shape, from ids (n, ...) and rows (n, ..., *row)."""
    length = math.prod(sizes_of(ids)[1:])
    return Lookup(
        tf.cast(tf.reshape(ids, [batch.taken, length]), tf.int64),
        tf.reshape(rows, [batch.taken, length, math.prod(shape[1:])]),
        shape,
    )


def _convolved(
    operation: Any,
    sizes: Sizes,
    output: int,  # noqa: ARG001
    layout: Layout,
    index: int,
) -> Layout | None:
    """Find the examples in the data of a convolution; kernels have none."""
    axis, _ = layout.axis()
    if axis != 0:
        raise along_examples()
    is_transposed = "Input" in operation.type
    if index == (2 if is_transposed else 0):
        return layout.moved(sizes.shape(operation.inputs[index]), 0)
    return None


def _convolution(meeting: _Context) -> Term:
    operation, batch = meeting.operation, meeting.batch
    is_transposed = "Input" in operation.type
    is_depthwise = operation.type.startswith("Depthwise")
    rank = len(meeting.shape) - 2
    is_first = operation.get_attr("data_format").decode().startswith("NC")
    spatial = range(2, 2 + rank) if is_first else range(1, 1 + rank)

    def parts(tensor: Any, layout: Layout) -> Any:
        """Return examples' parts, (n, frames, *spatial, channels)."""
        taken = batch.take(tensor, layout)
        return tf.transpose(taken, [0, 1, *range(3, 3 + rank), 2]) if is_first else taken

    index = 2 if is_transposed else 0
    inner = _convolved(operation, meeting.sizes, 0, meeting.layout, index)
    assert inner is not None
    data = parts(operation.inputs[index], inner)
    cotangent = parts(meeting.cotangent, meeting.layout)
    seen, made = (cotangent, data) if is_transposed else (data, cotangent)
    strides = operation.get_attr("strides")
    dilations = operation.get_attr("dilations")
    stride, dilation = ([some[axis] for axis in spatial] for some in (strides, dilations))
    kernel = meeting.shape[:rank]
    kind = operation.get_attr("padding").decode()
    if kind == "SAME":
        inside, outside = sizes_of(seen)[2:-1], sizes_of(made)[2:-1]
        padding = same_padding(inside, outside, kernel, stride, dilation)
    elif kind == "VALID":
        padding = [(0, 0)] * rank
    else:
        given = operation.get_attr("explicit_paddings")
        padding = [(given[2 * axis], given[2 * axis + 1]) for axis in spatial]
    channels = seen.shape[-1]
    groups = channels if is_depthwise else channels // meeting.shape[-2]
    # Frames are a spatial axis, along which the kernel has one element.
    return Convolution(
        seen,
        made,
        meeting.shape,
        (1, *kernel),
        (1, *stride),
        ((0, 0), *padding),
        (1, *dilation),
        groups,
    )


_CONVOLUTIONS = """
    Conv2D Conv2DBackpropInput Conv3D Conv3DBackpropInputV2 DepthwiseConv2dNative
    DepthwiseConv2dNativeBackpropInput
""".split()

_CARRIERS: dict[str, Callable[[Any, Sizes, int, Layout, int], Layout | None]] = {
    **dict.fromkeys(
        contraction.PRODUCTS,
        lambda operation, sizes, _, layout, index: contraction.carry(
            operation, sizes, layout, index
        ),
    ),
    **dict.fromkeys(_CONVOLUTIONS, _convolved),
}
_RULES: dict[str, Callable[[_Context], Term]] = {
    **dict.fromkeys(batch_axis.ELEMENTWISE, _elementwise),
    **dict.fromkeys(("Add", "AddN", "AddV2"), _plus),
    **dict.fromkeys(("BroadcastTo", "Tile"), _spread),
    **dict.fromkeys(contraction.PRODUCTS, _contraction),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(("GatherV2", "ResourceGather"), _table),
    "BiasAdd": _bias,
    "Mul": _times,
    "Sub": _minus,
}
_NAMES = {
    **dict.fromkeys(batch_axis.ELEMENTWISE, "scaled"),
    **dict.fromkeys(("Add", "AddN", "AddV2", "BiasAdd", "BroadcastTo", "Sub", "Tile"), "added"),
    **dict.fromkeys(contraction.PRODUCTS, "matrix"),
    **dict.fromkeys(_CONVOLUTIONS, "convolution"),
    **dict.fromkeys(("GatherV2", "ResourceGather"), "lookup"),
}
