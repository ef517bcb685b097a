"""Parameters that are broadcast over the examples, and added, multiplied or the like.

Guarantees: an example's gradient is summed over the axes along which the parameter was broadcast,
in single precision or better, and nothing larger than a chunk is laid out for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cabs.gradients.layout import Layout, Shape
from cabs.gradients.terms import Materialized, Term
from cabs_torch.graph.autograd_nodes import Node, name_of, saved
from cabs_torch.norms import reductions
from cabs_torch.norms.alike import Together
from cabs_torch.norms.arrays import TorchArrays
from cabs_torch.rules.layout import take


class ParameterInput(NamedTuple):
    """An input of an operation that comes from parameters alone and is shared by all examples.

    It holds no node, so that it is also that of a node that does the same in another graph.
    """

    rule: str
    """How its gradients are computed."""
    term: Callable[[Node, Sequence[Tensor | None], int], Term | None]
    """From the node and the cotangents of its outputs, the gradients of the first so many examples,
    if any are not 0."""
    reads: tuple[str, ...] = ()
    """Which tensors that the node saved are needed for that."""
    of_all_outputs: bool = False
    """Whether gradients come through other outputs than the first, too."""
    together: Together | None = None
    """How the gradients of several parameters are squared in one go, if they are few."""
    spared: Callable[[Node, TorchArrays], int] | None = None
    """Multiplications saved an example if the batch's gradient is the sum of the examples'."""


Part = Callable[[Tensor], Tensor]


def parameter_input(
    rule: str,
    term: Callable[[Node, Tensor, int], Term],
    reads: tuple[str, ...] = (),
    spared: Callable[[Node, TorchArrays], int] | None = None,
    together: Together | None = None,
) -> ParameterInput:
    """Return an input whose gradients depend on the cotangent of the first output."""

    def of_first(node: Node, cotangents: Sequence[Tensor | None], examples: int) -> Term | None:
        # None stands for a cotangent of zeros.
        return None if cotangents[0] is None else term(node, cotangents[0], examples)

    return ParameterInput(rule, of_first, reads, together=together, spared=spared)


def _plus(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput:
    if index == 0:
        return added(layout, shape)
    factor = float(node._saved_alpha)
    return added(layout, shape, -factor if name_of(node) == "Sub" else factor)


def _repeated(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput:  # noqa: ARG001
    aligned = [1] * (len(layout.shape) - len(shape)) + list(shape)
    split = [part for size in aligned for part in (-1, size)]

    def term(_: Node, cotangent: Tensor, examples: int) -> Term:
        taken = take(layout, cotangent, examples)
        # Each axis is a number of repetitions of what was there.
        for place in range(len(split) // 2, 0, -1):
            taken = taken.unflatten(place, split[2 * place - 2 : 2 * place])
        times = list(range(1, len(split), 2))
        gradients = taken.sum(dim=times, dtype=reductions.single_or_double(taken))
        return Materialized(gradients.reshape(-1, *shape), shape)

    return parameter_input("added", term)


def _times(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput:  # noqa: ARG001
    name = "other" if index == 0 else "self"
    other = partial(_expanded, layout, name)
    return scaled(layout, shape, other, (name,), of_whole=lambda saved: saved)


def _expanded(layout: Layout, name: str, node: Node, part: Part) -> Tensor:
    """Return a factor that a node saved, broadcast to its output."""
    return part(saved(node, name).expand(layout.shape))


def _over(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput | None:
    if getattr(node, "_saved_rounding_mode", None) is not None:
        return None
    above, below = partial(_expanded, layout, "self"), partial(_expanded, layout, "other")
    if index == 0:
        return scaled(layout, shape, lambda *of: below(*of).reciprocal(), ("other",))
    return scaled(layout, shape, lambda *of: -above(*of) / below(*of).square(), ("other", "self"))


def _power(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput | None:  # noqa: ARG001
    if index != 1:
        return None

    def slope(node: Node, part: Part) -> Tensor:
        base = _expanded(layout, "self", node, part)
        # The limit at a base of 0, as autograd has it for exponents that are not negative.
        logarithm = torch.where(base == 0.0, 0.0, base.log())
        return part(saved(node, "result")) * logarithm

    return scaled(layout, shape, slope, ("self", "result"))


def _prelu(node: Node, layout: Layout, index: int, shape: Shape) -> ParameterInput | None:  # noqa: ARG001
    if index != 1:
        return None

    def below(node: Node, part: Part) -> Tensor:
        return part(saved(node, "self")).clamp_max(0.0)

    return scaled(layout, shape, below, ("self",))


def added(
    layout: Layout, shape: Shape, factor: float = 1.0, parameter: Shape | None = None
) -> ParameterInput:
    """Return what is broadcast as a tensor of ``shape`` would be, times a factor, and added."""
    axes, mine = layout.broadcast_axes(shape), shape if parameter is None else parameter

    def term(_: Node, cotangent: Tensor, examples: int) -> Term:
        gradients = _summed(take(layout, cotangent, examples), axes)
        if factor != 1.0:
            gradients = gradients * factor
        return Materialized(gradients.reshape(-1, *mine), mine)

    together = _together(layout, axes, (), lambda: factor)
    return parameter_input("added", term, together=together)


def scaled(
    layout: Layout,
    shape: Shape,
    other: Callable[[Node, Part], Tensor],
    reads: tuple[str, ...],
    parameter: Shape | None = None,
    of_whole: Callable[..., Tensor | float] | None = None,
) -> ParameterInput:
    """Return what is broadcast as a tensor of ``shape`` would be, and multiplied by another.

    ``other`` is given the node, and a function that takes some examples' part of a tensor.
    ``of_whole`` returns the same from all examples' tensors that the node saved, if these have an
    axis for each of the output's.
    """
    axes, mine = layout.broadcast_axes(shape), shape if parameter is None else parameter
    needed = 4 * math.prod(layout.shape) // layout.examples

    def term(node: Node, cotangent: Tensor, examples: int) -> Term:
        parts = [*reductions.parts(examples, needed, None, cotangent.device)]
        if len(parts) == 1 and examples == layout.examples:
            whole = other(node, reductions.at_least_single) * cotangent
            gradients = _summed(take(layout, whole, examples), axes)
            return Materialized(gradients.reshape(-1, *mine), mine)
        taken = take(layout, cotangent, examples)
        rows = []
        for part in parts:

            def some(tensor: Tensor, part: slice = part) -> Tensor:
                axis, _ = layout.axis()
                inner = layout.moved(tuple(tensor.shape), axis)
                found = take(inner, tensor, part.stop)
                return reductions.at_least_single(found[part] if part.start else found)

            rows.append(_summed(other(node, some) * taken[part], axes))
        return Materialized(reductions.joined(rows).reshape(-1, *mine), mine)

    together = None if of_whole is None else _together(layout, axes, reads, of_whole)
    return parameter_input("scaled", term, reads, together=together)


def _summed(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    if not axes:
        return values
    return values.sum(dim=axes, dtype=reductions.single_or_double(values))


def _together(
    layout: Layout,
    axes: tuple[int, ...],
    reads: tuple[str, ...],
    other: Callable[..., Tensor | float],
) -> Together | None:
    """Return how gradients are summed for several parameters, if examples lie in front."""
    if layout.axis() != (0, 1):
        return None
    one, factor = layout.one, None if reads else other()

    def of_same_squares(_: TorchArrays, *given: Tensor) -> Tensor:
        *saved, cotangents = map(reductions.at_least_single, given)
        values = cotangents if factor == 1.0 else other(*saved) * cotangents
        return _summed(values.reshape(-1, *one), axes)

    kind = ("summed", one, axes, factor, *reads)
    copied = math.prod(layout.shape) * (1 + len(reads))
    return Together(kind, reads, of_same_squares, layout.examples, copied)


FACTORS: dict[str, Callable[[Any, Layout, int, Shape], ParameterInput | None]] = {
    "Add": _plus,
    "Div": _over,
    "Expand": _plus,
    "Mul": _times,
    "Pow": _power,
    "PreluKernel": _prelu,
    "Repeat": _repeated,
    "Sub": _plus,
}
