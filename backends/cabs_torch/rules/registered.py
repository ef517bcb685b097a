"""Rules for operations of one's own, such as a fused kernel.

Guarantees: what a rule returns is checked for its shape; that it is right is the user's promise,
which :func:`cabs_torch.verify` holds against a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cabs.gradients.layout import Layout, MixedError, Shape
from cabs.gradients.terms import Materialized, Product, Term
from cabs_torch.graph.autograd_nodes import Node, filled, readable


class OuterProduct(NamedTuple):
    """Gradients of a matrix of shape (k, h): left' right, summed over T positions.

    ``left`` has shape (m, k) or (m, T, k), and ``right`` (m, h) or (m, T, h). Their squared norms
    cost less than the gradients themselves.

    Example:
        >>> import torch, cabs_torch
        >>> cabs_torch.OuterProduct(torch.ones(8, 3), torch.ones(8, 5)).left.shape
        torch.Size([8, 3])
    """

    left: Tensor
    right: Tensor


Rule = Callable[..., OuterProduct | Tensor]

_rules: dict[object, dict[int, Rule]] = {}


def register_rule(function: type | str, parameters: Mapping[int, Rule]) -> None:
    """Say what the per-example gradients of an operation of one's own are.

    Without a rule, :func:`cabs_torch.backward` calls the backward pass of such an operation once
    for each example. A rule holds for all calls from now on; a later one takes its place.

    Args:
        function: A ``torch.autograd.Function`` whose output and data have the examples along their
            first axes, and that keeps them apart; or the name of its node,
            ``output.grad_fn.name()``, for operations that others define; it holds for all of that
            name.
        parameters: For each parameter, by its place among the arguments of ``forward`` behind
            ``ctx``, counted from 0: a function of ``ctx`` (with ``saved_tensors`` and whatever else
            the forward pass kept) and the cotangents of all outputs, shapes (m, ...), as
            ``backward`` has them, which it must not change. It returns the gradients of all m
            examples, shape (m, ...) with the parameter's shape behind, or an
            :class:`OuterProduct`.

    Raises:
        TypeError: If ``function`` is neither, or the parameters are no functions by places.

    Example:
        >>> import torch, cabs_torch
        >>> class Scaled(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x, scale):
        ...         ctx.save_for_backward(x, scale)
        ...         return x * scale
        ...     @staticmethod
        ...     def backward(ctx, cotangent):
        ...         x, scale = ctx.saved_tensors
        ...         return cotangent * scale, (cotangent * x).sum(dim=0)
        >>> cabs_torch.register_rule(
        ...     Scaled, {1: lambda ctx, cotangent: cotangent * ctx.saved_tensors[0]}
        ... )
        >>> scale = torch.ones(3, requires_grad=True)
        >>> losses_of = lambda x: Scaled.apply(x, scale).square().sum(dim=1)
        >>> [row.rule for row in cabs_torch.verify(losses_of, torch.eye(4, 3)).rows]
        ['registered for Scaled']
    """
    is_function = isinstance(function, type) and issubclass(function, torch.autograd.Function)
    if not (is_function or isinstance(function, str)):
        raise TypeError(
            "function must be a torch.autograd.Function, or the name of a node, got "
            f"{function!r}; give the class, not what it returns"
        )
    given: Any = parameters
    places = given if isinstance(given, Mapping) else {}
    if not places or not all(
        type(place) is int and place >= 0 and callable(rule) for place, rule in places.items()
    ):
        raise TypeError(
            "parameters must hold a function for each place of a parameter among the arguments, "
            f"counted from 0, got {parameters!r}"
        )
    _rules[function] = dict(parameters)


def registered() -> dict[object, dict[int, Rule]]:
    """Return all rules, as they are now."""
    return dict(_rules)


def rules_of(node: Node) -> dict[int, Rule] | None:
    """Return the rules that are registered for a node's operation."""
    if not _rules:
        return None
    return _rules.get(getattr(node, "_forward_cls", None), _rules.get(node.name()))


def name_of_rule(node: Node) -> str:
    """Return what the operation of a rule is called."""
    function: Any = getattr(node, "_forward_cls", None)
    return f"registered for {function.__name__ if function in _rules else node.name()}"


def place_of(node: Node, index: int) -> int:
    """Return which argument of the forward pass a node's ``index``-th input is."""
    wanted: list[bool] | None = getattr(node, "needs_input_grad", None)
    if wanted is None:
        # An operation of PyTorch's own, which has tensors alone.
        return index
    # Inputs are those of tensors, and those with a graph those of which a gradient is needed.
    before = sum(child is not None for child, _ in node.next_functions[:index])
    return [at for at, is_wanted in enumerate(wanted) if is_wanted][before]


def check_leading(layout: Layout) -> None:
    """Raise MixedError unless the examples lie along the first axis of an output."""
    if layout.axis() != (0, 1) or layout.shape[0] != layout.examples:
        raise MixedError("must have its examples along the first axis, as registered rules assume")


def term(
    rule: Rule, shape: Shape, node: Node, cotangents: Sequence[Tensor | None], examples: int
) -> Term | None:
    """Return what a rule says of the first examples; None if no gradient passes.

    Raises:
        ValueError: If it has other shapes than those of a parameter of this shape.
        RuntimeError: If it changes a cotangent.
    """
    if all(one is None for one in cotangents):
        return None
    given = filled(node, cotangents)
    versions = [one._version for one in given]
    with readable(node):
        found = rule(node, *given)
    if versions != [one._version for one in given]:
        raise RuntimeError(
            f"the rule {name_of_rule(node)} must not change a cotangent, of which the "
            "gradients are made; let it work on a copy"
        )
    count = next(len(one) for one in cotangents if one is not None)
    wanted = (count, *shape)
    got: object = tuple(getattr(found, "shape", ())) or found
    if isinstance(found, OuterProduct) and all(isinstance(side, Tensor) for side in found):
        got = [tuple(side.shape) for side in found]
        left, right = (side[:, None] if side.dim() == 2 else side for side in found)
        if (
            left.dim() == right.dim() == 3
            and left.shape[:2] == right.shape[:2]
            and (len(left), left.shape[2], right.shape[2]) == wanted
        ):
            return Product.of_matrix(left[:examples, None], right[:examples, None], shape)
    elif isinstance(found, Tensor) and got == wanted and found.dtype.is_floating_point:
        return Materialized(found[:examples], shape)
    raise ValueError(
        f"the rule {name_of_rule(node)} must return gradients of shape {wanted}, or an "
        f"OuterProduct for a parameter of shape {shape}, got {got}"
    )
