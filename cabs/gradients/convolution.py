"""The gradient of a convolution's kernel: a matrix that meets patches of the input.

Guarantees: any number of dimensions, by groups of channels, with stride, dilation and padding; no
more is laid out at a time than what the whole kernel sees, where that is little, or one row of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cabs.gradients.arrays import Array, PatchArrays, Squares


class Geometry(NamedTuple):
    """How a kernel moves over its input; one entry for each spatial axis."""

    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[tuple[Any, Any, int]]
    """What is added in front, behind, and between two elements of the input."""
    groups: int
    """Of channels."""

    def laid_out(self, arrays: PatchArrays, inward: int) -> int:
        """Return how many of the kernel's axes, the last ones, are laid out at a time."""
        width = inward // self.groups * math.prod(self.kernel)
        return len(self.kernel) if width <= arrays.patch_width else 1


def parts(
    arrays: PatchArrays, inputs: Array, cotangents: Array, geometry: Geometry
) -> Iterator[Array]:
    """Yield the gradients of the kernel's parts, (n, groups, channels out, elements * channels in).

    A part is the whole kernel, or a row of it along its last axis. Channels in and out are those of
    a group.

    Args:
        arrays: The framework's array operations.
        inputs: Shape (n, *spatial, channels in), or (n, frames, *spatial, channels in).
        cotangents: Shape (n, *positions, channels out), or with as many frames.
        geometry: How the kernel moves.
    """
    kernel, groups = geometry.kernel, geometry.groups
    rank = len(kernel)
    inward = arrays.shape(inputs)[-1]
    _, *positions, outward = arrays.sizes(cotangents)
    # Behind the examples, and the frames if there are any.
    first = len(positions) - rank + 1
    places, positions = math.prod(positions), positions[first - 1 :]
    split = rank - geometry.laid_out(arrays, inward)

    def seen(array: Array, axis: int, at: int) -> Array:
        """Return what the elements of the kernel at a place along an axis see."""
        start, step = at * geometry.dilation[axis], geometry.stride[axis]
        stop = start + (positions[axis] - 1) * step + 1
        return arrays.strided(array, first + axis, start, stop, step)

    def in_groups(array: Array, width: int) -> Array:
        """Return an array in shape (n, groups, places, width)."""
        if groups == 1:
            return arrays.reshape(array, [1, places, width])
        return arrays.transpose(arrays.reshape(array, [places, groups, width]), [1, 0, 2])

    padded = arrays.pad(inputs, first, geometry.padding)
    if groups > 1:
        # The channels of a group stay together.
        sizes = [*arrays.sizes(padded)[1:-1], groups, inward // groups]
        padded = arrays.reshape(padded, sizes)
    for axis in reversed(range(split, rank)):
        beside = [seen(padded, axis, at) for at in range(kernel[axis])]
        padded = beside[0] if len(beside) == 1 else arrays.concatenate(beside, -1)
    right = in_groups(cotangents, outward // groups)
    width = inward // groups * math.prod(kernel[split:])
    for place in itertools.product(*map(range, kernel[:split])):
        left = padded
        for axis, at in enumerate(place):
            left = seen(left, axis, at)
        yield arrays.contract(right, in_groups(left, width), 2)


def whole(arrays: PatchArrays, found: Sequence[Array], geometry: Geometry) -> Array:
    """Return gradients, (n, groups, channels out, *kernel, channels in), from all their parts."""
    joined = found[0] if len(found) == 1 else arrays.concatenate(found, 3)
    groups, outward, width = arrays.shape(joined)[1:]
    inward = width // math.prod(geometry.kernel)
    return arrays.reshape(joined, [groups, outward, *geometry.kernel, inward])


def squares(arrays: PatchArrays, inputs: Array, cotangents: Array, geometry: Geometry) -> Squares:
    """Return |g_i|^2 of the kernel; arguments are those of :func:`parts`."""

    def some(inputs: Array, cotangents: Array) -> Squares:
        first, *rest = map(arrays.squares, parts(arrays, inputs, cotangents, geometry))
        return sum(rest, first)

    size = needed(arrays, inputs, cotangents, geometry)
    return arrays.in_chunks(some, (inputs, cotangents), size)


def needed(arrays: PatchArrays, inputs: Array, cotangents: Array, geometry: Geometry) -> int:
    """Return how many elements the temporaries of an example have; unknown sizes count as one."""
    inward, outward = arrays.shape(inputs)[-1], arrays.shape(cotangents)[-1]
    positions = math.prod(size or 1 for size in arrays.shape(cotangents)[1:-1])
    split = len(geometry.kernel) - geometry.laid_out(arrays, inward)
    wide = inward * math.prod(geometry.kernel[split:])
    size: int = positions * (wide + outward) + wide * outward // geometry.groups
    return size
