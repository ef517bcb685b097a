"""The vector-Jacobian product of one operation, for one example.

Guarantees: it is JAX's own; it keeps of the forward pass only what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

from cabs_jax.graph.program import nameless


@dataclass(frozen=True)
class Derivative:
    """From some of a function's inputs and the cotangents of its outputs to those of its inputs."""

    kept: tuple[int, ...]
    """Which inputs are needed, of all."""
    pull: Callable[..., list[Any]]
    """Takes these inputs, and the cotangents."""


def derivative(
    function: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]],
    sources: Sequence[Any],
    others: Sequence[Any],
    cotangents: Sequence[Any],
) -> Derivative:
    """Return the derivative of a function with respect to its sources.

    Args:
        function: From sources and others to outputs.
        sources: Shapes and types of what is differentiated.
        others: Shapes and types of what else goes in.
        cotangents: Those of the outputs.
    """

    def backward(sources: Any, others: Any, cotangents: Any) -> Any:
        _, pull = jax.vjp(lambda sources: tuple(function(sources, others)), tuple(sources))
        return pull(tuple(cotangents))[0]

    closed = jax.make_jaxpr(backward)(tuple(sources), tuple(others), tuple(cotangents))
    jaxpr = closed.jaxpr
    needed = {atom for atom in jaxpr.outvars if isinstance(atom, Var)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars):
            continue
        kept.append(equation)
        needed.update(atom for atom in equation.invars if not isinstance(atom, Literal))
    inputs = jaxpr.invars[: len(sources) + len(others)]
    positions = tuple(at for at, variable in enumerate(inputs) if variable in needed)
    taken = [*(inputs[at] for at in positions), *jaxpr.invars[len(inputs) :]]
    lean = Jaxpr(
        jaxpr.constvars,
        taken,
        jaxpr.outvars,
        kept[::-1],
        jaxpr.effects,
        debug_info=nameless(jaxpr),
    )
    return Derivative(positions, jaxpr_as_fun(ClosedJaxpr(lean, closed.consts)))
