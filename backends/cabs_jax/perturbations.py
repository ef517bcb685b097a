"""Perturbations of a loss, which are zero: further inputs, whose cotangents are what is measured.

Guarantees: no value depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from cabs_jax.graph import meshes
from cabs_jax.graph.program import Operation, Value
from cabs_jax.norms import reductions
from cabs_jax.rules.plan import Leaf, Mode


@dataclass(frozen=True)
class Perturbations:
    """The perturbations.

    Args:
        squares: For each parameter measured so, a number.
        factors: For each meeting measured so, left and right.
        gradients: For each input of the scope measured so, an array like it.
    """

    squares: dict[Value, Any]
    factors: dict[Operation, Any]
    gradients: dict[Value, Any]

    @classmethod
    def of(cls, leaves: Mapping[Value, Leaf]) -> Perturbations:
        """Return the perturbations of one example, as shapes and types."""
        found = cls({}, {}, {})
        for value, leaf in leaves.items():
            dtype = reductions.sum_type(value.aval.dtype)
            if leaf.mode is Mode.SQUARES:
                found.squares[value] = jax.ShapeDtypeStruct((), dtype)
            elif leaf.mode is Mode.GRADIENTS:
                found.gradients[value] = like(value)
            else:
                for use, factors in zip(leaf.uses, leaf.factors, strict=True):
                    lengths = tuple(loop.length for loop in factors.loops)
                    found.factors[use.meeting] = tuple(
                        jax.ShapeDtypeStruct((*lengths, *one.shape), dtype)
                        for one in (factors.left, factors.right)
                    )
        return found

    def flat(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Return the arrays alone."""
        parts = (self.squares, self.factors, self.gradients)
        squares, factors, gradients = (list(part.values()) for part in parts)
        return squares, factors, gradients

    def rebuilt(self, flat: tuple[list[Any], list[Any], list[Any]]) -> Perturbations:
        """Return perturbations like these from other arrays."""
        squares, factors, gradients = flat
        return Perturbations(
            dict(zip(self.squares, squares, strict=True)),
            dict(zip(self.factors, factors, strict=True)),
            dict(zip(self.gradients, gradients, strict=True)),
        )

    def slot(self, meeting: Operation, source: Value, leaves: Sequence[Value], mode: Mode) -> Any:
        """Return where a meeting leaves what is measured of one of its sources.

        Args:
            meeting: The operation.
            source: An input of its scope.
            leaves: Which parameters the source is made of.
            mode: What is measured.
        """
        if mode is Mode.SQUARES:
            return self.squares[leaves[0]]
        return self.factors[meeting] if mode is Mode.FACTORS else self.gradients[source]

    def of_leaf(self, value: Value, leaf: Leaf) -> Any:
        """Return what came out of the backward pass for one parameter."""
        if leaf.mode is Mode.FACTORS:
            return [self.factors[use.meeting] for use in leaf.uses]
        return (self.squares if leaf.mode is Mode.SQUARES else self.gradients)[value]


def like(value: Value) -> jax.ShapeDtypeStruct:
    """Return the shape and type of a value's gradient, as it is measured."""
    found: jax.ShapeDtypeStruct = meshes.shape_of(value.aval).update(
        dtype=reductions.wide_type(value.aval.dtype)
    )
    return found
