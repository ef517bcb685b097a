"""Where the parameters of a model meet its batch, found by walking the autograd graph.

Guarantees: every use of every parameter that the losses depend on is met by a rule, or an error
names the parameter and the operation; nothing is changed, and no gradient is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from cabs.gradients.errors import UncoveredParameterError
from cabs.gradients.layout import Layout, MixedError
from cabs_torch.errors import HiddenError, UnknownError, uncovered
from cabs_torch.graph.autograd_nodes import (
    Edge,
    Node,
    behind,
    is_leaf,
    is_measurable,
    is_sink,
    name_of,
    shape_of,
)
from cabs_torch.graph.collectives import look_behind
from cabs_torch.graph.reentrant_checkpoints import is_reentrant_checkpoint, run_again
from cabs_torch.ranks.process_groups import is_distributed
from cabs_torch.rules.batch_axis import ELEMENTWISE, LOOKING
from cabs_torch.rules.broadcast import ParameterInput
from cabs_torch.rules.parameter_gradients import enter
from cabs_torch.rules.parameter_paths import Source, source_of
from cabs_torch.rules.probing import Calls, check, positions

Outputs = dict[int, Layout]
"""By the number of a node's output, where the examples lie in it."""

Policy = Literal["error", "microbatches", "ignore"]
"""What to do about parameters that no rule covers."""


class Meeting(NamedTuple):
    """An input of an operation in which a parameter meets the batch."""

    node: Node
    input: ParameterInput
    source: Source


class Found:
    """What a walk has found."""

    def __init__(self) -> None:
        self.meetings: list[Meeting] = []
        self.leaves: dict[int, Node] = {}
        """By the parameter's id, the nodes of those that are covered."""
        self.refused: dict[int, Node] = {}
        """The nodes of those that are not."""
        self.problems: dict[int, str] = {}
        """What is the matter with them."""
        self.checkpoints: dict[Node, Outputs] = {}
        """The reentrant checkpoints, with the layouts of their outputs."""
        self.hidden: dict[int, Node] = {}
        """By the id, the parameters that are met inside of them."""
        self.elements = 0
        """How many all parameters have, wanted or not."""

    @property
    def measured(self) -> float:
        """Which share of the parameters' elements is covered, and wanted."""
        return _elements({**self.leaves, **self.hidden}) / max(self.elements, 1)

    @property
    def missing(self) -> float:
        """Which share of the parameters' elements is wanted, and not covered."""
        return _elements(self.refused) / max(self.elements, 1)


class Walk(Found):
    """One walk from the losses, or from some outputs, to the parameters.

    Args:
        starts: Tensors with a graph, and where the examples lie in each.
        strict: Whether to raise at the first parameter that is not covered.
        inputs: Tensors without a graph that are no parameters, but stand for what lies behind.
        wanted: The ids of the parameters that matter; all do if None.

    Raises:
        UncoveredParameterError: If the squared norms of a parameter cannot be computed exactly.
    """

    def __init__(
        self,
        starts: Sequence[tuple[Tensor, Layout]],
        *,
        strict: bool = True,
        inputs: Sequence[Tensor] = (),
        wanted: Container[int] | None = None,
    ) -> None:
        super().__init__()
        self.arrived: dict[int, Layout] = {}
        """By the id, where the examples lie in the inputs."""
        self.is_structural = True
        """Whether values and what a user's code does had no part in it."""
        self._strict = strict
        self._wanted = wanted
        self._inputs = {id(tensor) for tensor in inputs}
        self._hidden: dict[Edge, tuple[list[Layout | None], Walk]] = {}
        self._outputs: dict[Node, Outputs] = {}
        self._met: set[tuple[Node, int]] = set()
        self._shared: dict[Node, None] = {}
        self._calls: dict[Node, Calls] = {}
        self._tried: set[Node] = set()
        # A stack of its own, since graphs can be deeper than Python's.
        self._waiting = [(tensor.grad_fn, tensor.output_nr, layout) for tensor, layout in starts]
        while self._waiting:
            self._visit(*self._waiting.pop())
        self._close()

    def _visit(self, node: Node, output: int, layout: Layout) -> None:
        known = self._outputs.setdefault(node, {}).setdefault(output, layout)
        if known is layout:
            try:
                self._step(node, output, layout)
            except MixedError as problem:
                self._refuse(node, str(problem))
            except HiddenError as problem:
                raise _error(node, str(problem)) from None
        elif known != layout:
            self._refuse(node, "is reached with two different batch layouts")

    def _step(self, node: Node, output: int, layout: Layout) -> None:
        if is_leaf(node):
            if id(node.variable) in self._inputs:
                self.arrived[id(node.variable)] = layout
                return
            raise MixedError("holds a value for every example of the batch")
        if not is_measurable((node, output)):
            raise MixedError("computes complex numbers, or has no elements")
        for index, (child, number) in enumerate(node.next_functions):
            if child is not None:
                inner = self._enter(node, output, layout, index, (child, number))
                if inner is not None:
                    self._waiting.append((child, number, inner))

    def _enter(
        self, node: Node, output: int, layout: Layout, index: int, edge: Edge
    ) -> Layout | None:
        """Note an input that is a parameter's, or return the layout of one that is the data's."""
        if is_sink(node):
            return layout if index == output else None
        self.is_structural &= name_of(node) not in LOOKING
        try:
            found = enter(node, output, layout, index, shape_of(edge))
        except UnknownError:
            self.is_structural = False
            if is_reentrant_checkpoint(node):
                return self._look_inside(node, output, layout, index)
            if node not in self._tried:
                check(node)
                self._tried.add(node)
            if not _is_parameter(edge):
                return positions(node, output, layout, index)
            found = None
        if isinstance(found, Layout):
            return found
        if output and found is not None and not found.of_all_outputs:
            return None
        if (node, index) not in self._met:
            self._met.add((node, index))
            if found is None:
                self.is_structural = False
                calls = self._calls.setdefault(node, Calls(node, self._outputs[node]))
                found = calls.parameter_input(index)
            self._meet(node, edge, found)
        return None

    def _look_inside(self, node: Node, output: int, layout: Layout, index: int) -> Layout | None:
        """Return the layout of a checkpoint's input, from the graph that it will make."""
        outputs = self.checkpoints.setdefault(node, {})
        if output not in outputs:
            outputs[output] = layout
            inputs, given = run_again(node)
            walk = Walk(
                [(given[output], layout)], strict=self._strict, inputs=inputs, wanted=self._wanted
            )
            self._hidden[node, output] = ([walk.arrived.get(id(one)) for one in inputs], walk)
        return self._hidden[node, output][0][index]

    def _meet(self, node: Node, edge: Edge, found: ParameterInput) -> None:
        try:
            source, inside = source_of(edge)
        except MixedError as problem:
            self._refuse(edge[0], str(problem), problem.node)
            return
        self._shared.update(dict.fromkeys(inside))
        if source.is_lookup and name_of(node) not in ELEMENTWISE:
            self._refuse(
                edge[0],
                f"looks up rows that {node.name()} multiplies; perhaps one for each example",
            )
            return
        for leaf in source.leaves:
            if not is_measurable(edge) or not is_measurable((leaf, 0)):
                self._refuse(leaf, f"holds complex numbers, or no elements, in {node.name()}")
            elif id(leaf.variable) in self._inputs:
                # What lies behind it is not in this graph, so that nothing can be left out.
                raise uncovered(
                    "a parameter is given to a reentrant checkpoint, for all examples",
                    [leaf.variable],
                )
            elif fault := _fault(leaf):
                self._refuse(leaf, fault)
            elif self.leaves.setdefault(id(leaf.variable), leaf) is not leaf:
                self._refuse(leaf, "is held by the graph in two places")
        self.meetings.append(Meeting(node, found, source))

    def _close(self) -> None:
        """Drop what cannot be measured as a whole."""
        for node in self._shared:
            if node in self._outputs and not is_leaf(node):
                self._refuse(
                    node, "is data of examples in one use and a shared parameter in another"
                )
        # A checkpoint runs a backward pass of its own, which does not see other uses.
        behind: dict[Node, dict[int, Node]] = {}
        for (node, _), (_, walk) in self._hidden.items():
            behind.setdefault(node, {}).update({**walk.leaves, **walk.hidden})
            self.refused.update(walk.refused)
            self.problems.update(walk.problems)
        uses = Counter(key for leaves in (self.leaves, *behind.values()) for key in leaves)
        for leaves in behind.values():
            for key, leaf in leaves.items():
                if uses[key] > 1:
                    self._refuse(leaf, "is used inside of a reentrant checkpoint and elsewhere")
                self.hidden[key] = leaf
        self.elements = _elements({**self.leaves, **self.hidden, **self.refused})
        if self._wanted is not None:
            self.refused = _only(self.refused, self._wanted)
            self.leaves, self.hidden = (_only(x, self._wanted) for x in (self.leaves, self.hidden))
        for leaves in (self.leaves, self.hidden):
            for key in self.refused:
                leaves.pop(key, None)
        measured = set(self.leaves.values())
        self.meetings = [one for one in self.meetings if not measured.isdisjoint(one.source.leaves)]

    def _all_meetings(self) -> Iterator[Meeting]:
        yield from self.meetings
        for _, walk in self._hidden.values():
            yield from walk._all_meetings()

    def rules(self) -> dict[int, str]:
        """Return how each parameter's gradients are computed, by its id."""
        found: dict[int, list[str]] = {}
        for meeting in self._all_meetings():
            source, rule = meeting.source, meeting.input.rule
            for leaf in source.leaves:
                through = "" if is_leaf(source.origin[0]) else ", by its VJP"
                found.setdefault(id(leaf.variable), []).append(rule + through)
        return {
            key: " + ".join(f"{rule} x{n}" if n > 1 else rule for rule, n in Counter(used).items())
            for key, used in found.items()
        }

    def _refuse(self, node: Node, problem: str, named: Node = None) -> None:
        """Note that nothing behind a node is covered, because of it, or of another behind it.

        Raises:
            UncoveredParameterError: If the walk is strict.
        """
        culprit = named or node
        for leaf in (*leaves_behind(culprit), *leaves_behind(node)):
            matters = self._wanted is None or (is_leaf(leaf) and id(leaf.variable) in self._wanted)
            # What a checkpoint hides cannot be left out, or be estimated from groups.
            if is_reentrant_checkpoint(leaf) or (self._strict and matters):
                raise _error(culprit, problem)
            self.refused[id(leaf.variable)] = leaf
            self.problems.setdefault(id(leaf.variable), _why(culprit, problem))


def behind_one(losses: Tensor, wanted: Container[int] | None = None) -> Found:
    """Return what is behind the loss of one example, whose gradients are those of the pass.

    Args:
        losses: Shape (1,), with a graph. Nothing is asked of its operations.
        wanted: The ids of the parameters that matter; all do if None.

    Raises:
        UncoveredParameterError: If a gradient of the pass is not that of this example.
    """
    found = Found()
    look_behind(losses.grad_fn)
    for node in behind(losses.grad_fn):
        if is_reentrant_checkpoint(node):
            raise _error(
                node,
                "is a reentrant checkpoint behind a single example; take use_reentrant=False, or "
                "two examples at least",
            )
        if not is_leaf(node):
            continue
        if fault := _fault(node):
            raise _error(node, fault)
        found.leaves[id(node.variable)] = node
    found.elements = _elements(found.leaves)
    if wanted is not None:
        found.leaves = _only(found.leaves, wanted)
    return found


def _fault(leaf: Node) -> str | None:
    """Return why the gradient that passes to a parameter is not what losses have made of it."""
    if is_distributed(leaf.variable):
        return "is a DTensor, of which this rank may hold a part"
    if leaf.variable._backward_hooks:
        return "has a hook, which can change its gradient"
    return None


def _elements(leaves: Mapping[int, Node]) -> int:
    return sum(int(leaf.variable.numel()) for leaf in leaves.values())


def _only(leaves: dict[int, Node], wanted: Container[int]) -> dict[int, Node]:
    return {key: leaf for key, leaf in leaves.items() if key in wanted}


def _is_parameter(edge: Edge) -> bool:
    """Return whether an input is a parameter itself, rearranged perhaps."""
    try:
        return is_leaf(source_of(edge)[0].origin[0])
    except MixedError:
        return False


def _error(node: Node, problem: str) -> UncoveredParameterError:
    concerned = [leaf.variable for leaf in leaves_behind(node) if is_leaf(leaf)]
    return uncovered(_why(node, problem), concerned)


def _why(node: Node, problem: str) -> str:
    return f"{'a parameter' if is_leaf(node) else node.name()} {problem}"


def leaves_behind(node: Node) -> Iterator[Node]:
    """Yield the parameters, and checkpoints, that a node depends on, the nearest first."""
    return (one for one in behind(node) if is_leaf(one) or is_reentrant_checkpoint(one))
