"""Whether the gradient of one example is that of this device's example alone.

Guarantees: a derivative that passes from one device to another is an error, whether or not JAX
checks what varies between them. Collectives through which no derivative passes are fine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from cabs_jax.graph.arguments import Arguments

# Have the name of an axis, and send nothing.
_SILENT = frozenset("axis_index pcast pvary".split())


def check_alone(closed: ClosedJaxpr, arguments: Arguments) -> None:
    """Raise ValueError if a parameter's gradient passes through a collective of ``shard_map``.

    Args:
        closed: The loss of one example.
        arguments: What it is called with.
    """
    manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    if not manual or not any(_collectives(closed.jaxpr, manual)):
        return
    for name, axes in _derivative_collectives(closed, arguments, manual):
        over = ", ".join(map(repr, axes))
        raise ValueError(
            f"loss_fn must give the loss of this device's own example, but its gradient passes "
            f"through {name} over {over}, so that it is made of examples of several devices, as "
            "with parameters that are sharded inside of shard_map. Leave the sharding to jax.jit, "
            "with batch and parameters on a mesh and no shard_map, where statistics are exact; or "
            "hold fixed what passes between devices, with jax.lax.stop_gradient"
        )


def _derivative_collectives(
    closed: ClosedJaxpr, arguments: Arguments, manual: frozenset[str]
) -> list[tuple[str, Sequence[str]]]:
    found: list[tuple[str, Sequence[str]]] = []
    leaves = list(arguments.of_one())

    def look(*given: Any) -> Any:
        def loss(*parameters: Any) -> Any:
            new = iter(parameters)
            is_parameter = arguments.is_parameter
            merged = [
                next(new) if is_one else leaf
                for leaf, is_one in zip(given, is_parameter, strict=True)
            ]
            return jaxpr_as_fun(closed)(*merged)[0]

        chosen = [
            leaf for leaf, is_one in zip(given, arguments.is_parameter, strict=True) if is_one
        ]
        out, push = jax.linearize(loss, *chosen)
        found.extend(_collectives(jax.make_jaxpr(push)(*chosen).jaxpr, manual))
        return out

    jax.make_jaxpr(look)(*leaves)
    return found


def _collectives(jaxpr: Jaxpr, manual: frozenset[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield the collectives of a program, by name, and over which axes of the mesh they are."""
    for equation in jaxpr.eqns:
        named = equation.params.get("axes", equation.params.get("axis_name", ()))
        names = (named,) if isinstance(named, str) else named
        over = [one for one in names if one in manual] if isinstance(names, (tuple, list)) else []
        name = str(equation.primitive.name)
        if over and name not in _SILENT:
            yield name, over
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                program = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                if isinstance(program, Jaxpr):
                    yield from _collectives(program, manual)
