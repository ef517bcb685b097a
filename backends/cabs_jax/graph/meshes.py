"""Types that say which devices hold what: axes of a mesh that are Explicit, or manual.

Guarantees: the loss runs on types that JAX would give it itself, so that what works in JAX works
measured; what only measures runs with Explicit axes taken as Auto, where XLA shards it. Without a
mesh nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec


def shape_of(aval: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a value, with what it says of devices."""
    return resized(aval, range(len(aval.shape)))


def resized(aval: Any, axes: Sequence[int]) -> jax.ShapeDtypeStruct:
    """Return the type of a value with some of its axes only."""
    options = {"weak_type": getattr(aval, "weak_type", False)}
    # One of the two, by release.
    for name in ("vma", "manual_axis_type"):
        if hasattr(aval, name):
            options[name] = getattr(aval, name)
    if (mesh := mesh_of(aval)) is not None:
        spec = spec_of(aval)
        options["sharding"] = NamedSharding(mesh, PartitionSpec(*(spec[axis] for axis in axes)))
    return jax.ShapeDtypeStruct([aval.shape[axis] for axis in axes], aval.dtype, **options)


def mesh_of(aval: Any) -> Any:
    """Return the mesh that a type speaks of, or None."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return None if mesh is None or mesh.empty else mesh


def spec_of(aval: Any) -> tuple[Any, ...]:
    """Return by which axes of a mesh a value is sharded, for each of its own axes."""
    if mesh_of(aval) is None:
        return (None,) * len(aval.shape)
    spec = tuple(aval.sharding.spec)
    return spec + (None,) * (len(aval.shape) - len(spec))


def names_of(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of axes that are given as JAX takes them: one, several, or none."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def varying_of(aval: Any) -> frozenset[str]:
    """Return over which manual axes a value differs, as far as JAX checks it."""
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(aval, "vma", ()) if manual is None else manual.varying)


def varying(array: Array, axes: Iterable[str]) -> Array:
    """Return an array that may differ over manual axes too."""
    missing = tuple(sorted(frozenset(axes) - varying_of(jax.typeof(array))))
    if not missing:
        return array
    # Older releases have another name for it.
    cast: Any = getattr(lax, "pcast", None)
    older: Any = getattr(lax, "pvary", None)
    made: Array = older(array, missing) if cast is None else cast(array, missing, to="varying")
    return made


def checked_axes() -> frozenset[str]:
    """Return the manual axes of the surrounding ``shard_map``, where JAX checks what varies."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return frozenset(axis for axis in manual if varying_of(jax.typeof(lax.axis_index(axis))))


def explicit_mesh(avals: Iterable[Any]) -> Any:
    """Return the mesh with Explicit axes that the context, or a type, speaks of; else None."""
    for mesh in (jax.sharding.get_abstract_mesh(), *map(mesh_of, avals)):
        if mesh is not None and mesh.explicit_axes:
            return mesh
    return None


def placed(leaves: Sequence[Any]) -> Sequence[Any]:
    """Return leaves, those of no mesh on all devices of the one with Explicit axes, if any is."""
    avals = [*map(jax.typeof, leaves)]
    mesh = explicit_mesh(avals)
    if mesh is None:
        return leaves
    everywhere = NamedSharding(mesh, PartitionSpec())
    return [
        jax.sharding.reshard(leaf, everywhere) if mesh_of(aval) is None else leaf
        for leaf, aval in zip(leaves, avals, strict=True)
    ]


def broadcast(array: Array, like: Any, ahead: Any = None) -> Array:
    """Return an array that is the same all over the axes of a type, behind its own.

    Args:
        array: Shape () or (n,).
        like: Shape and type of what is behind.
        ahead: By what the first axis is sharded.
    """
    mesh = explicit_mesh([jax.typeof(array), like])
    sharding = None
    if mesh is not None:
        spec = (ahead,) * array.ndim + spec_of(like)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
    shape = (*array.shape, *like.shape)
    return lax.broadcast_in_dim(array, shape, range(array.ndim), out_sharding=sharding)


def automatic(function: Callable[..., Any], *args: Any, spec: Any = None, like: Any = None) -> Any:
    """Return ``function(*args)``, in which XLA decides how Explicit axes are used.

    Args:
        function: From pytrees of arrays to one.
        args: Its arguments.
        spec: By what axes of a mesh the first axis of what it returns is sharded.
        like: A type that says it for each of the axes.
    """
    mesh = explicit_mesh(map(jax.typeof, jax.tree.leaves(args)))
    if mesh is None:
        return function(*args)
    specs = (() if spec is None else (spec,)) if like is None else spec_of(like)
    out: Any = NamedSharding(mesh, PartitionSpec(*specs))
    run: Any = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=out)
    return run(*args)


@dataclass(frozen=True)
class Explicit:
    """The way back from :func:`automatic`, for what has types of its own.

    Args:
        mesh: With axes that were Explicit outside; None if there was none.
        specs: How each of some arrays was sharded outside.
    """

    mesh: Any
    specs: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, arrays: Sequence[Any], ahead: int = 0) -> Explicit:
        """Return the way back for arrays, which get so many axes ahead of theirs."""
        avals = [*map(jax.typeof, arrays)]
        return cls(explicit_mesh(avals), tuple((None,) * ahead + spec_of(one) for one in avals))

    def __call__(self, function: Callable[[Any], Any], arrays: Sequence[Array]) -> Any:
        """Return what a function makes of a list of these arrays, or of some of their examples."""
        if self.mesh is None:
            return function(arrays)
        specs = [
            PartitionSpec(*map(self.fitting, spec, array.shape))
            for spec, array in zip(self.specs, arrays, strict=True)
        ]
        run: Any = jax.sharding.explicit_axes(
            lambda *arrays: function(list(arrays)),
            axes=self.mesh.explicit_axes,
            in_sharding=tuple(specs),
        )
        return run(*arrays)

    def fitting(self, names: Any, size: int) -> Any:
        """Return the axes of the mesh by which an axis is sharded, if its length can be."""
        shards = math.prod(self.mesh.shape[name] for name in names_of(names))
        return names if size % shards == 0 else None
