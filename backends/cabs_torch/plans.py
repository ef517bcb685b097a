"""Walks made before: from one step to the next, a graph is mostly the same.

Guarantees: what a walk found is taken for another graph only if that has the same kinds of nodes,
edges, shapes, types of numbers and settings, if its parameters are wanted and free of hooks alike,
and if the same rules are registered. What was decided by values, by a user's code or by an error is
decided anew. A plan knows nodes and parameters by their places in the graph, and keeps none alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from cabs.gradients.layout import Layout
from cabs_torch.graph.autograd_nodes import Node, are_at_hand, is_leaf, name_of, shape_of
from cabs_torch.rules.broadcast import ParameterInput
from cabs_torch.rules.parameter_paths import Source
from cabs_torch.rules.registered import registered
from cabs_torch.tracing import is_traced
from cabs_torch.walk import Found, Meeting, Walk

# How many plans are kept: some sizes of the batch, for some models.
_KEPT = 16

_Place = tuple[int, int]
"""A node's number, and that of its output."""


class _Meeting(NamedTuple):
    node: int
    input: ParameterInput
    origin: _Place
    path: tuple[_Place, ...]
    leaves: tuple[int, ...]
    is_lookup: bool


class _Plan(NamedTuple):
    graph: list[object]
    """What the walk could read of it."""
    leaves: list[int]
    facts: list[object]
    """What it could read of the parameters, and of what is asked for."""
    meetings: list[_Meeting]
    covered: list[int]
    refused: list[tuple[int, str]]
    elements: int


_plans: list[_Plan] = []


def walked(losses: Tensor, *, strict: bool, wanted: Container[int] | None) -> Found:
    """Return what a walk from the losses finds, from a plan if there is one.

    Raises:
        UncoveredParameterError: As the walk does.
    """
    start = (losses, Layout((len(losses),), 1, len(losses)))
    if is_traced():
        return Walk([start], strict=strict, wanted=wanted)
    nodes, graph = _read(losses.grad_fn)
    graph += losses.output_nr, strict
    for place, plan in enumerate(_plans):
        if plan.graph == graph and plan.facts == _facts(nodes, plan.leaves, wanted):
            found = _again(plan, nodes)
            if found is None:
                break
            _plans.insert(0, _plans.pop(place))
            return found
    walk = Walk([start], strict=strict, wanted=wanted)
    if walk.is_structural:
        made = _planned(walk, nodes, graph, wanted)
        if made is not None:
            _plans[:] = [made, *_plans[: _KEPT - 1]]
    return walk


def _read(last: Node) -> tuple[list[Node], list[object]]:
    """Return the nodes of a graph, in an order that depends on it alone, and all about them.

    A tight loop: it runs at every step, for every node.
    """
    nodes, graph = [last], list[object]()
    places: dict[Node | None, int] = {last: 0, None: -1}
    add, find, known = graph.append, places.get, _kinds.get
    for node in nodes:
        kind = known(type(node)) or _kind_of(node)
        add(kind.mark)
        if kind.read is not None:
            add(kind.read(node))
        is_implied = kind.is_implied
        for child, output in node.next_functions:
            place = find(child)
            if place is None:
                place = places[child] = len(nodes)
                nodes.append(child)
            elif place < 0:
                is_implied = False
            add(place)
            add(output)
        if not is_implied:
            for described in node._input_metadata:
                add(described.shape)
                add(described.dtype)
    return nodes, graph


class _Kind(NamedTuple):
    mark: object
    """What two nodes of a kind have alike."""
    read: Callable[[Node], object] | None
    """From a node, all settings that it saved: whatever is no tensor."""
    is_implied: bool
    """Whether its output's shape and type follow from its inputs, if all have a graph."""


_kinds: dict[type, _Kind] = {}

_IMPLIED = frozenset(
    """
    AccumulateGrad Add Addmm Alias Bmm Clone Div Exp Gelu Mm Mul NativeLayerNorm Neg Permute Pow
    Relu Rsqrt Sigmoid Silu Sub T Tanh Transpose
    """.split()
)


def _kind_of(node: Node) -> _Kind:
    kind: Any = type(node)
    if issubclass(kind, BackwardCFunction):
        # A class of a user's own is not kept alive either.
        return _Kind(weakref.ref(kind), attrgetter("needs_input_grad"), False)
    if is_leaf(node):
        found = _Kind(kind, attrgetter("variable.shape", "variable.dtype"), True)
    elif kind.__name__ != node.name():
        # Operations without a class of their own share one.
        found = _Kind(kind, lambda node: node.name(), False)
    else:
        tensors = {name[4:] for name in dir(kind) if name.startswith("_raw_saved_")}
        names = [name for name in dir(kind) if name.startswith("_saved_") and name not in tensors]
        names = [name for name in names if not name.endswith(("_sym_sizes", "_sym_strides"))]
        found = _Kind(
            kind, attrgetter(*names, "__class__") if names else None, name_of(node) in _IMPLIED
        )
    _kinds[kind] = found
    return found


def _facts(nodes: list[Node], leaves: list[int], wanted: Container[int] | None) -> list[object]:
    variables = [nodes[place].variable for place in leaves]
    # Two nodes of one parameter are two places.
    facts: list[object] = [registered(), len(set(map(id, variables)))]
    facts.extend(map(type, variables))
    facts.extend(not one._backward_hooks for one in variables)
    if wanted is not None:
        facts.extend(id(one) in wanted for one in variables)
    return facts


def _planned(
    walk: Walk, nodes: list[Node], graph: list[object], wanted: Container[int] | None
) -> _Plan | None:
    """Return what a walk found, by places; None for a parameter that has changed since."""
    places = {node: place for place, node in enumerate(nodes)}
    leaves = [place for place, node in enumerate(nodes) if is_leaf(node)]
    for node in (nodes[place] for place in leaves):
        parameter, (described,) = node.variable, node._input_metadata
        if shape_of((node, 0)) != parameter.shape or described.dtype != parameter.dtype:
            return None
    meetings = [
        _Meeting(
            places[node],
            given,
            (places[source.origin[0]], source.origin[1]),
            tuple((places[one], output) for one, output in source.path),
            tuple(places[leaf] for leaf in source.leaves),
            source.is_lookup,
        )
        for node, given, source in walk.meetings
    ]
    return _Plan(
        graph,
        leaves,
        _facts(nodes, leaves, wanted),
        meetings,
        [places[leaf] for leaf in walk.leaves.values()],
        [(places[leaf], walk.problems[key]) for key, leaf in walk.refused.items()],
        walk.elements,
    )


def _again(plan: _Plan, nodes: list[Node]) -> Found | None:
    """Return what a plan says about a graph, None if what its nodes saved cannot be read."""
    found = Found()
    found.elements = plan.elements
    for number, given, (place, output), path, leaves, is_lookup in plan.meetings:
        node = nodes[number]
        if not are_at_hand(node, given.reads):
            return None
        source = Source(
            (nodes[place], output),
            tuple((nodes[one], output) for one, output in path) if path else (),
            tuple(nodes[one] for one in leaves),
            is_lookup,
        )
        found.meetings.append(Meeting(node, given, source))
    found.leaves = {id(nodes[place].variable): nodes[place] for place in plan.covered}
    for place, problem in plan.refused:
        leaf = nodes[place]
        found.refused[id(leaf.variable)] = leaf
        found.problems[id(leaf.variable)] = problem
    return found
