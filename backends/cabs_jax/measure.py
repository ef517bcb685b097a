"""The loss of one example, re-run so that its backward pass measures gradients as it goes.

Guarantees: it is the same program, with a tap at each operation where parameters meet the example,
inside of jitted functions, checkpoints, branches and loops too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from cabs_jax.graph import meshes
from cabs_jax.graph.program import (
    Nested,
    Operation,
    Scope,
    Spread,
    Status,
    Value,
    known_value,
    sources_of,
    view_of,
)
from cabs_jax.perturbations import Perturbations, like
from cabs_jax.rules.plan import Leaf, Mode, Site, uses_of
from cabs_jax.taps import Measured, Modes, Taps, by_derivative, tap


def run(
    scope: Scope,
    leaves: Mapping[Value, Leaf],
    taps: Taps,
    inputs: Sequence[Any],
    perturbations: Perturbations,
    anchor: Array,
) -> list[Any]:
    """Return the loss of one example, and what else the program gives.

    Args:
        scope: The program.
        leaves: How each parameter is measured, by the input that it is.
        taps: How operations are measured.
        inputs: Those of the program.
        perturbations: Those of the parameters.
        anchor: False, for each example by itself.
    """
    modes = {value: Measured(leaf.mode, (value,)) for value, leaf in leaves.items()}
    return _Run(taps, anchor).scope(scope, inputs, modes, perturbations)


@dataclass(frozen=True)
class _Run:
    taps: Taps
    anchor: Array

    def scope(
        self, scope: Scope, inputs: Sequence[Any], modes: Modes, perturbations: Perturbations
    ) -> list[Any]:
        """Return the outputs.

        ``modes`` tells of each input of the scope how it is measured.
        """
        known: dict[Value, Any] = dict(zip(scope.inputs, inputs, strict=True))

        for operation in scope.operations:
            given = [known_value(atom, known) for atom in operation.inputs]
            tapped = operation.is_meeting and operation.is_needed and self.taps.at(operation, modes)
            if isinstance(operation, Nested):
                outputs = self.nested(operation, given, known, modes, perturbations)
            elif isinstance(operation, Spread):
                outputs = [self.spread(given[0])]
            else:
                outputs = operation.evaluate(tapped.held(given) if tapped else given)
                if operation.is_meeting and not all(one.is_certain for one in operation.outputs):
                    outputs = [self.spread(output) for output in outputs]
            if tapped:
                outputs = tapped.on(outputs, known, perturbations)
            known.update(zip(operation.outputs, outputs, strict=True))
        return [known_value(atom, known) for atom in scope.outputs]

    def spread(self, value: Array) -> Array:
        """Return a value such that JAX takes it to differ from example to example."""
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        anchor = meshes.broadcast(self.anchor, jax.typeof(value))
        return lax.select(anchor, lax.full_like(value, 0), value)

    def pull(
        self, operand: Any, known: Mapping[Value, Any], modes: Modes, perturbations: Perturbations
    ) -> Any:
        """Return zeros like a value made of parameters, whose cotangent is passed on to them."""
        sources, makers = sources_of([operand])
        if not makers:
            return perturbations.gradients[operand]
        site = Site(tuple(sources), tuple(makers))
        end = Spread(None, (operand,), (Value(operand.aval, Status.EXAMPLE),))
        found, atoms = self.taps.derivative(end, site, [modes[source] for source in sources])
        kept = tuple(known_value(atoms[at], known) for at in found.kept)
        slots = [perturbations.gradients[source] for source in sources]
        wanted = dict.fromkeys(range(len(sources)), Mode.GRADIENTS)
        wide = like(operand)
        zeros = self.spread(meshes.broadcast(jnp.zeros((), wide.dtype), wide))
        backward = by_derivative(found, wanted, operand.aval.size, self.taps.sample, False)

        def narrowed(kept: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            return backward(kept, [cotangents[0].astype(operand.aval.dtype)])

        (tapped,) = tap(narrowed, [zeros], slots, (), kept)
        return tapped

    def nested(
        self,
        operation: Nested,
        given: Sequence[Any],
        known: Mapping[Value, Any],
        modes: Modes,
        perturbations: Perturbations,
    ) -> list[Any]:
        """Run what an operation runs, with the perturbations that it needs."""
        inner_modes: list[dict[Value, Measured]] = []
        handed: dict[int, Array] = {}
        for body in operation.bodies:
            found: dict[Value, Measured] = {}
            used = uses_of(body) if operation.is_needed else {}
            for at, value in enumerate(body.inputs):
                operand = operation.operand(at)
                if not used.get(value):
                    continue
                outer = [modes[source] for source in sources_of([operand])[0] if source in modes]
                if not outer:
                    continue
                if view_of(operand) is not None:
                    (found[value],) = outer
                else:
                    leaves = tuple(leaf for one in outer for leaf in one.leaves)
                    found[value] = Measured(Mode.GRADIENTS, leaves)
                if found[value].mode is Mode.GRADIENTS and at not in handed:
                    handed[at] = self.pull(operand, known, modes, perturbations)
            inner_modes.append(found)
        inner = [
            replace(
                perturbations, gradients={body.inputs[at]: array for at, array in handed.items()}
            )
            for body in operation.bodies
        ]
        if operation.name == "cond":
            branches = [
                lambda *operands, body=body, modes=modes, perturbations=perturbations: self.scope(
                    body, operands, modes, perturbations
                )
                for body, modes, perturbations in zip(
                    operation.bodies, inner_modes, inner, strict=True
                )
            ]
            outputs: list[Any] = lax.switch(given[0], branches, *given[1:])
            return outputs
        (body,), (found,), (perturbations,) = operation.bodies, inner_modes, inner
        if operation.name == "scan":
            return self.loop(operation, given, found, perturbations)
        run = _like_function(
            operation, lambda *given: self.scope(body, given, found, perturbations)
        )
        made: list[Any] = run(*given)
        return made

    def loop(
        self, operation: Nested, given: Sequence[Any], modes: Modes, perturbations: Perturbations
    ) -> list[Any]:
        """Run a loop: each iteration has its own perturbations for factors, and for slices."""
        (body,) = operation.bodies
        params = operation.equation.params
        first = params["num_consts"]
        last = first + params["num_carry"]
        inside = joins_of(body)
        sliced = set(body.inputs[last:])
        of_all = {
            source: array
            for source, array in perturbations.gradients.items()
            if source not in sliced
        }
        of_one = {
            source: array for source, array in perturbations.gradients.items() if source in sliced
        }
        factors = {
            meeting: pair for meeting, pair in perturbations.factors.items() if meeting in inside
        }
        keys = list(of_one), list(factors)

        def iterate(carry: Any, slices: Any) -> Any:
            given_slices, gradients, pairs = slices
            own = Perturbations(
                perturbations.squares,
                dict(zip(keys[1], pairs, strict=True)),
                of_all | dict(zip(keys[0], gradients, strict=True)),
            )
            outputs = self.scope(body, [*given[:first], *carry, *given_slices], modes, own)
            return outputs[: last - first], outputs[last - first :]

        slices = (list(given[last:]), list(of_one.values()), list(factors.values()))
        carry, outputs = lax.scan(
            iterate,
            list(given[first:last]),
            slices,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *outputs]


def _like_function(operation: Nested, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function, jitted or checkpointed like the one that an operation runs."""
    params = operation.equation.params
    if operation.name in ("jit", "pjit"):
        function.__name__ = params["name"]
        return jax.jit(function, inline=params["inline"])
    return jax.checkpoint(function, prevent_cse=params["prevent_cse"], policy=params["policy"])


def joins_of(scope: Scope) -> set[Operation]:
    """Return where parameters meet the example in a scope and those inside it."""
    found = set()
    for operation in scope.operations:
        if operation.is_meeting:
            found.add(operation)
        elif isinstance(operation, Nested):
            found.update(*map(joins_of, operation.bodies))
    return found
