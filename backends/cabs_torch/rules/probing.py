"""Operations without a rule, tried out: where their examples lie, and what each one gives.

Guarantees: a position is accepted only if it is the single one at which the cotangents of examples
stay with them, for every pair; nothing is guessed where several would do. Autograd nodes are called
as the backward pass calls them, with the cotangents of some examples and zeros for the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cabs.gradients.errors import UncoveredParameterError
from cabs.gradients.layout import Layout, MixedError, Shape
from cabs.gradients.terms import Materialized, Term
from cabs_torch import tracing
from cabs_torch.errors import HiddenError
from cabs_torch.graph.autograd_nodes import (
    Node,
    call,
    is_own_function,
    is_packed,
    shape_of,
    zeros_for,
)
from cabs_torch.graph.collectives import Sent, is_collective, refuse
from cabs_torch.ranks.process_groups import is_distributed, ranks
from cabs_torch.rules.broadcast import ParameterInput
from cabs_torch.rules.layout import only


def check(node: Node) -> None:
    """Raise if a node cannot be called apart from the backward pass.

    Raises:
        UncoveredParameterError: If it passes numbers from rank to rank, as far as its backward pass
            shows.
        MixedError: If it is that of a compiled function, which overwrites what it saved, or of a
            function that does so.
        HiddenError: If it runs a backward pass of its own.
    """
    if is_collective(node):
        refuse(node)
    if node.name() == "CompiledFunctionBackward":
        raise MixedError("is a compiled function; compile the step with cabs_torch.compile")
    if not is_own_function(node) or is_packed(node):
        return
    attributes: dict[str, Any] = node.__dict__
    kept = dict(attributes)
    before = [(one, one.detach().clone(), one._version) for one in _tensors(kept)]
    try:
        with Sent(partial(refuse, node)) if ranks() > 1 else nullcontext():
            call(node, zeros_for(node))
    except (HiddenError, MixedError, UncoveredParameterError):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise MixedError(
            f"cannot be tried out before the backward pass ({kind}: {error})"
        ) from error
    finally:
        is_changed = attributes.keys() != kept.keys()
        attributes.clear()
        attributes.update(kept)
        for one, copy, version in before:
            if one._version != version:
                is_changed = True
                one.detach().copy_(copy)
    if is_changed:
        raise MixedError("changes in its backward pass what it kept")


def _tensors(kept: Any) -> list[Tensor]:
    """Return the tensors that a function keeps, in attributes of its own."""
    if isinstance(kept, Tensor):
        return [kept]
    if isinstance(kept, dict):
        kept = list(kept.values())
    inner = kept if isinstance(kept, (list, tuple)) else ()
    return [tensor for one in inner for tensor in _tensors(one)]


def positions(node: Node, output: int, layout: Layout, index: int) -> Layout | None:
    """Return where the examples lie in a node's ``index``-th input, given one of its outputs.

    None if no gradient passes to that input. Looks at values, which waits for the device.

    Raises:
        MixedError: If examples are mixed, or it cannot be told where they lie.
    """
    if tracing.is_traced():
        raise MixedError("has no rule, and cannot be tried out while it is traced")
    if is_packed(node):
        raise MixedError("has no rule, and cannot be tried out inside of a checkpoint")
    described = node._input_metadata[output]
    pattern = torch.arange(math.prod(layout.shape), device=described.device).cos() + 1.5
    pattern = pattern.to(described.dtype).reshape(layout.shape)
    shape = shape_of(node.next_functions[index])
    found = _outers(shape, layout.examples)
    is_zero = True
    for members in _sets(layout.examples):
        cotangents: list[Tensor | None] = [None] * len(node._input_metadata)
        cotangents[output] = only(layout, pattern, members)
        gradient = call(node, cotangents)[index]
        if gradient is not None:
            if is_distributed(gradient):
                raise MixedError("computes a DTensor, of which this rank may hold a part")
            is_zero = is_zero and not bool(gradient.any())
            found = [
                outer
                for outer in found
                if _reached(gradient, outer, layout.examples) <= set(members)
            ]
    if is_zero:
        return None
    if not found and not _outers(shape, layout.examples):
        raise MixedError(
            f"has no rule, and passes a gradient to an input of shape {shape}, in which "
            f"{layout.examples} examples have no place"
        )
    if not found:
        raise MixedError(
            "mixes examples, or picks or reorders them: the gradient of some reaches others"
        )
    if len(found) > 1:
        raise MixedError("has no rule, and its gradients leave open where the examples lie")
    return Layout(shape, found[0], layout.examples)


def _sets(examples: int) -> Iterator[list[int]]:
    """Yield sets of examples; for any two examples one set holds the first but not the second.

    The fewest that do: each example is in half of the sets, and no two in the same (Sperner).
    """
    count = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= examples)
    places = list(itertools.islice(itertools.combinations(range(count), count // 2), examples))
    for number in range(count):
        yield [example for example, place in enumerate(places) if number in place]


def _outers(shape: Shape, examples: int) -> list[int]:
    """Return the positions at which a tensor of a shape can hold examples."""
    found, before = set(), 1
    for size in shape:
        for inside in range(1, size // examples + 1):
            if size % (inside * examples) == 0:
                found.add(before * inside)
        before *= size
    return sorted(found)


def _reached(gradient: Tensor, outer: int, examples: int) -> set[int]:
    """Return which examples a gradient is not 0 for, if they lie at a position."""
    blocks = gradient.reshape(outer, examples, -1)
    return set(blocks.any(dim=2).any(dim=0).nonzero().flatten().tolist())


class Calls:
    """The gradients of a node's parameters, from calling it for one example after the other.

    Args:
        node: The node.
        layouts: Where the examples lie in those of its outputs that the losses depend on.
    """

    def __init__(self, node: Node, layouts: dict[int, Layout]) -> None:
        self._node = node
        self._layouts = layouts
        self._waiting: set[int] = set()
        self._rows: list[list[Tensor | None]] = []

    def parameter_input(self, index: int) -> ParameterInput:
        """Return the node's ``index``-th input, as that of a parameter."""
        self._waiting.add(index)

        def term(_: Node, cotangents: Sequence[Tensor | None], examples: int) -> Term | None:
            if not self._rows:
                self._rows = [self._call(cotangents, example) for example in range(examples)]
            rows = [row[index] for row in self._rows]
            self._waiting.discard(index)
            if not self._waiting:
                self._rows = []
            given = [row for row in rows if row is not None]
            if not given:
                return None
            shape = shape_of(self._node.next_functions[index])
            return Materialized(torch.stack(given).reshape(-1, *shape), shape)

        return ParameterInput("called", term)

    def _call(self, cotangents: Sequence[Tensor | None], example: int) -> list[Tensor | None]:
        alone = [
            None
            if one is None or number not in self._layouts
            else only(self._layouts[number], one, [example])
            for number, one in enumerate(cotangents)
        ]
        return call(self._node, alone)
