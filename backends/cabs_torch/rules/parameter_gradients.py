"""The operations in which parameters meet the batch, and what follows for their gradients.

Guarantees: for each input of such an operation it is said either where the examples lie in it, or
how the per-example gradients of the parameter behind it follow from what the operation saved and
its output's cotangent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cabs.gradients.layout import Layout, MixedError, Shape, along_examples
from cabs.gradients.outer_products import spared
from cabs.gradients.terms import Lookup, Materialized, Product, Term
from cabs_torch.graph.autograd_nodes import Node, check_saved, name_of, saved, shape_of, signed
from cabs_torch.norms import reductions
from cabs_torch.norms.alike import of_matrix
from cabs_torch.norms.arrays import TorchArrays
from cabs_torch.norms.bags import Bags
from cabs_torch.norms.convolution import Convolution
from cabs_torch.rules.batch_axis import of_input
from cabs_torch.rules.broadcast import FACTORS, ParameterInput, Part, added, parameter_input, scaled
from cabs_torch.rules.layout import take
from cabs_torch.rules.registered import check_leading, name_of_rule, place_of, rules_of
from cabs_torch.rules.registered import term as registered_term


def enter(
    node: Node, output: int, layout: Layout, index: int, shape: Shape
) -> Layout | ParameterInput | None:
    """Return where the examples lie in a node's input of a shape, or that it is a parameter.

    ``layout`` is that of one of the node's outputs. Parameters get their gradients through the
    first output, and nothing from others. None if the input is the same for all examples, and there
    is no rule for its gradients.

    Raises:
        MixedError: If the operation mixes examples, or saved what is sparse.
        UnknownError: If there is no rule for the operation at all.
        ValueError: If what it saved is gone.
    """
    found = _found(node, output, layout, index, shape)
    if isinstance(found, ParameterInput):
        check_saved(node, *found.reads)
    return found


def _found(
    node: Node, output: int, layout: Layout, index: int, shape: Shape
) -> Layout | ParameterInput | None:
    rules = rules_of(node)
    if rules is not None:
        check_leading(layout)
        rule = rules.get(place_of(node, index))
        if rule is None:
            return layout.leading(shape)
        found = partial(registered_term, rule, shape)
        return ParameterInput(name_of_rule(node), found, of_all_outputs=True)
    find = _RULES.get(name_of(node))
    if find is not None:
        return find(node, layout, index, shape)
    inner = of_input(node, output, layout, index, shape)
    if inner is None and (factor := FACTORS.get(name_of(node))) is not None:
        return factor(node, layout, index, shape)
    return inner


def _matrices(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | ParameterInput:
    """Y = A X or C + A X, with a vector X, or with blocks of matrices side by side."""
    first, second = _OPERANDS[name_of(node)]
    operand = index - (len(node.next_functions) - 2)
    if operand < 0:
        return layout.broadcast(shape) or added(layout, shape, float(node._saved_beta))
    axis, _ = layout.axis()
    is_vector = name_of(node) in ("Addmv", "Mv")
    blocks = len(layout.shape) - (1 if is_vector else 2)
    if axis < blocks or axis - blocks == operand:
        # Each example has matrices of its own, or rows of A, which are those of Y, or columns of X.
        return layout.moved(shape, axis)
    other = second if operand == 0 else first
    factor = float(getattr(node, "_saved_alpha", 1.0))
    is_plain = blocks == 0 and layout.axis() == (0, 1)
    placed = Product.axes(shape)

    def term(node: Node, cotangent: Tensor, examples: int) -> Term:
        inputs, outputs = saved(node, other), cotangent if factor == 1.0 else cotangent * factor
        if is_vector:
            outputs = outputs.unsqueeze(-1)
        if operand == 0:
            inputs, outputs = inputs.mT, outputs.mT
        sides = []
        for side in (inputs, outputs):
            if is_plain:
                rows = side.reshape(layout.examples, 1, -1, side.shape[1])
                sides.append(rows if examples == layout.examples else rows[:examples])
                continue
            taken = take(layout.moved(tuple(side.shape), blocks), side, examples)
            sides.append(taken if blocks else taken.unsqueeze(1))
        left, right = sides if operand == 1 else sides[::-1]
        return Product(left, right, shape, *placed)

    length, is_matrix = layout.shape[axis] // layout.examples, len(shape) == 2 and not is_vector

    def of_example(_: Node, arrays: TorchArrays) -> int:
        return spared(arrays, length, *shape) if is_matrix else 0

    together = None
    if is_plain and is_matrix and factor == 1.0:
        together = of_matrix(other, layout.examples, length, *shape)
    return parameter_input("matrix", term, (other,), of_example, together)


def _convolution(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | ParameterInput:
    if index == 0:
        return layout.leading(shape)
    if layout.axis()[0] != 0:
        raise along_examples()
    if index == 2:
        return added(layout, _channels(layout), parameter=shape)
    # One number for all axes stays one number, as in conv2d(padding="valid").
    rank = len(shape) - 2
    stride, padding, dilation = (
        list(one) * rank if len(one) == 1 else list(one)
        for one in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )

    is_transposed, groups = node._saved_transposed, node._saved_groups

    def term(node: Node, cotangent: Tensor, examples: int) -> Term:
        kept = saved(node, "input")
        inputs = take(layout.moved(tuple(kept.shape), 0), kept, examples)
        return of_sides(inputs, take(layout, cotangent, examples))

    def of_sides(inputs: Tensor, cotangents: Tensor) -> Convolution:
        sides = (cotangents, inputs) if is_transposed else (inputs, cotangents)
        return Convolution(*sides, shape, stride, padding, dilation, groups)

    def of_kernel(node: Node, arrays: TorchArrays) -> int:
        source, number = node.next_functions[0]
        if source is None:
            return 0
        # Of the tensors, no more than this is looked at.
        known = source._input_metadata[number]
        whole = tuple(known.shape), layout.shape
        scalar = torch.empty((), dtype=known.dtype, device=known.device)
        sizes = ((layout.examples, one[0] // layout.examples, *one[1:]) for one in whole)
        return of_sides(*(scalar.expand(size) for size in sizes)).spared(arrays)

    return parameter_input("convolution", term, ("input",), of_kernel)


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
        return added(layout, shape)
    reads = ("input", "result1", "result2")

    def of_whole(inputs: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        return (inputs - mean).mul_(scale)

    def normalized(node: Node, part: Part) -> Tensor:
        return of_whole(*(part(saved(node, name)) for name in reads))

    return scaled(layout, shape, normalized, reads, of_whole=of_whole)


def _group_norm(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | ParameterInput:  # noqa: ARG001
    if index == 0:
        return layout.leading(shape)
    if layout.axis()[0] != 0:
        raise along_examples()
    channels = _channels(layout)
    if index == 2:
        return added(layout, channels, parameter=shape)

    def term(node: Node, cotangent: Tensor, examples: int) -> Term:
        whole = take(layout, saved(node, "input"), examples), take(layout, cotangent, examples)
        positions = math.prod(layout.shape[2:])
        products, added = [], []
        for part in reductions.parts(examples, 2 * whole[0][0].numel(), None, cotangent.device):
            x, b = (
                reductions.at_least_single(one[part]).reshape(-1, *one.shape[1:3], positions)
                for one in whole
            )
            # As PyTorch's own gradient has it: normalizing each element first takes much longer.
            products.append((x * b).sum(dim=3))
            added.append(b.sum(dim=3))
        mean, scale = (
            take(layout.moved(tuple(one.shape), 0), one, examples).unsqueeze(3)
            for one in (saved(node, "result1"), saved(node, "result2"))
        )
        product, sums = (
            reductions.joined(some).unflatten(2, (node._saved_group, -1))
            for some in (products, added)
        )
        gradients = ((product - mean * sums) * scale).sum(dim=1).flatten(1)
        return Materialized(gradients, tuple(gradients.shape[1:]))

    return parameter_input("scaled", term, ("input", "result1", "result2"))


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
        return added(layout, channels, parameter=shape)
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon

    def normalized(node: Node, part: Part) -> Tensor:
        mean = saved(node, "running_mean").reshape(channels)
        scale = (saved(node, "running_var") + eps).rsqrt().reshape(channels)
        whole: Tensor = (part(saved(node, "input")) - mean).mul_(scale)
        return whole

    reads = ("input", "running_mean", "running_var")
    return scaled(layout, channels, normalized, reads, parameter=shape)


def _embedding(node: Node, layout: Layout, index: int, shape: Shape) -> Layout | ParameterInput:  # noqa: ARG001
    axis, _ = layout.axis()
    if axis == len(layout.shape) - 1:
        raise along_examples()
    if node._saved_scale_grad_by_freq:
        raise MixedError("divides by how often the batch holds an index")

    def term(node: Node, cotangent: Tensor, examples: int) -> Term:
        whole = saved(node, "indices")
        indices = take(layout.moved(tuple(whole.shape), axis), whole, examples).flatten(1)
        return _looked_up(node, indices, take(layout, cotangent, examples).flatten(1, -2), shape)

    return parameter_input("lookup", term, ("indices",))


def _looked_up(node: Node, indices: Tensor, rows: Tensor, shape: Shape) -> Lookup:
    padding = signed(node._saved_padding_idx)
    if padding >= 0:
        rows = rows * (indices != padding).unsqueeze(-1)
    return Lookup(indices, rows, shape)


def looked_up(node: Node, gradients: Tensor) -> Lookup | None:
    """Return the gradients of what a node took, from those of its output, (n, *shape).

    None if it takes a backward pass for each; a table, of which all examples took the same rows,
    takes none.
    """
    if name_of(node) != "Embedding" or node._saved_scale_grad_by_freq:
        return None
    taken = saved(node, "indices").flatten().expand(len(gradients), -1)
    rows = gradients.reshape(*taken.shape, gradients.shape[-1])
    return _looked_up(node, taken, rows, shape_of(node.next_functions[0]))


def _embedding_bag(
    node: Node, layout: Layout, index: int, shape: Shape
) -> Layout | ParameterInput | None:
    if layout.axis()[0] != 0:
        raise along_examples()
    if node._saved_scale_grad_by_freq:
        raise MixedError("divides by how often the batch holds an index")
    if index != 0 or node._saved_mode not in (_SUM, _MEAN):
        return None
    padding = signed(node._saved_padding_idx)

    def term(node: Node, cotangent: Tensor, examples: int) -> Term:
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

    return parameter_input("lookup", term, ("indices", "offsets"))


_SUM, _MEAN = 0, 1


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
