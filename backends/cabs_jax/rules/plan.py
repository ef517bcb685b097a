"""How the squared norm of each parameter's gradient is computed.

Guarantees: norms of several uses of a parameter are added only where the uses share no element, or
no example takes both; otherwise their gradients are added before they are squared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp

from cabs_jax.graph.parameter_slices import View
from cabs_jax.graph.program import (
    Nested,
    Operation,
    Scope,
    Status,
    Value,
    aval_of,
    is_parameter,
    sources_of,
    view_of,
)
from cabs_jax.rules.parameter_gradients import Axes, Dot, Lookup, Rule, rule_for


class Mode(Enum):
    """What comes out of the backward pass for a parameter."""

    SQUARES = "squared norms"
    GRADIENTS = "gradients"
    FACTORS = "factors of gradients"


# Up to which number of a row float32, in which it leaves the backward pass, is exact.
_COUNTED = 2**24

# The axis of a loop's slices, where it is no axis of the parameter.
_OTHER = -1


@dataclass(frozen=True)
class Loop:
    """A loop around the use of a parameter."""

    length: int
    axis: int | None
    """Along which axis each iteration has a slice of the parameter; None if it has all of it."""


@dataclass(frozen=True)
class Use:
    """An operation in which a parameter, or what is made of it, meets the example."""

    meeting: Operation
    view: View | None
    """What of the parameter the operation sees; None if something was computed from it."""
    is_across: bool = False
    """Whether it was computed outside of the loop, branch or checkpoint that has the operation."""
    loops: tuple[Loop, ...] = ()
    branches: frozenset[tuple[Nested, int]] = frozenset()

    @property
    def is_repeated(self) -> bool:
        """Whether several iterations use the same elements."""
        return any(loop.axis is None and loop.length > 1 for loop in self.loops)

    def is_apart(self, other: Use) -> bool:
        """Return whether no example's gradient has parts of both uses for the same element."""
        mine = dict(self.branches)
        for nested, branch in other.branches:
            if mine.get(nested, branch) != branch:
                return True
        if self.view is None or other.view is None:
            return False
        return not self.view.overlaps(other.view)


@dataclass(frozen=True)
class Site:
    """How an operation makes use of the parameters that meet the example in it."""

    sources: tuple[Value, ...]
    """The inputs of the scope that come together in it."""
    makers: tuple[Operation, ...]
    """What makes its operands of them."""
    rule: Rule | None = None
    others: tuple[int, ...] = ()
    """Where the operation has what the rule takes."""


def site_of(meeting: Operation) -> Site:
    """Return how an operation makes use of parameters."""
    operands = [at for at, atom in enumerate(meeting.inputs) if is_parameter(atom)]
    sources, makers = sources_of([meeting.inputs[at] for at in operands])
    if len(operands) == 1 and meeting.equation is not None:
        (at,) = operands
        if view_of(meeting.inputs[at]) is not None:
            rule = rule_for(
                meeting.name, meeting.equation.params, [atom.aval for atom in meeting.inputs], at
            )
            if rule is not None:
                others = () if rule.other is None else (rule.other,)
                return Site(tuple(sources), tuple(makers), rule, others)
    return Site(tuple(sources), tuple(makers))


def uses_of(scope: Scope) -> dict[Value, list[Use]]:
    """Return, for each input of a scope made of parameters, where it meets the example."""
    found: dict[Value, list[Use]] = {
        value: [] for value in scope.inputs if value.status is Status.PARAMETER
    }
    for operation in scope.operations:
        if not operation.is_needed:
            continue
        if isinstance(operation, Nested):
            for branch, body in enumerate(operation.bodies):
                for source, uses in uses_of(body).items():
                    _lift(operation, branch, body, source, uses, found)
        elif operation.is_meeting:
            operands = [atom for atom in operation.inputs if is_parameter(atom)]
            for source in sources_of(operands)[0]:
                view = view_of(operands[0]) if len(operands) == 1 else None
                found[source].append(Use(operation, view))
    return found


def _lift(
    operation: Nested,
    branch: int,
    body: Scope,
    source: Value,
    uses: Sequence[Use],
    found: dict[Value, list[Use]],
) -> None:
    """Add what is known of an input of a body to what is known of the inputs around it."""
    at = body.inputs.index(source)
    operand = operation.operand(at)
    around = frozenset({(operation, branch)}) if len(operation.bodies) > 1 else frozenset()
    skipped = 0
    loops: tuple[Loop, ...] = ()
    view = view_of(operand)
    if operation.name == "scan":
        params = operation.equation.params
        is_sliced = at >= params["num_consts"] + params["num_carry"]
        loops = (Loop(params["length"], _axis(view, 0) if is_sliced else None),)
        skipped = int(is_sliced)
    for use in uses:
        branches = use.branches | around
        if view is None:
            for outer in sources_of([operand])[0]:
                found[outer].append(Use(use.meeting, None, True, loops + use.loops, branches))
            continue
        inside = tuple(
            loop
            if loop.axis in (None, _OTHER)
            else replace(loop, axis=_axis(view, loop.axis + skipped))
            for loop in use.loops
        )
        composed = use.view and use.view.within(view, skipped)
        found[view.base].append(Use(use.meeting, composed, use.is_across, loops + inside, branches))


def _axis(view: View | None, at: int) -> int:
    """Return which axis of its base an axis of a view is."""
    axis = None if view is None or view.key is not None else view.axes[at]
    return _OTHER if axis is None else axis


@dataclass(frozen=True)
class Factors:
    """How the factors of the gradient from one use come out of the backward pass."""

    rule: Dot | Lookup
    view: View
    axes: Axes
    """Batched, left and right axes, those of the parameter that the rule's are."""
    loops: tuple[Loop, ...]
    left: Any
    right: Any

    @property
    def size(self) -> int:
        """How many elements they have for an example."""
        lengths = [loop.length for loop in self.loops]
        sides = (self.left.shape, self.right.shape)
        size: int = math.prod(lengths) * sum(math.prod(shape) for shape in sides)
        return size

    @property
    def place(self) -> Any:
        """Of which part of the parameter: its axes that are batched, and those on both sides."""
        sliced = {loop.axis for loop in self.loops if loop.axis is not None}
        sides = frozenset({known(self.axes.left), known(self.axes.right)})
        return self.view.key, self.view.region, known(self.axes.batch) | sliced, sides


def known(axes: Iterable[int | None]) -> frozenset[int]:
    """Return which axes are the parameter's; the others have length one."""
    return frozenset(axis for axis in axes if axis is not None)


def _factors(use: Use) -> Factors | None:
    """Return the factors of a use's gradient, if it has some."""
    rule = site_of(use.meeting).rule
    if not isinstance(rule, (Dot, Lookup)) or use.view is None or use.is_across:
        return None
    if any(loop.axis == _OTHER for loop in use.loops):
        return None
    is_sliced = any(loop.axis is not None for loop in use.loops)
    if is_sliced and (use.view.key is not None or isinstance(rule, Lookup)):
        return None
    if isinstance(rule, Lookup) and rule.length > _COUNTED:
        return None
    (output,) = use.meeting.outputs
    left, right = jax.eval_shape(
        lambda other, cotangents: rule.factors([other], cotangents),
        jax.ShapeDtypeStruct(
            aval_of(use.meeting.inputs[rule.other]).shape,
            jnp.int32 if isinstance(rule, Lookup) else jnp.float32,
        ),
        jax.ShapeDtypeStruct(output.aval.shape, jnp.float32),
    )
    placed = [tuple(use.view.axes[a] for a in some if a is not None) for some in rule.axes]
    return Factors(rule, use.view, Axes(*placed), use.loops, left, right)


def _kind(factors: Factors, value: Value) -> Any:
    """Return what factors of one kind have alike, whose positions can be put one after another.

    None for those of a part of a parameter, of slices of it, or of a table's columns.
    """
    view, axes = factors.view, factors.axes
    if view.key is not None or view.region != View.whole(None, value.aval.shape).region:
        return None
    if factors.loops or any(None in some for some in axes):
        return None
    if isinstance(factors.rule, Lookup):
        return Lookup if axes.left == (0,) else None
    return axes.batch, frozenset({axes.left, axes.right})


@dataclass(frozen=True)
class Leaf:
    """How the gradient of one parameter is measured."""

    mode: Mode
    uses: tuple[Use, ...]
    factors: tuple[Factors, ...] = ()

    @property
    def rules(self) -> str:
        """What is done at each use, in words."""
        names: dict[str, None] = {}
        for use in self.uses:
            rule = site_of(use.meeting).rule if self.mode is not Mode.GRADIENTS else None
            names[rule.name if rule else f"formed at {use.meeting.name}"] = None
        return " + ".join(names) or "no gradient"


def plan_leaf(value: Value, uses: Sequence[Use], *, is_elementwise: bool = False) -> Leaf:
    """Return how the gradient of a parameter is measured, for squares by themselves or summed."""
    if is_elementwise:
        factors = tuple(filter(None, map(_factors, uses)))
        kinds = {_kind(one, value) for one in factors}
        if len(factors) == len(uses) and len(kinds) == 1 and None not in kinds:
            return Leaf(Mode.FACTORS, tuple(uses), factors)
        return Leaf(Mode.GRADIENTS, tuple(uses))
    alone = not any(use.is_across or use.is_repeated for use in uses)
    if alone and all(one.is_apart(other) for one, other in combinations(uses, 2)):
        return Leaf(Mode.SQUARES, tuple(uses))
    factors = tuple(filter(None, map(_factors, uses)))
    is_smaller = sum(one.size for one in factors) < value.aval.size
    if is_smaller and len(factors) == len(uses) and len({one.place for one in factors}) == 1:
        return Leaf(Mode.FACTORS, tuple(uses), factors)
    return Leaf(Mode.GRADIENTS, tuple(uses))
