"""What is found for each example, computed for all of them at once.

Guarantees: what is computed sees arrays of all examples, on whatever devices they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from cabs_jax.graph import meshes
from cabs_jax.graph.meshes import Explicit


def of_each(
    function: Callable[..., tuple[list[Array], list[Array]]],
    kept: Sequence[Any],
    cotangents: Sequence[Any],
    sample: int,
    marks: Sequence[Any] = (),
) -> tuple[list[Array], list[Array]]:
    """Return what a function of some examples finds for each of the first ones; others get zero.

    And what it finds for all of them together: for each of ``marks`` what its cotangents, which
    JAX adds up over the examples, add up to.

    Args:
        function: It is called with all of them at once, the examples in front, with what has them
            in front, as what all of them share has not, and with the way back to Explicit axes.
        kept: Values of one example, under ``vmap``.
        cotangents: The same.
        sample: How many are taken.
        marks: Numbers that are the same for all examples, unless JAX made them differ.
    """

    def alone(explicit: Explicit, kept: Any, cotangents: Any) -> Any:
        ahead = jax.tree.map(lambda array: array[None], (kept, cotangents))
        each, sums = function(*ahead, jax.tree.map(lambda _: True, ahead), explicit)
        return tuple(array[0] for array in each), tuple(sums)

    @custom_vmap
    def one(kept: Any, cotangents: Any, marks: Any) -> Any:
        del marks
        run = partial(alone, Explicit.of([*kept, *cotangents], ahead=1))
        return meshes.automatic(run, kept, cotangents)

    @one.def_vmap
    def many(examples: int, batched: Any, kept: Any, cotangents: Any, marks: Any) -> Any:
        del marks
        *both, differ = batched
        batched = tuple(both)
        explicit = Explicit.of([*kept, *cotangents])
        if any(differ):
            # Each example has a parameter of its own, as in branches that it chooses.
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
            found = jax.vmap(partial(alone, explicit), axes)(kept, cotangents)
            return found, jax.tree.map(lambda _: True, found)

        def some(kept: Any, cotangents: Any) -> Any:
            taken = jax.tree.map(
                lambda is_batched, array: array[:sample] if is_batched else array,
                batched,
                (kept, cotangents),
            )
            each, sums = function(*taken, batched, explicit)
            each = [jnp.pad(array, (0, examples - len(array))) for array in each]
            return tuple(each), tuple(sums)

        ahead = _ahead(batched, (kept, cotangents))
        found = meshes.automatic(some, kept, cotangents, spec=ahead)
        return found, (tuple(True for _ in found[0]), tuple(False for _ in found[1]))

    each, sums = one(tuple(kept), tuple(cotangents), tuple(marks))
    return list(each), list(sums)


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
