"""Terms of the loss that are made of parameters alone, such as weight decay.

Guarantees: their gradient, the same for all examples, is added to every example's in closed form;
nothing is formed for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cabs_jax.graph.program import (
    Atom,
    Scope,
    Status,
    Value,
    aval_of,
    is_parameter,
    known_value,
    sources_of,
    status_of,
)
from cabs_jax.norms import reductions

# Elements of a parameter from which its penalty is worth a form of its own.
_LARGE = 2**12


def separate(scope: Scope) -> list[tuple[Atom, float]]:
    """Return the parts of the loss made of parameters alone, and their signs.

    What adds them to the loss is no longer an operation of the scope. Those of small
    parameters stay: there the sum of squares is computed from the squares themselves.
    """
    used: dict[Atom, int] = {}
    for operation in scope.operations:
        for atom in operation.inputs:
            if isinstance(atom, Value):
                used[atom] = used.get(atom, 0) + 1
    found: list[tuple[Atom, float]] = []
    open_ends: list[tuple[Atom, float]] = [(scope.outputs[0], 1.0)]
    while open_ends:
        atom, sign = open_ends.pop()
        maker = atom.maker if isinstance(atom, Value) else None
        if maker is None or maker.equation is None or maker.name not in ("add", "sub"):
            continue
        if atom is not scope.outputs[0] and (used[atom] > 1 or atom in scope.outputs):
            continue
        if atom is scope.outputs[0] and used.get(atom):
            continue
        signs = (sign, -sign if maker.name == "sub" else sign)
        for one, signed in zip(maker.inputs, signs, strict=True):
            if status_of(one) is Status.EXAMPLE:
                open_ends.append((one, signed))
            elif is_parameter(one) and _is_large(one) and _is_free(one):
                found.append((one, signed))
                maker.is_meeting = False
    return found


def _is_large(atom: Atom) -> bool:
    """Return whether it costs much to form what a value is made of for each example."""
    return any(aval_of(source).size >= _LARGE for source in sources_of([atom])[0])


def _is_free(atom: Atom) -> bool:
    """Return whether a value can be computed without an example."""
    if status_of(atom) is Status.EXAMPLE:
        return False
    maker = atom.maker if isinstance(atom, Value) else None
    return maker is None or all(map(_is_free, maker.inputs))


def gradients(
    penalties: Sequence[tuple[Atom, float]],
    parameters: Sequence[Value],
    known: Mapping[Value, Any],
) -> dict[Value, Array]:
    """Return the gradient of the penalties together, for each parameter that is in them.

    Args:
        penalties: What :func:`separate` found.
        parameters: Inputs of the scope.
        known: The values of all inputs of the scope.
    """

    def total(values: Sequence[Any]) -> Array:
        given = {**known, **dict(zip(parameters, values, strict=True))}
        terms = [_evaluate(value, given) for value, _ in penalties]
        signed = [
            term if sign > 0 else -term for term, (_, sign) in zip(terms, penalties, strict=True)
        ]
        summed: Array = sum(signed[1:], start=signed[0])
        return summed

    found = jax.grad(total)([known[value] for value in parameters])
    return dict(zip(parameters, found, strict=True))


def _evaluate(atom: Atom, known: dict[Value, Any]) -> Any:
    if isinstance(atom, Value) and atom not in known:
        # Only inputs have no maker, and they are known.
        maker: Any = atom.maker
        inputs = [_evaluate(one, known) for one in maker.inputs]
        known.update(zip(maker.outputs, maker.evaluate(inputs), strict=True))
    return known_value(atom, known)


def shifted(
    square: Array, examples: Array, gradient: Array, shift: Array, metric: Array | float = 1.0
) -> Array:
    r"""Return :math:`\sum_i |g_i + c|^2` from :math:`\sum_i |g_i|^2`.

    Args:
        square: The sum before.
        examples: m.
        gradient: The mean of all :math:`g_i + c`.
        shift: c.
        metric: What each square counts.

    Returns:
        The sum; nan where the two nearly cancel, and nothing but rounding errors is left.
    """
    shift, gradient = reductions.wide(shift), reductions.wide(gradient)
    moved = jnp.sum(metric * jnp.real((2.0 * gradient - shift) * jnp.conj(shift)))
    own = jnp.sum(metric * jnp.real(shift * jnp.conj(shift)))
    weight = examples.astype(square.dtype)
    total = square + weight * moved
    info: Any = jnp.finfo(square.dtype)  # type: ignore[no-untyped-call]
    lost = 1e4 * float(info.eps)
    return jnp.where(total >= lost * (square + weight * own), total, jnp.nan)
