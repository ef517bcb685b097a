"""Values that only rearrange one input: a norm over them is a norm over that input.

Guarantees: a view holds each element of its region once, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

Region = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class View:
    """Elements of a base, each of them once.

    Args:
        base: What is rearranged.
        region: For each axis of the base, where the elements start and stop.
        axes: For each axis of the view, which axis of the base it is; None if its length is 1.
        key: What the axes are axes of: None for the base itself, and otherwise something that
            stands for an arrangement without such axes, a flattened base for instance.
    """

    base: Any
    region: Region
    axes: tuple[int | None, ...]
    key: Any = None

    @classmethod
    def whole(cls, base: Any, shape: Sequence[int]) -> View:
        """Return the view of a base that is the base."""
        return cls(base, tuple((0, size) for size in shape), tuple(range(len(shape))))

    def overlaps(self, other: View) -> bool:
        """Return whether some element is in both; views of the same base."""
        return all(
            start < other_stop and other_start < stop
            for (start, stop), (other_start, other_stop) in zip(
                self.region, other.region, strict=True
            )
        )

    def within(self, outer: View, skipped: int = 0) -> View:
        """Compose two views: return this view of another view as one of the other's base.

        Args:
            outer: The view that is this one's base.
            skipped: How many of its first axes this one's base does not have: 1 for a slice.
        """
        axes = outer.axes[skipped:]
        region = (
            outer.region if outer.key is not None else _narrowed(outer.region, axes, self.region)
        )
        if self.key is None:
            placed = tuple(None if axis is None else axes[axis] for axis in self.axes)
            # Without the base's axes, a part of an arrangement is an arrangement of its own.
            key = None if outer.key is None else (outer.key, self.region)
            return View(outer.base, region, placed, key)
        return View(outer.base, region, self.axes, (outer.key, self.region, self.key))


def views_of(
    primitive: str, params: dict[str, Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> list[View | None]:
    """Return the views that an operation makes of its inputs, one for each output.

    Args:
        primitive: The primitive's name.
        params: Its parameters.
        inputs: What goes in, with attributes ``view`` and ``aval``.
        outputs: What comes out, with an attribute ``aval``.
    """
    none: list[View | None] = [None] * len(outputs)
    view = getattr(inputs[0], "view", None) if len(inputs) == 1 else None
    if view is None:
        return none
    before, after = inputs[0].aval, outputs[0].aval
    if not jnp.issubdtype(after.dtype, jnp.inexact) or _is_complex(before) != _is_complex(after):
        return none
    if primitive in _UNCHANGED:
        return [view]
    if primitive == "transpose":
        return [replace(view, axes=tuple(view.axes[axis] for axis in params["permutation"]))]
    if primitive == "squeeze":
        dropped = {axis % len(before.shape) for axis in params["dimensions"]}
        kept = tuple(axis for at, axis in enumerate(view.axes) if at not in dropped)
        return [replace(view, axes=kept)]
    if primitive in ("reshape", "broadcast_in_dim"):
        if math.prod(before.shape) != math.prod(after.shape):
            return none
        return [_reshaped(view, before.shape, after.shape, outputs[0])]
    if primitive == "rev":
        return [replace(view, axes=tuple(range(len(after.shape))), key=outputs[0])]
    if primitive == "slice" and view.key is None and set(params["strides"] or [1]) == {1}:
        return [_sliced(view, params["start_indices"], params["limit_indices"])]
    if primitive == "split" and view.key is None:
        found: list[View | None] = []
        at, axis = 0, params["axis"]
        for size in params["sizes"]:
            start, stop = [0] * len(before.shape), list(before.shape)
            start[axis], stop[axis] = at, at + size
            found.append(_sliced(view, start, stop))
            at += size
        return found
    return none


_UNCHANGED = {
    "convert_element_type",
    "copy",
    "copy_p",
    "mesh_cast",
    "optimization_barrier",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
}


def _is_complex(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.complexfloating))


def _reshaped(view: View, before: Sequence[int], after: Sequence[int], made: Any) -> View:
    long = [(size, axis) for size, axis in zip(before, view.axes, strict=True) if size != 1]
    if [size for size, _ in long] != [size for size in after if size != 1]:
        return replace(view, axes=tuple(range(len(after))), key=made)
    left = iter(axis for _, axis in long)
    return replace(view, axes=tuple(next(left) if size != 1 else None for size in after))


def _sliced(view: View, start: Sequence[int], stop: Sequence[int]) -> View:
    parts = zip(start, stop, strict=True)
    return replace(view, region=_narrowed(view.region, view.axes, parts))


def _narrowed(
    region: Region, axes: Sequence[int | None], parts: Iterable[tuple[int, int]]
) -> Region:
    """Return a part of a region, from where it starts and stops along some of its axes."""
    found = list(region)
    for axis, (start, stop) in zip(axes, parts, strict=True):
        if axis is not None:
            begin = found[axis][0]
            found[axis] = (begin + start, begin + stop)
    return tuple(found)
