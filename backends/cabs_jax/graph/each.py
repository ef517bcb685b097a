"""What is found for each example, computed for all of them at once.

Guarantees: what is computed sees arrays of all examples, on whatever devices they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from cabs_jax.graph import meshes
from cabs_jax.graph.meshes import Explicit


def of_each(
    function: Callable[..., list[Array]],
    kept: Sequence[Any],
    cotangents: Sequence[Any],
    sample: int,
) -> list[Array]:
    """Return what a function of some examples finds for each of the first ones; others get zero.

    Args:
        function: It is called with all of them at once, the examples in front, with what has them
            in front, as what all of them share has not, and with the way back to Explicit axes.
        kept: Values of one example, under ``vmap``.
        cotangents: The same.
        sample: How many are taken.
    """

    @custom_vmap
    def one(kept: Any, cotangents: Any) -> Any:
        explicit = Explicit.of([*kept, *cotangents], ahead=1)

        def alone(kept: Any, cotangents: Any) -> Any:
            ahead = jax.tree.map(lambda array: array[None], (kept, cotangents))
            found = function(*ahead, jax.tree.map(lambda _: True, ahead), explicit)
            return tuple(array[0] for array in found)

        return meshes.automatic(alone, kept, cotangents)

    @one.def_vmap
    def many(examples: int, batched: Any, kept: Any, cotangents: Any) -> Any:
        batched = tuple(batched)
        explicit = Explicit.of([*kept, *cotangents])

        def some(kept: Any, cotangents: Any) -> Any:
            taken = jax.tree.map(
                lambda is_batched, array: array[:sample] if is_batched else array,
                batched,
                (kept, cotangents),
            )
            found = function(*taken, batched, explicit)
            return tuple(jnp.pad(array, (0, examples - len(array))) for array in found)

        ahead = _ahead(batched, (kept, cotangents))
        found = meshes.automatic(some, kept, cotangents, spec=ahead)
        return found, tuple(True for _ in found)

    return list(one(tuple(kept), tuple(cotangents)))


def factors_of_each(rule: Any, kept: Sequence[Any], cotangent: Any) -> tuple[Array, Array]:
    """Return the factors that a rule finds, under ``vmap``; no Explicit axis is in its way."""
    if meshes.explicit_mesh(map(jax.typeof, [*kept, cotangent])) is None:
        found: tuple[Array, Array] = rule.factors(kept, cotangent)
        return found

    @custom_vmap
    def one(kept: Any, cotangent: Any) -> Any:
        return meshes.automatic(rule.factors, kept, cotangent)

    @one.def_vmap
    def many(examples: int, batched: Any, kept: Any, cotangent: Any) -> Any:
        del examples
        batched = tuple(batched)
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        ahead = _ahead(batched, (kept, cotangent))
        found = meshes.automatic(jax.vmap(rule.factors, axes), kept, cotangent, spec=ahead)
        return found, (True, True)

    left, right = one(list(kept), cotangent)
    return left, right


def _ahead(batched: Any, arrays: Any) -> Any:
    """Return by what the examples are sharded."""
    flags, leaves = jax.tree.leaves(batched), jax.tree.leaves(arrays)
    some = (leaf for flag, leaf in zip(flags, leaves, strict=True) if flag)
    return meshes.spec_of(jax.typeof(next(some)))[0]
