"""The loss of one example, re-run so that its backward pass measures gradients as it goes.

Guarantees: values and cotangents of the loss are untouched: what is measured leaves as the
cotangent of further inputs, which are zero and which no value depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from cabs_jax.errors import uncovered
from cabs_jax.graph import meshes
from cabs_jax.graph.each import factors_of_each, of_each
from cabs_jax.graph.meshes import Explicit
from cabs_jax.graph.program import (
    Atom,
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
from cabs_jax.graph.vjp import Derivative, derivative
from cabs_jax.norms import reductions
from cabs_jax.rules.plan import Leaf, Mode, Site, site_of, uses_of


@dataclass(frozen=True)
class Marks:
    """The further inputs: zeros, whose cotangents are what is measured.

    Args:
        squares: For each parameter measured so, a number.
        factors: For each meeting measured so, left and right.
        gradients: For each input of the scope measured so, an array like it.
    """

    squares: dict[Value, Any]
    factors: dict[Operation, Any]
    gradients: dict[Value, Any]

    def flat(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Return the arrays alone."""
        parts = (self.squares, self.factors, self.gradients)
        squares, factors, gradients = (list(part.values()) for part in parts)
        return squares, factors, gradients

    def rebuilt(self, flat: tuple[list[Any], list[Any], list[Any]]) -> Marks:
        """Return marks like these from other arrays."""
        squares, factors, gradients = flat
        return Marks(
            dict(zip(self.squares, squares, strict=True)),
            dict(zip(self.factors, factors, strict=True)),
            dict(zip(self.gradients, gradients, strict=True)),
        )


@dataclass(frozen=True)
class Measurement:
    """A loss that can be run for one example.

    Args:
        scope: The program.
        leaves: How each parameter is measured, by the input that it is.
        names: What each is called.
        sample: Over how many of the examples squared norms are taken.
    """

    scope: Scope
    leaves: Mapping[Value, Leaf]
    names: Mapping[Value, str]
    sample: int

    def zeros(self) -> Marks:
        """Return the marks of one example, as shapes and types."""
        found = Marks({}, {}, {})
        for value, leaf in self.leaves.items():
            dtype = reductions.sum_type(value.aval.dtype)
            if leaf.mode is Mode.SQUARES:
                found.squares[value] = jax.ShapeDtypeStruct((), dtype)
            elif leaf.mode is Mode.GRADIENTS:
                found.gradients[value] = _like(value)
            else:
                for use, factors in zip(leaf.uses, leaf.factors, strict=True):
                    lengths = tuple(loop.length for loop in factors.loops)
                    found.factors[use.meeting] = tuple(
                        jax.ShapeDtypeStruct((*lengths, *one.shape), dtype)
                        for one in (factors.left, factors.right)
                    )
        return found

    def run(self, inputs: Sequence[Any], marks: Marks, anchor: Array) -> list[Any]:
        """Return the loss of one example, and what else the program gives.

        Args:
            inputs: Those of the program.
            marks: As :meth:`zeros` describes them.
            anchor: False, for each example by itself.
        """
        modes = {value: Measured(leaf.mode, (value,)) for value, leaf in self.leaves.items()}
        return _Run(self, anchor).scope(self.scope, inputs, modes, marks)


class Measured(NamedTuple):
    """How an input of a scope is measured, and which parameters it is made of."""

    mode: Mode
    leaves: tuple[Value, ...]


Modes = Mapping[Value, Measured]


def _like(value: Value) -> jax.ShapeDtypeStruct:
    like: jax.ShapeDtypeStruct = meshes.shape_of(value.aval).update(
        dtype=reductions.wide_type(value.aval.dtype)
    )
    return like


@dataclass(frozen=True)
class _Run:
    measurement: Measurement
    anchor: Array

    def scope(self, scope: Scope, inputs: Sequence[Any], modes: Modes, marks: Marks) -> list[Any]:
        """Return the outputs.

        ``modes`` tells of each input of the scope how it is measured.
        """
        known: dict[Value, Any] = dict(zip(scope.inputs, inputs, strict=True))

        for operation in scope.operations:
            given = [known_value(atom, known) for atom in operation.inputs]
            if isinstance(operation, Nested):
                outputs = self.nested(operation, given, known, modes, marks)
            elif isinstance(operation, Spread):
                outputs = [self.spread(given[0])]
            else:
                outputs = operation.evaluate(given)
                if operation.is_meeting and not all(one.is_certain for one in operation.outputs):
                    outputs = [self.spread(output) for output in outputs]
            if operation.is_meeting and operation.is_needed:
                outputs = self.tap(operation, outputs, known, modes, marks)
            known.update(zip(operation.outputs, outputs, strict=True))
        return [known_value(atom, known) for atom in scope.outputs]

    def spread(self, value: Array) -> Array:
        """Return a value such that JAX takes it to differ from example to example."""
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        anchor = meshes.broadcast(self.anchor, jax.typeof(value))
        return lax.select(anchor, lax.full_like(value, 0), value)

    def tap(
        self,
        meeting: Operation,
        outputs: Sequence[Any],
        known: Mapping[Value, Any],
        modes: Modes,
        marks: Marks,
    ) -> list[Any]:
        """Return the outputs, so that their cotangents are measured."""
        site = site_of(meeting)
        measured = [
            (at, modes[source].mode, modes[source].leaves)
            for at, source in enumerate(site.sources)
            if source in modes
        ]
        if not measured:
            return list(outputs)
        real = [at for at, value in enumerate(meeting.outputs) if value.is_real]
        slots: list[Any] = []
        for at, mode, leaves in measured:
            if mode is Mode.SQUARES:
                slots.append(marks.squares[leaves[0]])
            elif mode is Mode.FACTORS:
                slots.append(marks.factors[meeting])
            else:
                slots.append(marks.gradients[site.sources[at]])
        chosen = {mode for _, mode, _ in measured}
        if site.rule is not None and Mode.GRADIENTS not in chosen:
            kept = tuple(known_value(meeting.inputs[at], known) for at in site.others)
            backward = self.by_rule(site, *chosen)
        else:
            found, atoms = self.derivative(meeting, site, [leaves for _, _, leaves in measured])
            kept = tuple(known_value(atoms[at], known) for at in found.kept)
            sizes = sum(source.aval.size for source in site.sources)
            backward = self.by_derivative(found, [(at, mode) for at, mode, _ in measured], sizes)
        tapped = _tap(backward, [outputs[at] for at in real], slots, kept)
        made = list(outputs)
        for at, output in zip(real, tapped, strict=True):
            made[at] = output
        return made

    def by_rule(self, site: Site, mode: Mode) -> Callable[..., list[Any]]:
        rule: Any = site.rule

        def backward(kept: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
            if mode is Mode.FACTORS:
                return [factors_of_each(rule, kept, *cotangents)]
            return of_each(squares, kept, cotangents, self.measurement.sample)

        def squares(
            kept: Sequence[Any], cotangents: Sequence[Any], batched: Any, _: Explicit
        ) -> list[Array]:
            (cotangent,) = cotangents
            spread = [
                array if is_batched else jnp.broadcast_to(array, (len(cotangent), *array.shape))
                for array, is_batched in zip(kept, batched[0], strict=True)
            ]
            return [rule.square(spread, cotangent)]

        return backward

    def by_derivative(
        self, found: Derivative, measured: Sequence[tuple[int, Mode]], size: int
    ) -> Callable[..., list[Any]]:
        modes = [mode for _, mode in measured]
        squared = [at for at, mode in measured if mode is Mode.SQUARES]

        def squares(
            kept: Sequence[Any], cotangents: Sequence[Any], batched: Any, explicit: Explicit
        ) -> list[Array]:
            arrays = [*kept, *cotangents]
            ahead = [at for at, is_batched in enumerate(jax.tree.leaves(batched)) if is_batched]

            def some(*parts: Array) -> tuple[Array, ...]:
                given = list(arrays)
                for at, part in zip(ahead, parts, strict=True):
                    given[at] = part
                axes = [0 if at in ahead else None for at in range(len(given))]
                pull = jax.vmap(lambda given: found.pull(*given), in_axes=(axes,))
                pulled = explicit(pull, given)
                return tuple(reductions.square(pulled[at]) for at in squared)

            return [*reductions.in_chunks(some, [arrays[at] for at in ahead], size)]

        def backward(kept: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
            pulled = found.pull(*kept, *cotangents) if Mode.GRADIENTS in modes else ()
            sample = self.measurement.sample
            summed = iter(of_each(squares, kept, cotangents, sample) if squared else ())
            return [next(summed) if mode is Mode.SQUARES else pulled[at] for at, mode in measured]

        return backward

    def derivative(
        self, meeting: Operation, site: Site, leaves: Sequence[tuple[Value, ...]]
    ) -> tuple[Derivative, list[Atom]]:
        """Return the derivative of an operation, and what all of its inputs are."""
        try:
            return _derivative(meeting, site)
        except Exception as error:
            names = [self.measurement.names[leaf] for some in leaves for leaf in some]
            raise uncovered(names, meeting.name, error) from error

    def pull(self, operand: Any, known: Mapping[Value, Any], modes: Modes, marks: Marks) -> Any:
        """Return zeros like a value made of parameters, whose cotangent is passed on to them."""
        sources, makers = sources_of([operand])
        if not makers:
            return marks.gradients[operand]
        site = Site(tuple(sources), tuple(makers))
        end = Spread(None, (operand,), (Value(operand.aval, Status.EXAMPLE),))
        leaves = [modes[source].leaves for source in sources]
        found, atoms = self.derivative(end, site, leaves)
        kept = tuple(known_value(atoms[at], known) for at in found.kept)
        slots = [marks.gradients[source] for source in sources]
        measured = [(at, Mode.GRADIENTS) for at in range(len(sources))]
        like = _like(operand)
        zeros = self.spread(meshes.broadcast(jnp.zeros((), like.dtype), like))
        backward = self.by_derivative(found, measured, operand.aval.size)

        def narrowed(kept: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
            return backward(kept, [cotangents[0].astype(operand.aval.dtype)])

        (tapped,) = _tap(narrowed, [zeros], slots, kept)
        return tapped

    def nested(
        self,
        operation: Nested,
        given: Sequence[Any],
        known: Mapping[Value, Any],
        modes: Modes,
        marks: Marks,
    ) -> list[Any]:
        """Run what an operation runs, with the marks that it needs."""
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
                    handed[at] = self.pull(operand, known, modes, marks)
            inner_modes.append(found)
        inner = [
            replace(marks, gradients={body.inputs[at]: array for at, array in handed.items()})
            for body in operation.bodies
        ]
        if operation.name == "cond":
            branches = [
                lambda *operands, body=body, modes=modes, marks=marks: self.scope(
                    body, operands, modes, marks
                )
                for body, modes, marks in zip(operation.bodies, inner_modes, inner, strict=True)
            ]
            outputs: list[Any] = lax.switch(given[0], branches, *given[1:])
            return outputs
        (body,), (found,), (marks,) = operation.bodies, inner_modes, inner
        if operation.name == "scan":
            return self.loop(operation, given, found, marks)
        run = _like_function(operation, lambda *given: self.scope(body, given, found, marks))
        made: list[Any] = run(*given)
        return made

    def loop(
        self, operation: Nested, given: Sequence[Any], modes: Modes, marks: Marks
    ) -> list[Any]:
        """Run a loop: each iteration has its own marks for factors, and for slices."""
        (body,) = operation.bodies
        params = operation.equation.params
        first = params["num_consts"]
        last = first + params["num_carry"]
        inside = joins_of(body)
        sliced = set(body.inputs[last:])
        of_all = {
            source: array for source, array in marks.gradients.items() if source not in sliced
        }
        of_one = {source: array for source, array in marks.gradients.items() if source in sliced}
        factors = {meeting: pair for meeting, pair in marks.factors.items() if meeting in inside}
        keys = list(of_one), list(factors)

        def iterate(carry: Any, slices: Any) -> Any:
            given_slices, gradients, pairs = slices
            own = Marks(
                marks.squares,
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


def _derivative(meeting: Operation, site: Site) -> tuple[Derivative, list[Atom]]:
    """Return the derivative of an operation, and what all of its inputs are."""
    made = {output for maker in site.makers for output in maker.outputs}
    others = dict.fromkeys(
        atom
        for operation in (*site.makers, meeting)
        for atom in operation.inputs
        if isinstance(atom, Value) and atom not in made and atom not in site.sources
    )

    def function(sources: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        known = dict(zip([*site.sources, *others], [*sources, *values], strict=True))
        for operation in (*site.makers, meeting):
            outputs = operation.evaluate([known_value(atom, known) for atom in operation.inputs])
            known.update(zip(operation.outputs, outputs, strict=True))
        return [known[value] for value in meeting.outputs if value.is_real]

    cotangents = [_shape(value) for value in meeting.outputs if value.is_real]
    found = derivative(function, [*map(_shape, site.sources)], [*map(_shape, others)], cotangents)
    return found, [*site.sources, *others]


def _shape(value: Value) -> jax.ShapeDtypeStruct:
    return meshes.shape_of(value.aval)


def _tap(
    backward: Callable[..., Any], outputs: Sequence[Any], slots: Sequence[Any], kept: Sequence[Any]
) -> list[Any]:
    """Return the outputs; what ``backward`` makes of their cotangents goes to the slots.

    Args:
        backward: From what is kept and the cotangents to the cotangents of the slots.
        outputs: Values of the program.
        slots: Inputs that nothing depends on.
        kept: What is needed of the forward pass.
    """

    @jax.custom_vjp
    def tap(outputs: Any, slots: Any, kept: Any) -> Any:
        del slots, kept
        return outputs

    def forward(outputs: Any, slots: Any, kept: Any) -> Any:
        del slots
        return outputs, kept

    def pull(kept: Any, cotangents: Any) -> Any:
        found = jax.tree.map(
            lambda slot, array: array.astype(slot.dtype), types, backward(kept, cotangents)
        )
        return cotangents, found, None

    types = jax.tree.map(lambda slot: jax.ShapeDtypeStruct(slot.shape, slot.dtype), list(slots))
    tap.defvjp(forward, pull)
    return list(tap(list(outputs), list(slots), tuple(kept)))
