"""How a jaxpr is read as a program in which parameters meet the example.

Guarantees: every operation where the two meet is a :class:`Meeting`, and jitted functions,
checkpoints, loops and branches are entered wherever parameters go into them; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from cabs_jax.graph.parameter_slices import View, views_of
from cabs_jax.graph.program import (
    Atom,
    Meeting,
    Nested,
    Operation,
    Scope,
    Spread,
    Status,
    Value,
    is_certain,
    is_parameter,
    nameless,
    status_of,
    view_of,
)


def read(closed: ClosedJaxpr, statuses: Sequence[Status]) -> Scope:
    """Return the program of a loss.

    Args:
        closed: The jaxpr of the loss of one example.
        statuses: What each of its inputs is.
    """
    reader = _Reader()
    inputs = reader.inputs(closed.jaxpr.invars, statuses, [True] * len(statuses))
    free = [Status.CONSTANT] * len(closed.consts)
    constants = reader.inputs(closed.jaxpr.constvars, free, [False] * len(free))
    reader.bind(closed.jaxpr.constvars, constants)
    scope = reader.scope(closed.jaxpr, inputs)
    reader.spread_outputs(scope)
    scope = Scope((*inputs, *constants), scope.operations, scope.outputs)
    mark_needed(scope, scope.outputs[:1])
    return scope


class _Reader:
    """Turns jaxprs into scopes: ``known`` has what each variable stands for."""

    def __init__(self) -> None:
        self.known: dict[Var, Atom] = {}
        self.debug_info: Any = None

    def inputs(
        self, variables: Sequence[Var], statuses: Sequence[Status], certain: Sequence[bool]
    ) -> tuple[Value, ...]:
        made = []
        for variable, status, sure in zip(variables, statuses, certain, strict=True):
            value = Value(variable.aval, status, is_certain=sure and status is Status.EXAMPLE)
            if status is Status.PARAMETER and not value.is_real:
                value.status = Status.CONSTANT
            if value.status is Status.PARAMETER:
                value.view = View.whole(value, value.aval.shape)
            made.append(value)
        return tuple(made)

    def like(self, variables: Sequence[Var], atoms: Sequence[Atom]) -> tuple[Value, ...]:
        """Return inputs that are what atoms of another scope are."""
        return self.inputs(variables, [*map(status_of, atoms)], [*map(is_certain, atoms)])

    def bind(self, variables: Sequence[Var], atoms: Sequence[Atom]) -> None:
        self.known.update(zip(variables, atoms, strict=True))

    def of(self, atom: Any) -> Atom:
        return atom if isinstance(atom, Literal) else self.known[atom]

    def scope(self, jaxpr: Jaxpr, inputs: tuple[Value, ...]) -> Scope:
        self.bind(jaxpr.invars, inputs)
        operations: list[Operation] = []
        self.run(jaxpr, operations)
        return Scope(inputs, operations, [self.of(variable) for variable in jaxpr.outvars])

    def run(self, jaxpr: Jaxpr, operations: list[Operation]) -> None:
        self.debug_info = nameless(jaxpr)
        for equation in jaxpr.eqns:
            inputs = tuple(map(self.of, equation.invars))
            enter = _ENTER.get(str(equation.primitive.name))
            if enter and _is_mixed(inputs) and enter(self, equation, inputs, operations):
                continue
            self.append(equation, inputs, operations)

    def append(
        self, equation: JaxprEqn, inputs: tuple[Atom, ...], operations: list[Operation]
    ) -> None:
        found = {status_of(atom) for atom in inputs}
        kind = Meeting if _is_mixed(inputs) else Operation
        operation = kind(equation, inputs, debug_info=self.debug_info)
        operations.append(operation)
        if Status.EXAMPLE in found:
            status = Status.EXAMPLE
        elif Status.PARAMETER in found and equation.primitive.name != "stop_gradient":
            status = Status.PARAMETER
        else:
            status = Status.CONSTANT
        # Inside a program of its own, an output can turn out to depend on nothing.
        certain = not _has_programs(equation) and any(is_certain(atom) for atom in inputs)
        self.finish(operation, [status] * len(equation.outvars), certain)
        if status is Status.PARAMETER:
            inner = _jitted(equation)
            views = (
                views_of(operation.name, equation.params, inputs, operation.outputs)
                if inner is None
                else self.views_through(inner, inputs)
            )
            for output, view in zip(operation.outputs, views, strict=True):
                output.view = view

    def views_through(self, inner: ClosedJaxpr, inputs: tuple[Atom, ...]) -> list[View | None]:
        """Return the views that a jitted function makes of its inputs."""
        reader = _Reader()
        reader.bind_constants(inner)
        body = reader.scope(inner.jaxpr, reader.like(inner.jaxpr.invars, inputs))
        outer = {
            value: atom.view
            for value, atom in zip(body.inputs, inputs, strict=True)
            if isinstance(atom, Value)
        }
        views = (view_of(atom) for atom in body.outputs)
        around = ((view, view and outer[view.base]) for view in views)
        return [view and above and view.within(above) for view, above in around]

    def finish(
        self, operation: Operation, statuses: Sequence[Status], certain: bool = False
    ) -> None:
        """Give an operation its outputs."""
        outputs = []
        for variable, status in zip(operation.equation.outvars, statuses, strict=True):
            sure = certain and status is Status.EXAMPLE
            value = Value(variable.aval, status, operation, is_certain=sure)
            if status is Status.PARAMETER and not value.is_real:
                value.status = Status.CONSTANT
            outputs.append(value)
        operation.outputs = tuple(outputs)
        self.bind(operation.equation.outvars, outputs)

    def spread(self, operations: list[Operation], atom: Atom) -> Atom:
        """Return a value; one made of parameters so that it differs from example to example."""
        if not is_parameter(atom):
            return atom
        spread = Spread(None, (atom,))
        spread.outputs = (Value(atom.aval, Status.EXAMPLE, spread, is_certain=True),)
        operations.append(spread)
        return spread.outputs[0]

    def spread_outputs(self, scope: Scope) -> None:
        """Let no output of a scope be made of parameters."""
        scope.outputs = [self.spread(scope.operations, atom) for atom in scope.outputs]

    def nested(
        self,
        equation: JaxprEqn,
        inputs: tuple[Atom, ...],
        bodies: Sequence[Scope],
        statuses: Sequence[Status],
        operations: list[Operation],
    ) -> Nested:
        operation = Nested(equation, inputs, bodies=tuple(bodies))
        operations.append(operation)
        self.finish(operation, statuses)
        for at, output in enumerate(operation.outputs):
            output.is_certain = all(is_certain(body.outputs[at]) for body in bodies)
        return operation

    def enter_function(
        self, equation: JaxprEqn, inputs: tuple[Atom, ...], operations: list[Operation]
    ) -> bool:
        reader = _Reader()
        jaxpr = equation.params["jaxpr"]
        if isinstance(jaxpr, ClosedJaxpr):
            reader.bind_constants(jaxpr)
            jaxpr = jaxpr.jaxpr
        body = reader.scope(jaxpr, reader.like(jaxpr.invars, inputs))
        self.spread_outputs(body)
        self.nested(equation, inputs, [body], [*map(status_of, body.outputs)], operations)
        return True

    def enter_branches(
        self, equation: JaxprEqn, inputs: tuple[Atom, ...], operations: list[Operation]
    ) -> bool:
        index, *operands = inputs
        bodies = []
        for branch in equation.params["branches"]:
            reader = _Reader()
            reader.bind_constants(branch)
            body = reader.scope(branch.jaxpr, reader.like(branch.jaxpr.invars, operands))
            self.spread_outputs(body)
            bodies.append(body)
        statuses = [
            Status.EXAMPLE if Status.EXAMPLE in found else Status.CONSTANT
            for found in zip(*(map(status_of, body.outputs) for body in bodies), strict=True)
        ]
        if status_of(index) is Status.EXAMPLE:
            statuses = [Status.EXAMPLE] * len(statuses)
        self.nested(equation, inputs, bodies, statuses, operations)
        return True

    def bind_constants(self, closed: ClosedJaxpr) -> None:
        self.bind(
            closed.jaxpr.constvars,
            [
                Literal(value, variable.aval)
                for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True)
            ],
        )

    def enter_loop(
        self, equation: JaxprEqn, inputs: tuple[Atom, ...], operations: list[Operation]
    ) -> bool:
        params = equation.params
        closed, constants, carried = params["jaxpr"], params["num_consts"], params["num_carry"]
        invars, outvars = closed.jaxpr.invars, closed.jaxpr.outvars
        carry = range(constants, constants + carried)
        statuses = [*map(status_of, inputs)]
        certain = [*map(is_certain, inputs)]
        fixed = [invars[at] is outvars[at - constants] for at in carry]
        while True:
            reader = _Reader()
            reader.bind_constants(closed)
            body = reader.scope(closed.jaxpr, reader.inputs(invars, statuses, certain))
            grown = False
            for at, is_fixed in zip(carry, fixed, strict=True):
                found = status_of(body.outputs[at - constants])
                if is_certain(body.outputs[at - constants]) and not certain[at]:
                    certain[at] = grown = True
                if is_fixed or statuses[at] is Status.EXAMPLE or found is statuses[at]:
                    continue
                # What parameters and constants make in turns is left to the whole loop's rule.
                if Status.EXAMPLE not in (found, statuses[at]):
                    found = Status.PARAMETER
                if found is not statuses[at]:
                    statuses[at], grown = found, True
            if not grown:
                break
        if any(
            statuses[at] is Status.PARAMETER and not is_fixed
            for at, is_fixed in zip(carry, fixed, strict=True)
        ):
            return False
        outputs = []
        for at, atom in enumerate(body.outputs):
            is_kept = at < carried and fixed[at]
            outputs.append(atom if is_kept else self.spread(body.operations, atom))
        body.outputs = outputs
        given = list(inputs)
        for at in carry:
            if statuses[at] is Status.EXAMPLE:
                given[at] = self.spread(operations, given[at])
        made = [*statuses[constants : constants + carried], *map(status_of, outputs[carried:])]
        self.nested(equation, tuple(given), [body], made, operations)
        for at, is_fixed in zip(carry, fixed, strict=True):
            if is_fixed:
                self.bind([equation.outvars[at - constants]], [given[at]])
        return True


def _is_mixed(inputs: Sequence[Atom]) -> bool:
    """Return whether parameters meet the example among inputs."""
    return {Status.PARAMETER, Status.EXAMPLE} <= {*map(status_of, inputs)}


def _has_programs(equation: JaxprEqn) -> bool:
    """Return whether an equation has several outputs, or runs something of its own."""

    def is_program(one: Any) -> bool:
        if isinstance(one, (tuple, list)):
            return any(map(is_program, one))
        return isinstance(one, (Jaxpr, ClosedJaxpr)) or callable(one)

    return len(equation.outvars) > 1 or any(map(is_program, equation.params.values()))


def _jitted(equation: JaxprEqn) -> ClosedJaxpr | None:
    """Return what an equation calls, if it is a jitted function."""
    return equation.params["jaxpr"] if equation.primitive.name in ("jit", "pjit") else None


Enter = Callable[[_Reader, JaxprEqn, tuple[Atom, ...], list[Operation]], bool]

_ENTER: dict[str, Enter] = {
    "checkpoint": _Reader.enter_function,
    "remat": _Reader.enter_function,
    "remat2": _Reader.enter_function,
    "jit": _Reader.enter_function,
    "pjit": _Reader.enter_function,
    "cond": _Reader.enter_branches,
    "scan": _Reader.enter_loop,
}


def mark_needed(scope: Scope, outputs: Sequence[Atom]) -> None:
    """Note which operations the gradient goes through, from these outputs."""
    needed = {atom for atom in outputs if isinstance(atom, Value) and atom.is_real}
    for operation in reversed(scope.operations):
        if needed.isdisjoint(operation.outputs) or operation.name == "stop_gradient":
            continue
        operation.is_needed = True
        if isinstance(operation, Nested):
            # What a loop carries can come out of any of its outputs.
            carried = operation.equation.params.get("num_carry", 0)
            for body in operation.bodies:
                ends = enumerate(zip(body.outputs, operation.outputs, strict=True))
                some = [end for at, (end, out) in ends if at < carried or out in needed]
                mark_needed(body, some)
        needed.update(atom for atom in operation.inputs if isinstance(atom, Value) and atom.is_real)
