"""The operations in which parameters meet the batch, and what follows for their gradients.

Guarantees: for each input of such an operation it is said either where the examples lie in it, or
how the per-example gradients of the parameter behind it follow from what the operation saved and
its output's cotangent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cabs.gradients.layout import Layout, MixedError, Shape, along_examples
from cabs.gradients.outer_products import spared
from cabs.gradients.terms import Lookup, Materialized, Product, Term
from cabs_torch.graph.autograd_nodes import Node, check_saved, name_of, saved, signed
from cabs_torch.norms import reductions
from cabs_torch.norms.arrays import TorchArrays
from cabs_torch.norms.bags import Bags
from cabs_torch.norms.convolution import Convolution
from cabs_torch.rules.batch_axis import of_input
from cabs_torch.rules.layout import take
from cabs_torch.rules.registered import check_leading, name_of_rule, place_of, rules_of
from cabs_torch.rules.registered import term as registered_term


class ParameterInput(NamedTuple):
    """An input of an operation that comes from parameters alone and is shared by all examples."""

    rule: str
    """How its gradients are computed."""
    term: Callable[[Sequence[Tensor | None], int], Term | None]
    """From the output cotangents, the gradients of the first so many examples, if any are not 0."""
    of_all_outputs: bool = False
    """Whether gradients come through other outputs than the first, too."""
    spared: Callable[[TorchArrays], int] = lambda _: 0
    """Multiplications saved an example if the batch's gradient is the sum of the examples'."""


def enter(
    node: Node, output: int, layout: Layout, index: int, shape: Shape
) -> Layout | ParameterInput | None:
    """Return where the examples lie in a node's input of a shape, or that it is a parameter.

    ``layout`` is that of one of the node's outputs. Parameters get their gradients through the
    first output, and nothing from others. None if the input is the same for all examples, and there
    is no rule for its gradients.

    Raises:
        MixedError: If the operation mixes examples.
        UnknownError: If there is no rule for the operation at all.
    """
    rules = rules_of(node)
    if rules is not None:
        check_leading(layout)
        rule = rules.get(place_of(node, index))
        if rule is None:
            return layout.leading(shape)
        name, found = name_of_rule(node), partial(registered_term, node, rule, shape)
        return ParameterInput(name, found, of_all_outputs=True)
    find = _RULES.get(name_of(node))
    if find is not None:
        return find(node, layout, index, shape)
    inner = of_input(node, output, layout, index, shape)
    if inner is None and (factor := _FACTORS.get(name_of(node))) is not None:
        return factor(node, layout, index, shape)
    return inner


def _parameter_input(
    rule: str, term: Callable[[Tensor, int], Term], spared: Callable[..., int] = lambda _: 0
) -> ParameterInput:
    """Return an input whose gradients depend on the cotangent of the first output."""

    def of_first(cotangents: Sequence[Tensor | None], examples: int) -> Term | None:
        # None stands for a cotangent of zeros.
        return None if cotangents[0] is None else term(cotangents[0], examples)

    return ParameterInput(rule, of_first, spared=spared)


def _matrices(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | ParameterInput:
    """Y = A X or C + A X, with a vector X, or with blocks of matrices side by side."""
    first, second = _OPERANDS[name_of(node)]
    operand = index - (len(node.next_functions) - 2)
    if operand < 0:
        return layout.broadcast(shape) or _added(layout, shape, float(node._saved_beta))
    axis, _ = layout.axis()
    is_vector = name_of(node) in ("Addmv", "Mv")
    blocks = len(layout.shape) - (1 if is_vector else 2)
    if axis < blocks or axis - blocks == operand:
        # Each example has matrices of its own, or rows of A, which are those of Y, or columns of X.
        return layout.moved(shape, axis)
    other = second if operand == 0 else first
    check_saved(node, other)
    factor = float(getattr(node, "_saved_alpha", 1.0))

    def term(cotangent: Tensor, examples: int) -> Term:
        inputs, outputs = saved(node, other), cotangent if factor == 1.0 else cotangent * factor
        if is_vector:
            outputs = outputs.unsqueeze(-1)
        if operand == 0:
            inputs, outputs = inputs.mT, outputs.mT
        sides = []
        for side in (inputs, outputs):
            taken = take(layout.moved(tuple(side.shape), blocks), side, examples)
            sides.append(taken if blocks else taken.unsqueeze(1))
        left, right = sides if operand == 1 else sides[::-1]
        return Product.of_matrix(left, right, shape)

    def of_matrix(arrays: TorchArrays) -> int:
        length = layout.shape[axis] // layout.examples
        return spared(arrays, length, *shape) if len(shape) == 2 and not is_vector else 0

    return _parameter_input("matrix", term, of_matrix)


def _convolution(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | ParameterInput:
    if index == 0:
        return layout.leading(shape)
    if layout.axis()[0] != 0:
        raise along_examples()
    if index == 2:
        return _added(layout, _channels(layout), parameter=shape)
    check_saved(node, "input")
    # One number for all axes stays one number, as in conv2d(padding="valid").
    rank = len(shape) - 2
    stride, padding, dilation = (
        list(one) * rank if len(one) == 1 else list(one)
        for one in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )

    def term(cotangent: Tensor, examples: int) -> Term:
        kept = saved(node, "input")
        inputs = take(layout.moved(tuple(kept.shape), 0), kept, examples)
        return of_sides(inputs, take(layout, cotangent, examples))

    def of_sides(inputs: Tensor, cotangents: Tensor) -> Convolution:
        sides = (cotangents, inputs) if node._saved_transposed else (inputs, cotangents)
        return Convolution(*sides, shape, stride, padding, dilation, node._saved_groups)

    def of_kernel(arrays: TorchArrays) -> int:
        source, number = node.next_functions[0]
        if source is None:
            return 0
        # Of the tensors, no more than this is looked at.
        known = source._input_metadata[number]
        whole = tuple(known.shape), layout.shape
        scalar = torch.empty((), dtype=known.dtype, device=known.device)
        sizes = ((layout.examples, one[0] // layout.examples, *one[1:]) for one in whole)
        return of_sides(*(scalar.expand(size) for size in sizes)).spared(arrays)

    return _parameter_input("convolution", term, of_kernel)


def _channels(layout: Layout) -> Shape:
    """Return the shape of one value a channel that is broadcast over the positions."""
    return (layout.shape[1], *(1 for _ in layout.shape[2:]))


def _layer_norm(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | ParameterInput:
    axis, _ = layout.axis()
    if axis >= len(layout.shape) - len(node._saved_normalized_shape):
        raise along_examples()
    if index == 0:
        return layout.moved(shape, axis)
    if index == 2:
        return _added(layout, shape)
    check_saved(node, "input", "result1", "result2")

    def normalized(part: Callable[[Tensor], Tensor]) -> Tensor:
        inputs, mean, scale = (part(saved(node, n)) for n in ("input", "result1", "result2"))
        whole: Tensor = (inputs - mean).mul_(scale)
        return whole

    return _scaled(layout, shape, normalized)


def _group_norm(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | ParameterInput:
    if index == 0:
        return layout.leading(shape)
    if layout.axis()[0] != 0:
        raise along_examples()
    channels = _channels(layout)
    if index == 2:
        return _added(layout, channels, parameter=shape)
    check_saved(node, "input", "result1", "result2")

    def term(cotangent: Tensor, examples: int) -> Term:
        whole = take(layout, saved(node, "input"), examples), take(layout, cotangent, examples)
        positions = math.prod(layout.shape[2:])
        sums = []
        for part in reductions.parts(examples, 2 * whole[0][0].numel(), None):
            x, b = (
                reductions.at_least_single(one[part]).reshape(-1, *one.shape[1:3], positions)
                for one in whole
            )
            # As PyTorch's own gradient has it: normalizing each element first takes much longer.
            sums.append(torch.stack([(x * b).sum(dim=3), b.sum(dim=3)]))
        products, added = torch.cat(sums, dim=1)
        mean, scale = (
            take(layout.moved(tuple(one.shape), 0), one, examples).repeat_interleave(
                layout.shape[1] // node._saved_group, dim=2
            )
            for one in (saved(node, "result1"), saved(node, "result2"))
        )
        gradients = ((products - mean * added) * scale).sum(dim=1)
        return Materialized(gradients, tuple(gradients.shape[1:]))

    return _parameter_input("scaled", term)


def _batch_norm(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | ParameterInput:
    axis, _ = layout.axis()
    if axis == 1:
        # Each example has channels of its own, as instance normalization arranges it.
        return layout.moved(shape, axis if index == 0 else 0)
    if axis != 0:
        raise along_examples()
    if node._saved_training:
        raise MixedError(
            "normalizes over the batch, so that the gradient of one example depends on all others"
        )
    if index == 0:
        return layout.moved(shape, 0)
    channels = _channels(layout)
    if index == 2:
        return _added(layout, channels, parameter=shape)
    check_saved(node, "input", "running_mean", "running_var")
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon

    def normalized(part: Callable[[Tensor], Tensor]) -> Tensor:
        mean = saved(node, "running_mean").reshape(channels)
        scale = (saved(node, "running_var") + eps).rsqrt().reshape(channels)
        whole: Tensor = (part(saved(node, "input")) - mean).mul_(scale)
        return whole

    return _scaled(layout, channels, normalized, parameter=shape)


def _embedding(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | ParameterInput:  # noqa: ARG001
    axis, _ = layout.axis()
    if axis == len(layout.shape) - 1:
        raise along_examples()
    if node._saved_scale_grad_by_freq:
        raise MixedError("divides by how often the batch holds an index")
    check_saved(node, "indices")
    padding = signed(node._saved_padding_idx)

    def term(cotangent: Tensor, examples: int) -> Term:
        whole = saved(node, "indices")
        indices = take(layout.moved(tuple(whole.shape), axis), whole, examples).flatten(1)
        rows = take(layout, cotangent, examples).flatten(1, -2)
        if padding >= 0:
            rows = rows * (indices != padding).unsqueeze(-1)
        return Lookup(indices, rows, shape)

    return _parameter_input("table", term)


def _embedding_bag(
    node: Node, layout: Layout, index: int, shape: Shape
) -> Layout | ParameterInput | None:
    if layout.axis()[0] != 0:
        raise along_examples()
    if node._saved_scale_grad_by_freq:
        raise MixedError("divides by how often the batch holds an index")
    if index != 0 or node._saved_mode not in (_SUM, _MEAN):
        return None
    check_saved(node, "indices", "offsets")
    padding = signed(node._saved_padding_idx)

    def term(cotangent: Tensor, examples: int) -> Term:
        indices, offsets = saved(node, "indices"), saved(node, "offsets")[: len(cotangent)]
        places = torch.arange(len(indices), device=indices.device, dtype=offsets.dtype)
        bags = torch.bucketize(places, offsets, right=True) - 1
        factors = (indices != padding).to(reductions.single_or_double(cotangent))
        if node._saved_mode == _MEAN:
            sizes = factors.new_zeros(len(cotangent)).index_add_(0, bags, factors)
            factors = factors / sizes.clamp_min(1.0)[bags]
        if node._saved_per_sample_weights is not None:
            factors = factors * saved(node, "per_sample_weights")
        rows = cotangent[bags] * factors.unsqueeze(-1)
        _, inside = layout.axis()
        repeats = len(cotangent) // (inside * layout.examples)
        owners = torch.arange(layout.examples, device=bags.device).repeat_interleave(repeats)
        return Bags(indices, rows, owners.repeat(inside)[bags], examples, shape)

    return _parameter_input("table", term)


_SUM, _MEAN = 0, 1


def _plus(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput:
    if index == 0:
        return _added(layout, shape)
    factor = float(node._saved_alpha)
    return _added(layout, shape, -factor if name_of(node) == "Sub" else factor)


def _repeated(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput:  # noqa: ARG001
    aligned = [1] * (len(layout.shape) - len(shape)) + list(shape)
    split = [part for size in aligned for part in (-1, size)]

    def term(cotangent: Tensor, examples: int) -> Term:
        taken = take(layout, cotangent, examples)
        # Each axis is a number of repetitions of what was there.
        for place in range(len(split) // 2, 0, -1):
            taken = taken.unflatten(place, split[2 * place - 2 : 2 * place])
        times = list(range(1, len(split), 2))
        gradients = taken.sum(dim=times, dtype=reductions.single_or_double(taken))
        return Materialized(gradients.reshape(-1, *shape), shape)

    return _parameter_input("added", term)


def _times(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput:
    name = "other" if index == 0 else "self"
    check_saved(node, name)
    return _scaled(layout, shape, lambda part: part(saved(node, name).expand(layout.shape)))


def _over(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput | None:
    if getattr(node, "_saved_rounding_mode", None) is not None:
        return None
    check_saved(node, "other", *(["self"] if index else []))

    def whole(part: Callable[[Tensor], Tensor], name: str) -> Tensor:
        return part(saved(node, name).expand(layout.shape))

    if index == 0:
        return _scaled(layout, shape, lambda part: whole(part, "other").reciprocal())
    return _scaled(layout, shape, lambda part: -whole(part, "self") / whole(part, "other").square())


def _power(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput | None:
    if index != 1:
        return None
    check_saved(node, "self", "result")

    def slope(part: Callable[[Tensor], Tensor]) -> Tensor:
        base = part(saved(node, "self").expand(layout.shape))
        # The limit at a base of 0, as autograd has it for exponents that are not negative.
        logarithm = torch.where(base == 0.0, 0.0, base.log())
        return part(saved(node, "result")) * logarithm

    return _scaled(layout, shape, slope)


def _prelu(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput | None:
    if index != 1:
        return None
    check_saved(node, "self")
    return _scaled(layout, shape, lambda part: part(saved(node, "self")).clamp_max(0.0))


def _added(
    layout: Layout, shape: Shape, factor: float = 1.0, parameter: Shape | None = None
) -> ParameterInput:
    """Return what is broadcast as a tensor of ``shape`` would be, times a factor, and added."""

    def term(cotangent: Tensor, examples: int) -> Term:
        taken = take(layout, cotangent, examples)
        gradients = _collected(taken, layout, shape)
        if factor != 1.0:
            gradients = gradients * factor
        mine = shape if parameter is None else parameter
        return Materialized(gradients.reshape(-1, *mine), mine)

    return _parameter_input("added", term)


def _scaled(
    layout: Layout,
    shape: Shape,
    other: Callable[[Callable[[Tensor], Tensor]], Tensor],
    parameter: Shape | None = None,
) -> ParameterInput:
    """Return what is broadcast as a tensor of ``shape`` would be, and multiplied by another.

    ``other`` is given a function that takes some examples' part of a tensor.
    """

    def term(cotangent: Tensor, examples: int) -> Term:
        taken = take(layout, cotangent, examples)
        rows = []
        for part in reductions.parts(examples, 4 * taken[0].numel(), None):

            def some(tensor: Tensor, part: slice = part) -> Tensor:
                axis, _ = layout.axis()
                inner = layout.moved(tuple(tensor.shape), axis)
                return reductions.at_least_single(take(inner, tensor, part.stop)[part])

            rows.append(_collected(other(some) * taken[part], layout, shape))
        mine = shape if parameter is None else parameter
        return Materialized(torch.cat(rows).reshape(-1, *mine), mine)

    return _parameter_input("scaled", term)


def _collected(taken: Tensor, layout: Layout, shape: Shape) -> Tensor:
    """Return each example's sum over the axes along which ``shape`` was broadcast."""
    aligned = [1] * (len(layout.shape) - len(shape)) + list(shape)
    summed = [
        place for place, size in enumerate(aligned, start=1) if size == 1 and taken.shape[place] > 1
    ]
    if not summed:
        return taken
    return taken.sum(dim=summed, dtype=reductions.single_or_double(taken))


_OPERANDS = {
    "Addmm": ("mat1", "mat2"),
    "Addmv": ("mat", "vec"),
    "Baddbmm": ("batch1", "batch2"),
    "Bmm": ("self", "mat2"),
    "Mm": ("self", "mat2"),
    "Mv": ("self", "vec"),
}
"""The names under which the factors of a product are saved."""

_Rule = Callable[[Any, Layout, int, Shape], Layout | ParameterInput | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_OPERANDS, _matrices),
    "Convolution": _convolution,
    "CudnnBatchNorm": _batch_norm,
    "Embedding": _embedding,
    "EmbeddingBag": _embedding_bag,
    "MiopenBatchNorm": _batch_norm,
    "NativeBatchNorm": _batch_norm,
    "NativeGroupNorm": _group_norm,
    "NativeLayerNorm": _layer_norm,
}
_FACTORS: dict[str, _Rule] = {
    "Add": _plus,
    "Div": _over,
    "Expand": _plus,
    "Mul": _times,
    "Pow": _power,
    "PreluKernel": _prelu,
    "Repeat": _repeated,
    "Sub": _plus,
}
