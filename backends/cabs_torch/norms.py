"""Sums of squared norms of per-example gradients, without forming the gradients of matrices.

Guarantees: exact up to rounding, accumulated in float32 or better, whatever autocast says, and
never negative; examples are taken a few at a time, since the page faults of large temporaries cost
more than the arithmetic; nothing waits for a device.

Every function takes the gradient of the loss with respect to an operation's output, and returns
the sum over examples of |g_i|^2, as a 0-d float64 tensor, where g_i is example i's share of the
parameter's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cabs_torch.layout import Layout

# Elements of the temporaries that a chunk of examples may need: 2 MiB in float32.
_CHUNK = 2**19

# Squares summed in single precision before the sum goes on in double.
_BLOCK = 2048


def by_example(rows: Tensor, layout: Layout) -> Tensor:
    """Return rows of shape (outer * m * T, ...) as (m, outer * T, ...).

    ``layout`` is that of a tensor whose leading axis numbers the same rows.
    """
    rest = rows.shape[1:]
    if layout.outer == 1:
        return rows.reshape(layout.examples, -1, *rest)
    blocks = rows.reshape(layout.outer, layout.examples, -1, *rest).transpose(0, 1)
    return blocks.reshape(layout.examples, -1, *rest)


def matrix(inputs: Tensor, cotangents: Tensor) -> Tensor:
    """Return the sum for a matrix W in y = x W.

    Args:
        inputs: x, shape (m, T, k).
        cotangents: Those of y, shape (m, T, n). Then g_i = x_i' b_i, whose squared norm is that of
            x_i times that of b_i for T = 1, and otherwise sum_ts (x_t . x_s)(b_t . b_s), or
            computed from g_i, whichever is cheaper.
    """
    length, width = inputs.shape[1:]
    height = cotangents.shape[2]
    if length == 1:
        return (_row_squares(inputs) * _row_squares(cotangents)).sum()
    # In double precision, which takes twice the time: where the cotangents of an example add up to
    # nearly nothing, as behind a softmax over positions, the terms cancel.
    pairwise = 2 * length * (width + height) < width * height
    needed = 2 * length**2 if pairwise else width * height
    size = max(1, _CHUNK // (needed + length * (width + height)))
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for x, b in zip(torch.split(inputs, size), torch.split(cotangents, size), strict=True):
        if pairwise:
            x, b = x.double(), b.double()
            total += ((x @ x.mT) * (b @ b.mT)).sum(dim=(1, 2)).clamp_min(0.0).sum()
        else:
            total += _square_sum(_at_least_single(x).mT @ _at_least_single(b))
    return total


def convolution(
    inputs: Tensor,
    cotangents: Tensor,
    layout: Layout,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the sum for the weight of a convolution.

    Args:
        inputs: Shape (N, channels in, *spatial).
        cotangents: Shape (N, channels out, *positions).
        layout: That of ``cotangents``.
        kernel: Size of the kernel, one number per spatial axis, as are the next three.
        stride: Step between positions.
        padding: Zeros on both sides.
        dilation: Step between the elements of the kernel.
        groups: Blocks of channels that do not meet.
    """
    frames = cotangents.shape[0] // layout.examples
    positions = cotangents.shape[2:]
    patch = inputs.shape[1] * math.prod(kernel)
    elements = math.prod(positions) * (patch + cotangents.shape[1])
    size = max(1, _CHUNK // (frames * elements))
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    chunks = zip(
        torch.split(by_example(inputs, layout), size),
        torch.split(by_example(cotangents, layout), size),
        strict=True,
    )
    for x, b in chunks:
        windows = _patches(x.flatten(0, 1), kernel, stride, padding, dilation, positions)
        # One product per example and block of channels, over its frames and positions.
        per_example = (len(x), frames, groups, -1, math.prod(positions))
        a = windows.reshape(per_example).permute(0, 2, 1, 4, 3).flatten(2, 3)
        b = b.reshape(per_example).permute(0, 2, 1, 4, 3).flatten(2, 3)
        total += matrix(a.flatten(0, 1), b.flatten(0, 1))
    return total


def shift(cotangent: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    """Return the sum for a parameter of ``shape`` that is broadcast and added.

    Its gradient is no larger than the cotangent and is formed: a sum over the axes along which it
    was broadcast.
    """
    axis, inside = layout.axis()
    before, after = cotangent.shape[:axis], cotangent.shape[axis + 1 :]
    split = cotangent.reshape(*before, inside, layout.examples, -1, *after)
    examples_first = split.movedim(axis + 1, 0)
    aligned = [1] * (cotangent.dim() - len(shape)) + list(shape)
    kept = [*aligned[:axis], 1, 1, *aligned[axis + 1 :]]
    summed = [place for place, size in enumerate(kept, start=1) if size == 1]
    gradients = examples_first.sum(dim=summed, dtype=_at_least_single_type(cotangent.dtype))
    return _square_sum(gradients)


def square(gradient: Tensor) -> Tensor:
    """Return the squared norm of a tensor, as a 0-d float64 tensor."""
    return _square_sum(_at_least_single(gradient))


def _patches(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """Return what the kernel sees, shape (N, channels, *kernel, *positions), as a view."""
    rank = len(kernel)
    if any(padding):
        sides = [amount for side in reversed(padding) for amount in (side, side)]
        inputs = torch.nn.functional.pad(inputs, sides)
    for axis in range(rank):
        reach = (kernel[axis] - 1) * dilation[axis] + 1
        inputs = inputs.unfold(2 + axis, reach, stride[axis]).narrow(2 + axis, 0, positions[axis])
        inputs = inputs[..., :: dilation[axis]]
    order = [0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank)]
    return inputs.permute(order)


def _row_squares(rows: Tensor) -> Tensor:
    """Return the squared norm of each example's only row, shape (m,), in float64."""
    dtype = _at_least_single_type(rows.dtype)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=(1, 2), dtype=dtype)
    return norms.double().square()


def _square_sum(tensor: Tensor) -> Tensor:
    """Return the sum of squares in float64, of blocks summed in the tensor's own precision.

    A single sum of ten million float32 squares loses three digits, and is not faster.
    """
    flat = tensor.flatten()
    whole = flat.numel() // _BLOCK * _BLOCK
    rest: Tensor = torch.linalg.vector_norm(flat[whole:]).double().square()
    if not whole:
        return rest
    blocks: Tensor = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1)
    return blocks.double().square().sum() + rest


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.to(_at_least_single_type(tensor.dtype))


def _at_least_single_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
