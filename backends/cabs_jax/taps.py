"""What is measured at one operation, where parameters meet the example.

Guarantees: values and cotangents pass as they are; what is measured leaves as the cotangent of
further inputs, which no value depends on; a parameter's gradient is computed once, by JAX or as the
sum of what is squared.
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
    Operation,
    Value,
    aval_of,
    is_parameter,
    known_value,
)
from cabs_jax.graph.vjp import Derivative, derivative
from cabs_jax.norms import reductions
from cabs_jax.perturbations import Perturbations
from cabs_jax.rules.plan import Mode, Site, site_of

Backward = Callable[[Sequence[Any], Sequence[Any]], tuple[list[Any], list[Any]]]
"""From what is kept and cotangents to the cotangents of slots, and those of parameters."""


class Measured(NamedTuple):
    """How an input of a scope is measured, and which parameters it is made of."""

    mode: Mode
    leaves: tuple[Value, ...]


Modes = Mapping[Value, Measured]


@dataclass(frozen=True)
class Taps:
    """How operations are measured.

    Args:
        names: What each parameter is called.
        sample: Over how many of the examples squared norms are taken.
        is_summed: Whether gradients may be sums of what is squared.
    """

    names: Mapping[Value, str]
    sample: int
    is_summed: bool

    def summing(self) -> Taps:
        """Return the same, with gradients that are sums where that is cheaper."""
        return replace(self, is_summed=True)

    def at(self, meeting: Operation, modes: Modes) -> Tap | None:
        """Return how an operation is measured, given how the inputs of its scope are."""
        site = site_of(meeting)
        pairs = enumerate(site.sources)
        measured = {at: modes[source] for at, source in pairs if source in modes}
        if not measured:
            return None
        is_summed = (
            self.is_summed
            and len(measured) == len(site.sources)
            and all(one.mode is Mode.SQUARES for one in measured.values())
            and _is_sparing(meeting, site)
        )
        return Tap(self, meeting, site, measured, is_summed)

    def derivative(
        self, meeting: Operation, site: Site, measured: Sequence[Measured]
    ) -> tuple[Derivative, list[Atom]]:
        """Return the derivative of an operation, and what all of its inputs are."""
        try:
            return _derivative(meeting, site)
        except Exception as error:
            names = [self.names[leaf] for one in measured for leaf in one.leaves]
            raise uncovered(names, meeting.name, error) from error


def _is_sparing(meeting: Operation, site: Site) -> bool:
    """Return whether the sum of what is squared at an operation costs less than JAX's gradient."""
    outputs = [value.aval for value in meeting.outputs if value.is_real]
    if site.rule is None:
        # What is summed over positions is no longer worth mentioning.
        formed = sum(source.aval.size for source in site.sources)
        return meeting.equation is not None and 0 < 2 * formed <= sum(one.size for one in outputs)
    (parameter,) = filter(is_parameter, meeting.inputs)
    others = [aval_of(meeting.inputs[at]) for at in site.others]
    return site.rule.spares(others, outputs[0], aval_of(parameter).shape)


@dataclass(frozen=True)
class Tap:
    """How one operation is measured."""

    taps: Taps
    meeting: Operation
    site: Site
    measured: Mapping[int, Measured]
    """By which of the site's sources it is."""
    is_summed: bool
    """Whether the parameters' gradient is the sum of what is squared, and not JAX's."""

    def held(self, given: Sequence[Any]) -> list[Any]:
        """Return the operation's inputs, of which JAX differentiates those that it shall."""
        if not self.is_summed:
            return list(given)
        atoms = zip(self.meeting.inputs, given, strict=True)
        return [lax.stop_gradient(one) if is_parameter(atom) else one for atom, one in atoms]

    def on(
        self, outputs: Sequence[Any], known: Mapping[Value, Any], perturbations: Perturbations
    ) -> list[Any]:
        """Return the outputs, so that their cotangents are measured."""
        meeting, site = self.meeting, self.site
        slots = [
            perturbations.slot(meeting, site.sources[at], one.leaves, one.mode)
            for at, one in self.measured.items()
        ]
        chosen = {one.mode for one in self.measured.values()}
        if site.rule is not None and Mode.GRADIENTS not in chosen:
            kept = [meeting.inputs[at] for at in site.others]
            (mode,) = chosen
            parameters = [atom for atom in meeting.inputs if is_parameter(atom)]
            backward = self.by_rule(mode, aval_of(parameters[0]).shape)
        else:
            found, atoms = self.taps.derivative(meeting, site, [*self.measured.values()])
            kept = [atoms[at] for at in found.kept]
            parameters = list(site.sources)
            modes = {at: one.mode for at, one in self.measured.items()}
            sizes = sum(source.aval.size for source in site.sources)
            backward = by_derivative(found, modes, sizes, self.taps.sample, self.is_summed)
        own = [known_value(atom, known) for atom in parameters] if self.is_summed else []
        real = [at for at, value in enumerate(meeting.outputs) if value.is_real]
        values = [known_value(atom, known) for atom in kept]
        tapped = tap(backward, [outputs[at] for at in real], slots, own, values)
        made = list(outputs)
        for at, output in zip(real, tapped, strict=True):
            made[at] = output
        return made

    def by_rule(self, mode: Mode, shape: Sequence[int]) -> Backward:
        """Return what is done with cotangents where a rule tells."""
        rule: Any = self.site.rule

        def squares(
            kept: Sequence[Any], cotangents: Sequence[Any], batched: Any, _: Explicit
        ) -> tuple[list[Array], list[Array]]:
            (cotangent,) = cotangents
            spread = [
                array if is_batched else jnp.broadcast_to(array, (len(cotangent), *array.shape))
                for array, is_batched in zip(kept, batched[0], strict=True)
            ]
            if not self.is_summed:
                return [rule.square(spread, cotangent)], []
            square, total = rule.square_and_sum(spread, cotangent, shape)
            return [square], [total]

        def backward(kept: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            *kept, marks = kept
            if mode is Mode.FACTORS:
                return [factors_of_each(rule, kept, *cotangents)], []
            return of_each(squares, kept, cotangents, self.taps.sample, marks)

        return backward


def by_derivative(
    found: Derivative, modes: Mapping[int, Mode], size: int, sample: int, is_summed: bool
) -> Backward:
    """Return what is done with cotangents where the operation's derivative tells.

    Args:
        found: The derivative.
        modes: What is wanted, by which of its sources it is.
        size: How many elements these have together.
        sample: Over how many of the examples squared norms are taken.
        is_summed: Whether the gradients of all sources are summed over the examples, too.
    """
    squared = [at for at, mode in modes.items() if mode is Mode.SQUARES]

    def squares(
        kept: Sequence[Any], cotangents: Sequence[Any], batched: Any, explicit: Explicit
    ) -> tuple[list[Array], list[Array]]:
        arrays = [*kept, *cotangents]
        ahead = [at for at, is_batched in enumerate(jax.tree.leaves(batched)) if is_batched]

        def some(*parts: Array) -> tuple[list[Array], list[Array]]:
            given = list(arrays)
            for at, part in zip(ahead, parts, strict=True):
                given[at] = part
            axes = [0 if at in ahead else None for at in range(len(given))]
            pull = jax.vmap(lambda given: found.pull(*given), in_axes=(axes,))
            pulled = explicit(pull, given)
            sums = [jnp.sum(reductions.wide(one), axis=0) for one in pulled] if is_summed else []
            return [reductions.square(pulled[at]) for at in squared], sums

        each, sums = reductions.each_and_sum(some, [arrays[at] for at in ahead], size)
        return each, sums

    def backward(kept: Sequence[Any], cotangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        *kept, marks = kept
        pulled = found.pull(*kept, *cotangents) if Mode.GRADIENTS in modes.values() else ()
        each: list[Array] = []
        sums: list[Array] = []
        if squared:
            each, sums = of_each(squares, kept, cotangents, sample, marks)
        left = iter(each)
        return [next(left) if m is Mode.SQUARES else pulled[at] for at, m in modes.items()], sums

    return backward


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


def tap(
    backward: Backward,
    outputs: Sequence[Any],
    slots: Sequence[Any],
    own: Sequence[Any],
    kept: Sequence[Any],
) -> list[Any]:
    """Return the outputs; what ``backward`` makes of their cotangents goes to slots and parameters.

    Args:
        backward: As described there; after what is kept it is given a number of each parameter.
        outputs: Values of the program.
        slots: Inputs that nothing depends on.
        own: Parameters that the outputs depend on, as far as JAX does not know.
        kept: What is needed of the forward pass.
    """

    @jax.custom_vjp
    def identity(outputs: Any, slots: Any, own: Any, kept: Any) -> Any:
        del slots, own, kept
        return outputs

    def forward(outputs: Any, slots: Any, own: Any, kept: Any) -> Any:
        del slots
        # Each example has its own where its parameter has been copied for it.
        marks = [array[(0,) * array.ndim] for array in own]
        return outputs, (*kept, marks)

    def pull(kept: Any, cotangents: Any) -> Any:
        found = jax.tree.map(
            lambda like, array: array.astype(like.dtype), types, tuple(backward(kept, cotangents))
        )
        return cotangents, *found, None

    types = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), (list(slots), list(own))
    )
    identity.defvjp(forward, pull)
    return list(identity(list(outputs), list(slots), list(own), tuple(kept)))
