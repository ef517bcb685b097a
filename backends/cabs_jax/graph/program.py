"""The loss of one example, as a program in which parameters meet the example.

Guarantees: every value says whether it depends on the example, on parameters alone, or on neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

from cabs_jax.graph.parameter_slices import View


class Status(Enum):
    """What a value is made of."""

    CONSTANT = "neither parameters nor the example"
    PARAMETER = "parameters alone"
    EXAMPLE = "the example"


@dataclass(eq=False)
class Value:
    """A value of the program; inputs of a scope have no maker."""

    aval: Any
    status: Status
    maker: Operation | None = None
    view: View | None = None
    """Which part of which input of the scope it rearranges, if that is all it does."""
    is_certain: bool = False
    """Whether JAX, too, is sure to take it to differ from example to example."""

    @property
    def is_real(self) -> bool:
        """Whether a gradient can flow through it."""
        return bool(jnp.issubdtype(self.aval.dtype, jnp.inexact))


Atom = Value | Literal


@dataclass(eq=False)
class Operation:
    """An equation of a jaxpr, what goes in and what comes out."""

    equation: Any
    """A ``jax.extend.core.JaxprEqn``; None where there is no primitive."""
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...] = ()
    debug_info: Any = None
    is_needed: bool = field(default=False, init=False)
    """Whether the gradient of the loss goes through it."""
    is_meeting: bool = field(default=False, init=False)
    """Whether parameters meet the example in it, so that it is where they are measured."""

    def __post_init__(self) -> None:
        self.is_meeting = isinstance(self, (Meeting, Spread))

    @property
    def name(self) -> str:
        """The primitive's name."""
        return str(self.equation.primitive.name)

    def evaluate(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs."""
        equation = self.equation
        given = {
            variable: value
            for variable, value in zip(equation.invars, inputs, strict=True)
            if isinstance(variable, Var)
        }
        jaxpr = Jaxpr(
            (),
            list(given),
            equation.outvars,
            [equation],
            equation.effects,
            debug_info=self.debug_info,
        )
        found: list[Any] = jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))(*given.values())
        return found


class Meeting(Operation):
    """An operation in which parameters meet the example."""


class Spread(Operation):
    """Where something made without the example stands for something that depends on it.

    It has one input, and one output that differs from example to example as far as JAX knows.
    """

    @property
    def name(self) -> str:
        """What stands for the missing primitive in messages."""
        return "broadcast over the batch"

    def evaluate(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the input."""
        return list(inputs)


@dataclass(eq=False)
class Nested(Operation):
    """An operation that runs programs of its own, in which parameters meet the example."""

    bodies: tuple[Scope, ...] = ()

    def operand(self, at: int) -> Atom:
        """Return what an input of a body stands for."""
        return self.inputs[at + (self.name == "cond")]


@dataclass(eq=False)
class Scope:
    """A program with inputs and outputs of its own."""

    inputs: tuple[Value, ...]
    operations: list[Operation]
    outputs: list[Atom]


def nameless(jaxpr: Jaxpr) -> Any:
    """Return what a jaxpr knows of its source, without the names of inputs and outputs."""
    return jaxpr.debug_info._replace(arg_names=None, result_paths=None)


def aval_of(atom: Atom) -> Any:
    """Return the shape and type of an atom."""
    return atom.aval


def known_value(atom: Atom, known: Mapping[Value, Any]) -> Any:
    """Return the value of an atom."""
    if isinstance(atom, Literal):
        return jnp.asarray(atom.val, aval_of(atom).dtype)
    return known[atom]


def is_certain(atom: Atom) -> bool:
    """Return whether JAX is sure to take an atom to differ from example to example."""
    return isinstance(atom, Value) and atom.is_certain


def view_of(atom: Atom) -> View | None:
    """Return which part of what input an atom is."""
    return atom.view if isinstance(atom, Value) else None


def status_of(atom: Atom) -> Status:
    """Return what a value or a literal is made of."""
    return atom.status if isinstance(atom, Value) else Status.CONSTANT


def is_parameter(atom: Atom) -> bool:
    """Return whether a value is made of parameters alone."""
    return status_of(atom) is Status.PARAMETER


def sources_of(values: Sequence[Atom]) -> tuple[list[Value], list[Operation]]:
    """Return the inputs of the scope that values are made of, and the operations that make them."""
    sources: dict[Value, None] = {}
    makers: dict[Operation, None] = {}

    def visit(atom: Atom) -> None:
        if not isinstance(atom, Value) or atom.status is not Status.PARAMETER:
            return
        if atom.maker is None:
            sources[atom] = None
        elif atom.maker not in makers:
            for one in atom.maker.inputs:
                visit(one)
            makers[atom.maker] = None

    for value in values:
        visit(value)
    return list(sources), list(makers)
