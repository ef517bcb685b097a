"""What two traces of a program have alike where they compute the same from the same inputs.

Guarantees: programs of equal structure compute the same, and so do their derivatives. A program
with effects, or of which a part cannot be compared, such as a function that it calls, has none.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import FunctionType
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun
from jax.sharding import Mesh

from cabs_jax.graph import meshes

# Whose derivatives are functions, of which the program shows nothing.
_CUSTOM = frozenset("custom_jvp_call custom_vjp_call".split())


class NoStructureError(Exception):
    """A program has something that cannot be compared."""


def structure_of(closed: ClosedJaxpr, is_parameter: Sequence[bool]) -> Hashable:
    """Return the structure of the program of a loss, and of its derivative if that is custom.

    Args:
        closed: The program; its constants are inputs like others.
        is_parameter: Which of its other inputs it is differentiated by.

    Raises:
        NoStructureError: If there is none.
    """
    reader = _Reader()
    found = reader.program(closed.jaxpr)
    return (found, _of_derivative(closed.jaxpr, is_parameter)) if reader.is_custom else found


def _of_derivative(jaxpr: Jaxpr, is_parameter: Sequence[bool]) -> Hashable:
    """Return the structure of the derivative, in which custom ones are operations like others."""

    def derivative(consts: Sequence[Any], leaves: Sequence[Any]) -> Any:
        def loss(parameters: Sequence[Any]) -> Any:
            left = iter(parameters)
            pairs = zip(leaves, is_parameter, strict=True)
            given = [next(left) if is_chosen else leaf for leaf, is_chosen in pairs]
            return jaxpr_as_fun(ClosedJaxpr(jaxpr, list(consts)))(*given)[0]

        pairs = zip(leaves, is_parameter, strict=True)
        return jax.grad(loss)([leaf for leaf, is_chosen in pairs if is_chosen])

    shapes = (
        [meshes.shape_of(one.aval) for one in some] for some in (jaxpr.constvars, jaxpr.invars)
    )
    try:
        closed = jax.make_jaxpr(derivative)(*shapes)
    except Exception as error:
        # Whoever measures the loss has better words for it.
        raise NoStructureError("no derivative") from error
    if closed.consts:
        raise NoStructureError("arrays of a custom derivative")
    return _Reader().program(closed.jaxpr)


class _Reader:
    """Turns jaxprs into nested tuples."""

    def __init__(self) -> None:
        self.is_custom = False

    def program(self, jaxpr: Jaxpr) -> Hashable:
        if jaxpr.effects:
            raise NoStructureError("effects")
        numbers: dict[Var, int] = {}

        def named(variables: Sequence[Var]) -> Hashable:
            for variable in variables:
                numbers[variable] = len(numbers)
            return tuple([variable.aval for variable in variables])

        def taken(atoms: Sequence[Any]) -> Hashable:
            return tuple([_number(a) if isinstance(a, Literal) else numbers[a] for a in atoms])

        return (
            named(jaxpr.constvars),
            named(jaxpr.invars),
            tuple(
                [
                    (
                        equation.primitive,
                        taken(equation.invars),
                        self.params(equation),
                        equation.ctx,
                        named(equation.outvars),
                    )
                    for equation in jaxpr.eqns
                ]
            ),
            taken(jaxpr.outvars),
        )

    def params(self, equation: Any) -> Hashable:
        is_custom = equation.primitive.name in _CUSTOM
        self.is_custom |= is_custom
        found = []
        for name, value in equation.params.items():
            if not is_custom or isinstance(value, (ClosedJaxpr, Jaxpr)):
                found.append((name, self.value(value)))
        return tuple(found)

    def value(self, value: Any) -> Hashable:
        if isinstance(value, ClosedJaxpr):
            if value.consts:
                raise NoStructureError("arrays inside")
            return self.program(value.jaxpr)
        if isinstance(value, Jaxpr):
            return self.program(value)
        if type(value) in (tuple, list):
            return tuple(map(self.value, value))
        if callable(value) and not isinstance(value, (type, Mesh)) and not _is_of_jax(value):
            raise NoStructureError("a function")
        try:
            hash(value)
        except TypeError as error:
            raise NoStructureError("a value that can change") from error
        return type(value), value


def _number(literal: Literal) -> Hashable:
    if isinstance(literal.val, jax.Array) or np.ndim(literal.val):
        raise NoStructureError("an array inside")
    return literal.aval, np.asarray(literal.val).tobytes()


def _is_of_jax(function: Any) -> bool:
    """Return whether a function is one of JAX's own that knows nothing but its arguments."""
    is_plain = isinstance(function, FunctionType) and function.__closure__ is None
    return is_plain and function.__module__.startswith("jax.")
