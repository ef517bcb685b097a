"""Where the parameters of a model meet its batch, found by walking the autograd graph.

Guarantees: every parameter that the losses depend on is met by a rule exactly once, or an error
names it; nothing is computed and nothing is changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cabs_torch import norms
from cabs_torch.errors import UncoveredParameterError, uncovered
from cabs_torch.layout import (
    ADDING,
    REARRANGING,
    Layout,
    MixedError,
    Node,
    Shape,
    along_examples,
    is_measurable,
    name_of,
    of_input,
    shape_of,
)


class Join(NamedTuple):
    """An operation in which a parameter meets the batch."""

    node: Node
    """The operation's node; its first output's cotangent is what the rule wants."""
    sum_of_squares: Callable[[Tensor], Tensor]
    """From that cotangent, the sum over examples of the squared norm of their shares."""


class Walk:
    """One walk from the losses to the parameters.

    Args:
        losses: One loss an example, shape (m,) with m at least 2, with a graph.

    Raises:
        UncoveredParameterError: If the squared norms of a parameter cannot be had exactly.
    """

    def __init__(self, losses: Tensor) -> None:
        self.joins: list[Join] = []
        # By the parameter, since one parameter can have several nodes.
        self.leaves: dict[int, Node] = {}
        layouts: dict[tuple[Node, int], Layout] = {}
        # A stack of its own, since graphs can be deeper than Python's.
        start: Node = losses.grad_fn
        waiting = [(start, losses.output_nr, Layout(tuple(losses.shape), 1, len(losses)))]
        while waiting:
            node, output, layout = waiting.pop()
            known = layouts.setdefault((node, output), layout)
            if known is not layout:
                if known != layout:
                    raise _refused(node, "has its examples in two different orders")
                continue
            if not is_measurable(node, output):
                raise _refused(node, "computes complex numbers, or none at all")
            if _is_leaf(node):
                raise uncovered(node.variable, "holds a value for every example of the batch")
            for index, (child, number) in enumerate(node.next_functions):
                if child is not None:
                    entered = self._enter(node, layout, index)
                    if entered is not None:
                        waiting.append((child, number, entered))

    def _enter(self, node: Node, layout: Layout, index: int) -> Layout | None:
        """Join an input that is a parameter's, or return the layout of one that is the data's."""
        name = name_of(node)
        try:
            if name in _FACTORS:
                return self._matrix(node, layout, index)
            if name == "Convolution":
                return self._convolution(node, layout, index)
            inner = of_input(node, layout, index)
        except MixedError as problem:
            raise _refused(node, str(problem)) from None
        if inner is None:
            self._broadcast(node, layout, index)
        return inner

    def _broadcast(self, node: Node, layout: Layout, index: int) -> None:
        """Join x + b, x - b or b alone, with b the same for all examples."""
        source = _source_of(node.next_functions[index][0])
        if not _is_leaf(source):
            raise _refused(source, "is broadcast over the examples, as a batch's mean would be")
        if name_of(node) not in ADDING:
            raise _refused(node, "is no addition, and there is no other rule for one")
        factor = 1.0 if index == 0 else float(node._saved_alpha)
        self._shift(node, layout, index, shape_of(*node.next_functions[index]), factor)

    def _matrix(self, node: Node, layout: Layout, index: int) -> Layout | None:
        """Join y = x W, or y = b + x W, with the examples in the rows of x."""
        left, saved = _FACTORS[name_of(node)]
        height = layout.shape[1] if len(layout.shape) == 2 else 1
        if layout.inner % height:
            raise MixedError("has the examples in its columns")
        shape = shape_of(*node.next_functions[index])
        if index == left:
            return layout._replace(shape=shape)
        if getattr(node, "_saved_alpha", 1) != 1 or getattr(node, "_saved_beta", 1) != 1:
            raise MixedError("scales its terms")
        if index < left:
            if len(shape) == 2 and shape[0] != 1:
                raise MixedError("adds a value for every row")
            self._shift(node, layout, index, shape)
            return None
        _check_saved(node, saved)

        def sum_of_squares(cotangent: Tensor) -> Tensor:
            inputs = norms.by_example(getattr(node, f"_saved_{saved}"), layout)
            rows = cotangent.reshape(-1, height)
            return norms.matrix(inputs, norms.by_example(rows, layout))

        self._join(node, index, sum_of_squares)
        return None

    def _convolution(self, node: Node, layout: Layout, index: int) -> Layout | None:
        if layout.axis()[0] != 0:
            raise along_examples()
        if index == 0:
            return layout.moved(shape_of(*node.next_functions[0]), 0)
        if index == 2:
            self._shift(node, layout, 2, (layout.shape[1], *(1 for _ in layout.shape[2:])))
            return None
        if node._saved_transposed:
            raise MixedError("is transposed")
        _check_saved(node, "input")
        kernel = shape_of(*node.next_functions[1])[2:]

        def sum_of_squares(cotangent: Tensor) -> Tensor:
            return norms.convolution(
                node._saved_input,
                cotangent,
                layout,
                kernel=kernel,
                stride=node._saved_stride,
                padding=node._saved_padding,
                dilation=node._saved_dilation,
                groups=node._saved_groups,
            )

        self._join(node, 1, sum_of_squares)
        return None

    def _shift(
        self, node: Node, layout: Layout, index: int, shape: Shape, factor: float = 1.0
    ) -> None:
        """Join what is broadcast as a tensor of ``shape`` would be, times a factor, and added."""

        def sum_of_squares(cotangent: Tensor) -> Tensor:
            return norms.shift(cotangent, layout, shape) * factor**2

        self._join(node, index, sum_of_squares)

    def _join(self, node: Node, index: int, rule: Callable[[Tensor], Tensor]) -> None:
        """Note that the parameter behind an input is covered by a rule."""
        leaf = _source_of(node.next_functions[index][0])
        if not _is_leaf(leaf):
            raise _refused(leaf, f"comes between it and {node.name()}, where it meets the batch")
        if not is_measurable(*node.next_functions[index]) or not is_measurable(leaf, 0):
            raise uncovered(leaf.variable, f"holds complex numbers, or none, in {node.name()}")
        if id(leaf.variable) in self.leaves:
            raise uncovered(leaf.variable, f"is used more than once, here by {node.name()}")
        if leaf.variable._backward_hooks:
            raise uncovered(leaf.variable, "has a hook, which can change its gradient")
        self.leaves[id(leaf.variable)] = leaf
        self.joins.append(Join(node, rule))


# Operations x W, which of their inputs is x, and under which name it was saved.
_FACTORS = {"Mm": (0, "self"), "Mv": (0, "self"), "Addmm": (1, "mat1")}


def _check_saved(node: Node, name: str) -> None:
    """Raise MixedError if an input cannot be read a second time, or is sparse."""
    saved = getattr(node, f"_raw_saved_{name}")
    if saved.data is None:
        raise ValueError(
            "losses must carry a graph that no backward pass has used yet; compute them again"
        )
    if saved.unpack_hook is not None:
        raise MixedError("has its input packed by a hook, as checkpointing does")
    if saved.data.layout is not torch.strided:
        raise MixedError("has a sparse input")


def _is_leaf(node: Node) -> bool:
    return bool(node.name() == "torch::autograd::AccumulateGrad")


def _source_of(node: Node) -> Node:
    """Return the node whose output a node rearranges, or the node itself."""
    while name_of(node) in REARRANGING:
        node, _ = node.next_functions[0]
    return node


def _refused(node: Node, problem: str) -> UncoveredParameterError:
    """Return the error that names an operation and a parameter behind it.

    That is one of the operation's own inputs if there is one, and the nearest otherwise.
    """
    inputs = [_source_of(child) for child, _ in node.next_functions if child is not None]
    leaf = next(filter(_is_leaf, [node, *inputs]), None) or _nearest_leaf(node)
    return uncovered(leaf.variable, f"lies behind {node.name()}, which {problem}")


def _nearest_leaf(node: Node) -> Node:
    seen, waiting = {node}, deque([node])
    while not _is_leaf(waiting[0]):
        for child, _ in waiting.popleft().next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return waiting[0]
