"""The shares of a batch that devices have inside ``shard_map``, put together.

Guarantees: sums and means are those over all examples that count along the named axes, however many
of them each device has; a device on which none counts adds nothing, not even what is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from cabs.gradients.errors import listed
from cabs_jax.graph import meshes
from cabs_jax.graph.arguments import Arguments
from cabs_jax.graph.traced import Traced
from cabs_jax.norms import reductions


@dataclass(frozen=True)
class Shares:
    """The share of this device, and how large those of all are together.

    Args:
        axes: Along which axes of the mesh shares are put together; none leaves all as it is.
        counted: How many examples of this device count.
        total: How many do along the axes.
        examples: How many this device has if all count, as many as each of the others; None where
            there is no mask, and all do.
    """

    axes: tuple[str, ...]
    counted: Array
    total: Array
    examples: int | None

    @classmethod
    def of(cls, axes: tuple[str, ...], counted: Array, examples: int | None) -> Shares:
        """Return them, for which devices send each other a number."""
        return cls(axes, counted, cls(axes, counted, counted, None).sum(counted), examples)

    def sum(self, own: Array) -> Array:
        """Return the sum over the axes."""
        if not self.axes:
            return own
        if self.examples is not None:
            own = jnp.where(self.counted > 0, own, jnp.zeros_like(own))
        checked = meshes.checked_axes() & {*self.axes}
        total: Array = lax.psum(meshes.varying(own, checked), self.axes)
        return total

    def mean(self, own: Array) -> Array:
        """Return the mean over all examples, from that over this device's own."""
        if not self.axes:
            return own
        if self.examples is None:
            mean: Array = lax.pmean(own, self.axes)
            return mean

        wide = reductions.wide(own)
        counts = self.counted, jnp.maximum(self.total, 1)
        weight, weights = (count.astype(wide.dtype) / self.examples for count in counts)
        total = self.sum((wide * weight).astype(own.dtype))
        return (reductions.wide(total) / weights).astype(own.dtype)


def axes_of(axis_name: str | Sequence[str] | None, own: Arguments, mask: Any) -> tuple[str, ...]:
    """Return the axes that are named, or raise ValueError if they cannot be those of examples."""
    axes = meshes.names_of(axis_name)
    try:
        for axis in axes:
            lax.axis_index(axis)
    except NameError as error:
        raise ValueError(
            f"axis_name must name axes of the mesh over which a surrounding shard_map is manual, "
            f"got {axis_name!r} ({error}); where jax.jit spreads the batch over a mesh, name none"
        ) from error
    rows = [*(leaf for leaf, _ in own.batched), *([] if mask is None else [mask])]
    varying = frozenset[str]().union(*(meshes.varying_of(jax.typeof(leaf)) for leaf in rows))
    if same := sorted((meshes.checked_axes() & {*axes}) - varying):
        raise ValueError(
            f"axis_name must name axes along which devices have examples of their own, got "
            f"{axis_name!r}, but all devices along {listed([*map(repr, same)])} have the same; "
            "name the others only"
        )
    return axes


def check_whole(axes: tuple[str, ...], traced: Traced) -> None:
    """Raise ValueError if JAX would add up the mean gradient over axes that are not named."""
    if axes and (others := traced.summed - {*axes}):
        over = listed([*map(repr, sorted(others))])
        raise ValueError(
            f"axis_name must name all axes along which devices have examples of their own, got "
            f"{listed([*map(repr, axes)])}, but examples differ along {over}, too, and JAX would "
            "add up over them the gradients of parameters that are the same; name them, too, or "
            "let parameters differ along them, with jax.lax.pcast(parameters, axis_name, "
            'to="varying") (jax.lax.pvary in older releases)'
        )
