"""The gradients of a convolution's kernel, in any layout of JAX.

Guarantees: those of :mod:`cabs.gradients.convolution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from cabs.gradients import convolution
from cabs_jax.norms import reductions
from cabs_jax.norms.arrays import ARRAYS


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
    if 0 in cotangents.shape:
        return jnp.zeros(len(inputs), reductions.sum_type(cotangents.dtype))
    sides, geometry = _laid_out(inputs, cotangents, kernel, params)
    squares: Array = convolution.squares(ARRAYS, *sides, geometry)
    return squares


def square_and_sum(
    inputs: Array, cotangents: Array, kernel: Sequence[int], params: dict[str, Any]
) -> tuple[Array, Array]:
    """Return |g_i|^2, and the sum of all g_i, in the kernel's shape; arguments are the same."""
    sides, geometry = _laid_out(inputs, cotangents, kernel, params)

    def some(inputs: Array, cotangents: Array) -> tuple[Array, list[Array]]:
        parts = [*convolution.parts(ARRAYS, inputs, cotangents, geometry)]
        squares = [*map(reductions.square, parts)]
        return sum(squares[1:], squares[0]), [
            jnp.sum(part, axis=0, keepdims=True) for part in parts
        ]

    needed = convolution.needed(ARRAYS, *sides, geometry)
    squares, parts = reductions.each_and_sum(some, sides, needed)
    summed = convolution.whole(ARRAYS, parts, geometry)[0]
    # Channels out, channels in, kernel.
    summed = jnp.moveaxis(summed.reshape(-1, *summed.shape[2:]), -1, 1)
    layout = params["dimension_numbers"].rhs_spec
    return squares, summed.transpose([layout.index(axis) for axis in range(len(layout))])


def _laid_out(
    inputs: Array, cotangents: Array, kernel: Sequence[int], params: dict[str, Any]
) -> tuple[tuple[Array, Array], convolution.Geometry]:
    """Return both with their channels last, and how the kernel moves."""
    layout = params["dimension_numbers"]
    sides = zip(params["padding"], params["lhs_dilation"], strict=True)
    geometry = convolution.Geometry(
        kernel,
        params["window_strides"],
        params["rhs_dilation"],
        [(low, high, step - 1) for (low, high), step in sides],
        params["feature_group_count"],
    )
    arrays = _channels_last(inputs, layout.lhs_spec), _channels_last(cotangents, layout.out_spec)
    return arrays, geometry


def _channels_last(array: Array, layout: Sequence[int]) -> Array:
    """Return an array of shape (n, frames, ..., channels); the layout says where they were."""
    frames, channels, *spatial = layout
    return array.transpose(0, frames + 1, *(axis + 1 for axis in spatial), channels + 1)
