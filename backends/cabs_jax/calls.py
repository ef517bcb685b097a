"""Calls outside of ``jit``, which are compiled once for each structure of the loss.

Guarantees: a loss is traced at each call, so that what it closes over is that of this call; what
was compiled is used only for traces that would compile to the same, and keeps none of their arrays.
Inside of ``jit``, and of other transformations, nothing is compiled here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax

from cabs_jax.graph.structure import NoStructureError, structure_of
from cabs_jax.graph.traced import Traced

# How many compiled structures are kept, the last ones.
_KEPT = 64


def call(
    function: Callable[[Traced, Any], Any], traced: Traced, mask: Any, options: Hashable
) -> Any:
    """Return ``function(traced, mask)``, compiled where that is known to be the same.

    Args:
        function: It is told all that its result depends on by its arguments and ``options``.
        traced: The loss, and what it is called with.
        mask: An array, or None.
        options: They, too, must be equal.
    """
    own, closed = traced.own, traced.closed
    arrays = (own.leaves, tuple(closed.consts), mask)
    if _is_traced(arrays):
        return function(traced, mask)
    layout = (own.treedef, own.axes, own.is_parameter, own.examples, traced.structure, options)
    shapes = (tuple(closed.in_avals), None if mask is None else jax.typeof(mask))
    try:
        known = _known((layout, shapes))
        structure = structure_of(closed, own.is_parameter)
        key = hash(structure)
    except (NoStructureError, TypeError):
        return function(traced, mask)
    # A number that the loss closes over, another one at each call, compiles nothing.
    is_expected = not known or key in known
    known.append(key)
    if not is_expected:
        return function(traced, mask)
    empty = traced.given([None] * len(own.leaves), [None] * len(closed.consts))
    given = _Given(
        (layout, shapes, structure), lambda *arrays: function(empty.given(*arrays[:2]), arrays[2])
    )
    return _compiled(given)(*arrays)


@dataclass(frozen=True)
class _Given:
    """A function of arrays, which is equal to others of the same structure."""

    structure: Hashable
    function: Callable[..., Any] = field(compare=False)


@lru_cache(maxsize=_KEPT)
def _compiled(given: _Given) -> Callable[..., Any]:
    return jax.jit(given.function)


@lru_cache(maxsize=_KEPT)
def _known(layout: Hashable) -> deque[int]:
    """Return the structures that were called with arguments of these shapes, the last ones."""
    del layout
    return deque(maxlen=_KEPT)


def _is_traced(arrays: Any) -> bool:
    """Return whether values are not known, or JAX is in the middle of a transformation."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return True
    return any(isinstance(one, jax.core.Tracer) for one in jax.tree.leaves(arrays))
