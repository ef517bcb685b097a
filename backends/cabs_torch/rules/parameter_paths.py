"""The side of the graph that is the same for all examples: what is made of parameters alone.

Guarantees: what is found here depends on parameters and constants only, as far as the graph shows;
anything that could be the batch's, such as a mean over the examples, is refused. A path that only
rearranges a parameter keeps the norms of its gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cabs.gradients.layout import MixedError, Shape
from cabs_torch.graph.autograd_nodes import (
    Edge,
    Node,
    axes,
    is_leaf,
    is_own_function,
    name_of,
    shape_of,
    signed,
)
from cabs_torch.rules.batch_axis import ELEMENTWISE, KEEPING, MIXING, PERMUTING, permutation


class Source(NamedTuple):
    """Where an operation's parameter comes from."""

    origin: Edge
    """The parameter itself, or the last operation that does more than rearrange."""
    path: tuple[Edge, ...]
    """The operations that rearrange it, the nearest to the batch first."""
    leaves: tuple[Node, ...]
    """The parameters that it is made of."""
    is_lookup: bool
    """Whether rows were taken out of a table, perhaps one for each example."""


def source_of(edge: Edge) -> tuple[Source, list[Node]]:
    """Return where a value that is shared by all examples comes from, and all nodes behind it.

    Raises:
        MixedError: If it could depend on the batch.
    """
    path = []
    while name_of(edge[0]) in _REARRANGING:
        path.append(edge)
        edge = edge[0].next_functions[0]
    kinds = _kinds(edge[0])
    leaves = tuple(node for node in kinds if is_leaf(node))
    source = Source(edge, tuple(path), leaves, kinds[edge[0]])
    return source, [*kinds, *(node for node, _ in path)]


def _kinds(origin: Node) -> dict[Node, bool]:
    """Return for a node and all behind it whether it holds rows that were looked up.

    Raises:
        MixedError: If one of them could depend on the batch.
    """
    kinds: dict[Node, bool] = {}
    # Twice: on the way in, where it is checked, and on the way out, when all behind it are known.
    waiting = [(origin, False)]
    while waiting:
        node, is_known = waiting.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if is_known:
            kinds[node] = name_of(node) in _LOOKUPS or any(kinds[child] for child in children)
            if kinds[node] and name_of(node) in _COMPUTED - _LOOKUPS:
                raise MixedError("is computed from what was looked up, perhaps by examples", node)
        elif node not in kinds:
            kinds[node] = False
            _check(node)
            waiting.append((node, True))
            waiting.extend((child, False) for child in children)
    return kinds


def _check(node: Node) -> None:
    """Raise MixedError if an operation could bring the batch in."""
    name, edges = name_of(node), node.next_functions
    shapes = [shape_of(edge) for edge in edges if edge[0] is not None]
    if is_leaf(node) or name in _REARRANGING or name in _LOOKUPS or name in ("Expand", "Repeat"):
        return
    if name in ELEMENTWISE:
        # A constant of more axes, or a mask, could hold a value for every example.
        if torch.broadcast_shapes(*shapes) != shape_of((node, 0)):
            raise MixedError("is broadcast over the examples, and could be theirs", node)
    elif is_own_function(node) or name == "WeightNormInterface":
        if len(node._input_metadata) > 1 or shape_of((node, 0)) not in shapes:
            raise MixedError("is broadcast over the examples, and could be theirs", node)
    elif name not in _COMPUTED or (name in _OF_SEVERAL and len(shapes) < len(edges)):
        raise MixedError("is broadcast over the examples, as a batch's mean would be", node)


def settings(edge: Edge) -> tuple[object, ...]:
    """Return what says that two operations rearrange a tensor in the same way."""
    node, number = edge
    names = ("dims", "dim", "dim0", "dim1", "index", "start", "end", "step", "split_size")
    saved = (repr(getattr(node, f"_saved_{name}", None)) for name in (*names, "split_sizes"))
    return (name_of(node), number, shape_of(edge), shape_of(node.next_functions[0]), *saved)


def back(gradients: Tensor, path: tuple[Edge, ...]) -> Tensor:
    """Return gradients, shape (n, *shape), as those of the parameter before it was rearranged."""
    for node, number in path:
        gradients = _step_back(gradients, node, number)
    return gradients


def _step_back(gradients: Tensor, node: Node, number: int) -> Tensor:
    name, shape = name_of(node), shape_of(node.next_functions[0])
    if name in KEEPING:
        return gradients.reshape(-1, *shape)
    if name in PERMUTING:
        order = permutation(node, len(shape))
        return gradients.permute(0, *(1 + order.index(axis) for axis in range(len(shape))))
    whole = gradients.new_zeros(len(gradients), *shape)
    _cut(node, number, whole, shape).copy_(gradients)
    return whole


def _cut(node: Node, number: int, whole: Tensor, shape: Shape) -> Tensor:
    """Return the part that an operation cut out of its input, as a view of ``whole``."""
    (axis,) = axes([node._saved_dim], len(shape))
    name, place = name_of(node), axis + 1
    if name == "Select":
        return whole.select(place, signed(node._saved_index))
    if name == "Unbind":
        return whole.select(place, number)
    if name == "Slice":
        cut = slice(signed(node._saved_start), signed(node._saved_end), node._saved_step)
        return whole[(slice(None),) * place + (cut,)]
    sizes = getattr(node, "_saved_split_sizes", None) or node._saved_split_size
    part: Tensor = whole.split(sizes, dim=place)[number]
    return part


_CUTTING = frozenset(
    "Select Slice Split SplitWithSizes Unbind UnsafeSplit UnsafeSplitWithSizes".split()
)
MULTIPLE = _CUTTING - {"Select", "Slice"}
"""Operations that cut a tensor into parts that do not overlap."""

_REARRANGING = frozenset({*KEEPING, *PERMUTING, *_CUTTING})
_LOOKUPS = frozenset("Embedding Gather Index IndexSelect".split())
_OF_SEVERAL = frozenset("Addmm Addmv Baddbmm Bmm Cat Dot Mm Mv Scatter Stack".split())
_COMPUTED = frozenset(
    {*_OF_SEVERAL, *MIXING, "ConstantPadNd", "Diagonal", "LinalgMatrixExp", "Tril", "Triu"}
)
