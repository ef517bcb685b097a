"""Operations without a rule, tried out: where their examples lie, and what each one gives.

Guarantees: a position is accepted only if it is the single one at which an example's cotangent
stays with that example; nothing is guessed where several would do. Autograd nodes are called as the
backward pass calls them, with the cotangent of one example and zeros for the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cabs_torch import norms
from cabs_torch.joins import Join
from cabs_torch.layout import Layout, MixedError
from cabs_torch.nodes import Node, call, is_own_function, is_packed, shape_of
from cabs_torch.terms import Formed, Term


def check(node: Node) -> None:
    """Raise if a node cannot be called apart from the backward pass.

    Raises:
        MixedError: If it is that of a compiled function, which overwrites what it saved.
        HiddenError: If it runs a backward pass of its own.
    """
    if node.name() == "CompiledFunctionBackward":
        raise MixedError("is a compiled function; compile the step with cabs_torch.compile")
    if is_own_function(node) and not is_packed(node):
        described = node._input_metadata
        call(node, [torch.zeros(d.shape, dtype=d.dtype, device=d.device) for d in described])


def positions(node: Node, output: int, layout: Layout, index: int) -> Layout | None:
    """Return where the examples lie in a node's ``index``-th input, given one of its outputs.

    None if no gradient reaches that input. Looks at values, which waits for the device.

    Raises:
        MixedError: If examples are mixed, or it cannot be told where they lie.
    """
    if norms.is_traced():
        raise MixedError("has no rule, and cannot be tried out while it is traced")
    if is_packed(node):
        raise MixedError("has no rule, and cannot be tried out inside of a checkpoint")
    described = node._input_metadata[output]
    pattern = torch.arange(math.prod(layout.shape), device=described.device).cos() + 1.5
    pattern = pattern.to(described.dtype).reshape(layout.shape)
    found: set[int] | None = None
    for example in sorted({0, 1, layout.examples - 1}):
        cotangents: list[Tensor | None] = [None] * len(node._input_metadata)
        cotangents[output] = layout.only(pattern, example)
        gradient = call(node, cotangents)[index]
        if gradient is not None:
            places = _outers(gradient, layout.examples, example)
            found = places if found is None else found & places
    if found is None:
        return None
    if len(found) != 1:
        problem = "they could lie in several ways in" if found else "they are mixed in"
        raise MixedError(f"has no rule; tried out with single examples, {problem} its input")
    return Layout(shape_of(node.next_functions[index]), found.pop(), layout.examples)


def _outers(gradient: Tensor, examples: int, example: int) -> set[int]:
    """Return the positions at which a gradient is that of one example alone."""
    found, before = set(), 1
    for size in gradient.shape:
        for inside in range(1, size // examples + 1):
            if size % (inside * examples) == 0:
                outer = before * inside
                blocks = gradient.reshape(outer, examples, -1).clone()
                blocks[:, example] = 0.0
                if not bool(blocks.any()):
                    found.add(outer)
        before *= size
    return found


class Calls:
    """The gradients of a node's parameters, from calling it for one example after the other.

    Args:
        node: The node.
        layouts: Where the examples lie in those of its outputs that the losses depend on.
    """

    def __init__(self, node: Node, layouts: dict[int, Layout]) -> None:
        self._node = node
        self._layouts = layouts
        self._indices: set[int] = set()
        self._rows: list[list[Tensor | None]] = []

    def join(self, index: int) -> Join:
        """Return the join of the node's ``index``-th input."""
        self._indices.add(index)
        waiting = self._indices

        def term(cotangents: Sequence[Tensor | None], examples: int) -> Term | None:
            if not self._rows:
                self._rows = [self._call(cotangents, example) for example in range(examples)]
            rows = [row[index] for row in self._rows]
            waiting.discard(index)
            if not waiting:
                self._rows = []
            given = [row for row in rows if row is not None]
            if not given:
                return None
            shape = shape_of(self._node.next_functions[index])
            return Formed(torch.stack(given).reshape(-1, *shape))

        return Join("called", term)

    def _call(self, cotangents: Sequence[Tensor | None], example: int) -> list[Tensor | None]:
        alone = [
            None
            if one is None or number not in self._layouts
            else self._layouts[number].only(one, example)
            for number, one in enumerate(cotangents)
        ]
        return call(self._node, alone)
