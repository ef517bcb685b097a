"""The arguments of a loss, leaf by leaf: parameters, examples, and what all examples share.

Guarantees: what cannot be a batch is an error that names the leaf by its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from cabs.gradients.errors import listed
from cabs_jax.graph import meshes
from cabs_jax.graph.program import Status


@dataclass(frozen=True)
class Arguments:
    """The leaves of all arguments.

    Args:
        leaves: Arrays.
        paths: Where each is, in words of Python.
        axes: Along which axis the examples are; None where they share the leaf.
        is_parameter: Which leaves gradients are taken of.
        treedef: What the leaves are leaves of.
        examples: m.
    """

    leaves: tuple[Any, ...]
    paths: tuple[str, ...]
    axes: tuple[int | None, ...]
    is_parameter: tuple[bool, ...]
    treedef: Any
    examples: int

    @property
    def statuses(self) -> list[Status]:
        """What each leaf is in the program of one example."""
        return [
            Status.PARAMETER
            if is_parameter
            else Status.CONSTANT
            if axis is None
            else Status.EXAMPLE
            for is_parameter, axis in zip(self.is_parameter, self.axes, strict=True)
        ]

    @property
    def batched(self) -> list[tuple[Any, int]]:
        """The leaves that hold examples, and along which axis."""
        both = zip(self.leaves, self.axes, strict=True)
        return [(leaf, axis) for leaf, axis in both if axis is not None]

    @property
    def varying(self) -> frozenset[str]:
        """Over which axes of the mesh that ``shard_map`` is manual over leaves differ."""
        return frozenset().union(*(meshes.varying_of(jax.typeof(leaf)) for leaf in self.leaves))

    def with_leaves(self, leaves: Iterable[Any]) -> Arguments:
        """Return the same arguments with other leaves."""
        return replace(self, leaves=tuple(leaves))

    def trees(self) -> tuple[Any, ...]:
        """Return the arguments themselves."""
        trees: tuple[Any, ...] = jax.tree.unflatten(self.treedef, self.leaves)
        return trees

    def of_one(self) -> list[jax.ShapeDtypeStruct]:
        """Return shapes and types of the leaves, for one example."""
        found = []
        for leaf, axis in zip(self.leaves, self.axes, strict=True):
            aval = jax.typeof(leaf)
            found.append(meshes.resized(aval, [at for at in range(leaf.ndim) if at != axis]))
        return found


@dataclass(frozen=True)
class _Axis:
    """An axis, or None, as a leaf of a pytree, which None is not."""

    axis: int | None


def read_arguments(args: Sequence[Any], argnums: Sequence[int], in_axes: Any) -> Arguments:
    """Return the leaves of arguments; ``in_axes`` is as in :func:`cabs_jax.value_and_grad`."""
    if in_axes is None or isinstance(in_axes, int):
        default = 0 if in_axes is None else in_axes
        in_axes = [None if at in argnums else default for at in range(len(args))]
    if len(in_axes) != len(args):
        raise ValueError(
            f"in_axes must have an entry for each argument, got {len(in_axes)} for {len(args)} "
            "arguments"
        )
    leaves, paths, axes, parameters, sizes = [], [], [], [], {}
    for at, (arg, prefix) in enumerate(zip(args, in_axes, strict=True)):
        if at in argnums and jax.tree.leaves(prefix):
            raise ValueError(
                f"in_axes must be None for argument {at}, of which gradients are taken, "
                f"got {prefix}"
            )
        placed = jax.tree.map(
            lambda axis, part: jax.tree.map(lambda _, axis=axis: _Axis(axis), part),
            prefix,
            arg,
            is_leaf=lambda one: one is None,
        )
        found, _ = jax.tree_util.tree_flatten_with_path(arg)
        flat = [one.axis for one in jax.tree.leaves(placed)]
        for (path, leaf), axis in zip(found, flat, strict=True):
            name = f"argument {at}{jax.tree_util.keystr(path)}"
            array = _as_array(leaf, name)
            if at in argnums and not jnp.issubdtype(array.dtype, jnp.inexact):
                raise TypeError(
                    f"{name}, of which a gradient is taken, must hold real or complex numbers, got "
                    f"{array.dtype}; make it an argument of its own, with None in in_axes"
                )
            if axis is not None:
                sizes[name] = _size(array, axis, name)
                axis %= array.ndim
            leaves.append(array)
            paths.append(name)
            axes.append(axis)
            parameters.append(at in argnums)
    if not any(parameters):
        raise ValueError(f"argnums = {tuple(argnums)} must select arguments that hold arrays")
    if len(set(sizes.values())) != 1:
        raise ValueError(f"all leaves of a batch must hold as many examples, got {_shown(sizes)}")
    treedef = jax.tree.structure(tuple(args))
    examples = next(iter(sizes.values()))
    if not examples:
        raise ValueError("a batch must hold at least one example, got none")
    whole = tuple(meshes.placed(leaves))
    return Arguments(whole, tuple(paths), tuple(axes), tuple(parameters), treedef, examples)


def _shown(sizes: Mapping[str, int]) -> str:
    """Return how many examples there are in what, the rarest number first."""
    names: dict[int, list[str]] = {}
    for name, size in sizes.items():
        names.setdefault(size, []).append(name)
    found = sorted(names.items(), key=lambda item: len(item[1]))
    return listed([f"{size} in {listed(some)}" for size, some in found]) or "no such leaf"


def _as_array(leaf: Any, name: str) -> Any:
    try:
        return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    except TypeError as error:
        raise TypeError(
            f"{name} must be an array, got {leaf!r}; keep what is none out of the arguments, as "
            "equinox.partition and flax.nnx.split do"
        ) from error


def _size(array: Any, axis: int, name: str) -> int:
    if not -array.ndim <= axis < array.ndim:
        hint = ""
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            hint = "; give each example its own key, jax.random.split(key, m)"
        raise ValueError(
            f"{name} must hold the examples along axis {axis}, got shape {array.shape}{hint}. What "
            "all examples share has None in in_axes"
        )
    return int(array.shape[axis])


def positions_of(argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Return which of so many arguments are differentiated, counted from the first."""
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    return tuple(at + count if at < 0 else at for at in chosen)


def trace(
    loss_fn: Callable[..., Any], arguments: Arguments, has_aux: bool
) -> tuple[ClosedJaxpr, Any]:
    """Return the jaxpr of the loss of one example, and the structure of what else it gives."""

    def flat(*leaves: Any) -> Any:
        found = loss_fn(*jax.tree.unflatten(arguments.treedef, leaves))
        if not has_aux:
            return found, ()
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(
                f"with has_aux=True, loss_fn must return a pair (loss, aux), got {found!r}"
            )
        return found

    try:
        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*arguments.of_one())
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        raise ValueError(
            "loss_fn must give the loss of one example, but it uses an axis of the batch "
            f"({error}), as batch normalization does, so that one example has no gradient of its "
            "own. Take statistics from groups of examples, with cabs_jax.PartialStatistics, or "
            "normalize over something else"
        ) from error
    loss = shapes[0]
    if not hasattr(loss, "shape") or loss.shape != () or not _is_real(loss):
        raise TypeError(
            "loss_fn must return the loss of one example, a real number of shape (), got "
            f"{loss}; it is called with one example, without the batch axis"
        )
    return closed, jax.tree.structure(shapes[1])


def _is_real(loss: Any) -> bool:
    return bool(jnp.issubdtype(loss.dtype, jnp.floating))
