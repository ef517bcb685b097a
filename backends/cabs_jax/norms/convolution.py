"""The gradients of a convolution's kernel.

Guarantees: they are those of a matrix that meets what the kernel sees, by groups of channels, in
any number of dimensions and any layout; what the whole kernel, or a row of it, sees is laid out for
some examples at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from cabs_jax.norms import ghost_norms

# Elements of a patch up to which it is laid out whole, and not a row of the kernel at a time.
_WHOLE = 512


def square(
    inputs: Array, cotangents: Array, kernel: Sequence[int], params: dict[str, Any]
) -> Array:
    """Return |g_i|^2 of a kernel's gradient, shape (n,).

    Args:
        inputs: Shape (n, ...), the rest as ``conv_general_dilated`` takes it.
        cotangents: Shape (n, ...), the rest as it gives it.
        kernel: The kernel's sizes along the spatial axes.
        params: Those of ``conv_general_dilated``.
    """
    layout = params["dimension_numbers"]
    inputs = _channels_last(inputs, layout.lhs_spec)
    cotangents = _channels_last(cotangents, layout.out_spec)
    _, frames, *positions, outward = cotangents.shape
    groups = params["feature_group_count"]
    inward = inputs.shape[-1] // groups
    rows = frames * math.prod(positions)
    if rows == 0:
        return jnp.zeros(len(inputs), ghost_norms.sum_type(cotangents.dtype))
    # The axes of the kernel before this one are taken element by element.
    split = 0 if inward * math.prod(kernel) <= _WHOLE else len(kernel) - 1
    sides = zip(params["padding"], params["lhs_dilation"], strict=True)
    wider = [(0, 0, 0)] * 2 + [(low, high, step - 1) for (low, high), step in sides] + [(0, 0, 0)]

    def seen(array: Array, axis: int, at: int) -> Array:
        """Return what the elements of the kernel at a place along an axis see."""
        stride, start = params["window_strides"][axis], at * params["rhs_dilation"][axis]
        stop = start + (positions[axis] - 1) * stride + 1
        return lax.slice_in_dim(array, start, stop, stride, axis=2 + axis)

    def some(inputs: Array, cotangents: Array) -> Array:
        n = len(inputs)
        patches = lax.pad(inputs, jnp.zeros((), inputs.dtype), wider)
        patches = patches.reshape(*patches.shape[:-1], groups, inward)
        for axis in reversed(range(split, len(kernel))):
            places = [seen(patches, axis, at) for at in range(kernel[axis])]
            patches = jnp.concatenate(places, axis=-1)
        right = cotangents.reshape(n, rows, groups, -1).swapaxes(1, 2)
        total = jnp.zeros((), ghost_norms.wide(right).dtype)
        for place in itertools.product(*map(range, kernel[:split])):
            left = patches
            for axis, at in enumerate(place):
                left = seen(left, axis, at)
            left = left.reshape(n, rows, groups, -1).swapaxes(1, 2)
            total += ghost_norms.square(ghost_norms.times(left, right, 2))
        return total

    width = groups * inward * math.prod(kernel[split:])
    return ghost_norms.in_chunks(some, (inputs, cotangents), width * (rows + outward // groups))


def _channels_last(array: Array, layout: Sequence[int]) -> Array:
    """Return an array of shape (n, frames, ..., channels); the layout says where they were."""
    frames, channels, *spatial = layout
    return array.transpose(0, frames + 1, *(axis + 1 for axis in spatial), channels + 1)
