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
    layout = params["dimension_numbers"]
    inputs = _channels_last(inputs, layout.lhs_spec)
    cotangents = _channels_last(cotangents, layout.out_spec)
    if 0 in cotangents.shape:
        return jnp.zeros(len(inputs), reductions.sum_type(cotangents.dtype))
    sides = zip(params["padding"], params["lhs_dilation"], strict=True)
    geometry = convolution.Geometry(
        kernel,
        params["window_strides"],
        params["rhs_dilation"],
        [(low, high, step - 1) for (low, high), step in sides],
        params["feature_group_count"],
    )
    squares: Array = convolution.squares(ARRAYS, inputs, cotangents, geometry)
    return squares


def _channels_last(array: Array, layout: Sequence[int]) -> Array:
    """Return an array of shape (n, frames, ..., channels); the layout says where they were."""
    frames, channels, *spatial = layout
    return array.transpose(0, frames + 1, *(axis + 1 for axis in spatial), channels + 1)
