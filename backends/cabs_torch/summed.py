"""Which gradients are made as the sum of the per-example gradients, instead of by PyTorch.

Guarantees: where an example's gradient is materialized to be squared, nothing is multiplied twice;
a parameter is chosen only if it is used once, if nothing but the end of the pass waits for its
gradient, and if the operation that uses it runs in the backward pass anyway, since other gradients
need it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from cabs_torch import tracing
from cabs_torch.graph.autograd_nodes import Node, is_leaf, name_of
from cabs_torch.norms.arrays import TorchArrays
from cabs_torch.rules.batch_axis import PERMUTING
from cabs_torch.walk import Found, Meeting

# Products for a batch below which a gradient of its own costs more calls than it saves.
_WORTHWHILE = 2**23


@dataclass(frozen=True)
class Summed:
    """The parameters chosen, and what PyTorch is left to differentiate."""

    meetings: Sequence[Meeting] = ()
    """Where they are used."""
    others: Sequence[Tensor] | None = None
    """All other tensors behind the losses that have a gradient; None for no choice."""


def choose(losses: Tensor, walk: Found, arrays: TorchArrays) -> Summed:
    """Return the parameters whose gradients are summed from those of the examples."""
    if walk.checkpoints or tracing.is_traced() or is_reduced_over_ranks():
        return Summed()
    worthwhile = {
        id(meeting)
        for meeting in walk.meetings
        if meeting.input.spared is not None
        and meeting.input.spared(meeting.node, arrays) * len(losses) >= _WORTHWHILE
    }
    if not worthwhile:
        return Summed()
    uses = Counter(leaf for meeting in walk.meetings for leaf in meeting.source.leaves)
    usable = [
        meeting
        for meeting in walk.meetings
        if is_leaf(meeting.source.origin[0])
        and uses[meeting.source.origin[0]] == 1
        and all(name_of(node) in _STRAIGHT for node, _ in meeting.source.path)
    ]
    # A convolution leaves out the gradient of its weight only together with that of its bias.
    nodes = {
        one.node for one in usable if id(one) in worthwhile and name_of(one.node) == "Convolution"
    }
    candidates = [one for one in usable if id(one) in worthwhile or one.node in nodes]
    leaves, behind = _behind(losses.grad_fn, {one.source.origin[0] for one in candidates})
    chosen = [
        meeting
        for meeting in candidates
        if any(behind.get(child, False) for child, _ in meeting.node.next_functions)
    ]
    if not all(map(_is_as_it_was, leaves)):
        return Summed()
    made = {meeting.source.origin[0] for meeting in chosen}
    return Summed(chosen, [leaf.variable for leaf in leaves if leaf not in made])


def _is_as_it_was(leaf: Node) -> bool:
    """Return whether a parameter still asks for the gradient that the graph would give it.

    It does not if it was frozen, or its data replaced, after the forward pass.
    """
    parameter = leaf.variable
    return parameter.requires_grad and get_gradient_edge(parameter).node is leaf


_STRAIGHT = frozenset({*PERMUTING, "ToCopy"})
"""Operations on a parameter whose backward pass costs nothing worth speaking of."""


def is_reduced_over_ranks() -> bool:
    """Return whether somebody may wait for each gradient, to send it to other processes."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()


def _behind(last: Node, candidates: Container[Node]) -> tuple[list[Node], dict[Node, bool]]:
    """Return all leaves of a graph, and whether behind a node lies one that is no candidate."""
    leaves, found = [], dict[Node, bool]()
    # A stack of its own, since graphs can be deeper than Python's.
    waiting = [(last, False)]
    while waiting:
        node, is_known = waiting.pop()
        if is_known:
            found[node] = any(found[child] for child, _ in node.next_functions if child is not None)
        elif node in found:
            continue
        elif is_leaf(node):
            leaves.append(node)
            found[node] = node not in candidates
        else:
            found[node] = False
            waiting.append((node, True))
            waiting.extend((child, False) for child, _ in node.next_functions if child is not None)
    return leaves, found
