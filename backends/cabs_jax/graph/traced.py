"""The loss of one example, traced: its program, and what that is called with.

Guarantees: parameters differ between devices wherever the loss does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from cabs_jax.graph import meshes
from cabs_jax.graph.alone import check_alone
from cabs_jax.graph.arguments import Arguments, trace


@dataclass(frozen=True)
class Traced:
    """A program and its arguments.

    Args:
        own: The arguments as they were given.
        arguments: The same, with parameters that may differ between devices.
        closed: The jaxpr of the loss of one example.
        structure: That of what else the loss gives.
    """

    own: Arguments
    arguments: Arguments
    closed: ClosedJaxpr
    structure: Any

    @classmethod
    def of(
        cls,
        loss_fn: Callable[..., Any],
        own: Arguments,
        has_aux: bool,
        axes: frozenset[str] = frozenset(),
    ) -> Traced:
        """Return the program of a loss.

        Where ``shard_map`` checks what differs between devices, the gradient is then this device's
        own, along these axes in any case. JAX adds up the gradients of parameters that are the same
        on all of them.
        """
        while True:
            leaves = zip(own.leaves, own.is_parameter, strict=True)
            placed = own.with_leaves(
                meshes.varying(leaf, axes) if is_parameter else leaf
                for leaf, is_parameter in leaves
            )
            closed, structure = trace(loss_fn, placed, has_aux)
            found = meshes.varying_of(closed.out_avals[0])
            if found <= axes:
                check_alone(closed, placed)
                return cls(own, placed, closed, structure)
            axes |= found

    def given(self, leaves: Sequence[Any], consts: Sequence[Any]) -> Traced:
        """Return the same program with other arrays, outside of ``shard_map``."""
        own = self.own.with_leaves(leaves)
        return replace(
            self, own=own, arguments=own, closed=ClosedJaxpr(self.closed.jaxpr, list(consts))
        )

    @property
    def summed(self) -> frozenset[str]:
        """Over which axes of a mesh some parameter was the same on all devices."""
        found = frozenset[str]()
        for before, after in zip(self.own.leaves, self.arguments.leaves, strict=True):
            found |= meshes.varying_of(jax.typeof(after)) - meshes.varying_of(jax.typeof(before))
        return found
