"""Sums of squared norms of per-example gradients, without forming the gradients of matrices.

Guarantees: exact up to rounding, accumulated in float32 or better, whatever autocast says, and
never negative; examples are taken a few at a time, since the page faults of large temporaries cost
more than the arithmetic; on a GPU nothing waits for the device.

Every sum is a 0-d float64 tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# Elements of the temporaries that a chunk of examples may need: 4 MiB in float32.
_CHUNK = 2**20

# Squares summed in single precision before the sum goes on in double.
_BLOCK = 2048

# Elements up to which squares are summed in double precision at once.
_SMALL = 2**14

# What symmetry saves, measured.
_SYMMETRIC = 0.85

# Rows from which symmetry is worth a product more.
_SPLIT = 64

# How much larger than the sum its terms may be, for every row, before rounding errors show.
_CANCELLING = 64.0


_is_traced: ContextVar[bool] = ContextVar("is_traced", default=False)


@contextmanager
def traced() -> Iterator[None]:
    """Take all examples at once, and look at no values: what is computed here is compiled later."""
    token = _is_traced.set(True)
    try:
        yield
    finally:
        _is_traced.reset(token)


def is_traced() -> bool:
    """Return whether what is computed is compiled later, so that there are no values yet."""
    return _is_traced.get()


def may_look(device: torch.device) -> bool:
    """Return whether values are there to be looked at, without waiting for a device."""
    return device.type == "cpu" and not is_traced()


def parts(examples: int, needed: int, chunk: int | None) -> Iterator[slice]:
    """Yield slices of examples, of ``chunk``, or of as many as ``needed`` elements each allow."""
    whole = examples if is_traced() else max(1, _CHUNK // max(needed, 1))
    size = chunk or whole
    for start in range(0, examples, size):
        yield slice(start, min(start + size, examples))


def rows_of(left: Tensor, right: Tensor, chunk: int | None = None) -> Tensor:
    """Return the sum over i of |g_i|^2 for g_i = left_i' right_i.

    Args:
        left: Shape (n, T, k).
        right: Shape (n, T, h).
        chunk: How many to take at a time.

    For T = 1 that is |left_i|^2 |right_i|^2, and otherwise computed from g_i, or as the sum over
    pairs of rows of (left_t . left_s)(right_t . right_s), whichever is cheaper.
    """
    length, width, height = *left.shape[1:], right.shape[2]
    if length == 1:
        return (_row_norms(left).double() * _row_norms(right)).square().sum()
    # In pairs single precision is enough only if the terms do not cancel, which has to be looked
    # at; on a GPU that would wait for the device.
    is_cheaper = _SYMMETRIC * length * (width + height) < width * height
    pairwise = is_cheaper and may_look(left.device)
    needed = 2 * length**2 if pairwise else width * height
    if left.dtype.itemsize < 4 or right.dtype.itemsize < 4:
        needed += length * (width + height)
    total = zero(left.device)
    for part in parts(len(left), needed, chunk):
        x, b = at_least_single(left[part]), at_least_single(right[part])
        total += _pairs(x, b) if pairwise else square(x.mT @ b)
    return total


def _pairs(left: Tensor, right: Tensor) -> Tensor:
    # The matrices are symmetric: what is left of a block on the diagonal is what is above it.
    half = left.shape[1] // 2 if left.shape[1] >= _SPLIT else 0
    total, bound = left.new_zeros(2, len(left))
    for start, end in ((0, half), (half, left.shape[1])) if half else ((0, left.shape[1]),):
        terms = _gram(left, start, end).mul_(_gram(right, start, end))
        block = terms[:, :, : end - start]
        # No term of an example is larger than a product of two norms on the diagonal.
        bound += block.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt().sum(dim=1)
        total += block.sum(dim=(1, 2))
        if terms.shape[2] > end - start:
            total += 2.0 * terms[:, :, end - start :].sum(dim=(1, 2))
    summed: Tensor = total.double().sum()
    if _has_cancelled(bound, summed, left.shape[1]):
        return square(left.double().mT @ right.double())
    return summed


def of_pairs(left: Tensor, right: Tensor) -> Tensor | None:
    """Return the sum over examples and pairs of the product of two matrices, shape (n, T, T).

    None if the terms of an example cancel so much that rounding errors would show.
    """
    diagonals = left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)
    bound = diagonals.clamp_min(0.0).sqrt().sum(dim=1)
    total: Tensor = (left * right).sum(dim=(1, 2)).double().sum()
    return None if _has_cancelled(bound, total, left.shape[1]) else total


def _has_cancelled(bound: Tensor, total: Tensor, length: int) -> bool:
    """Return whether sums over pairs of rows are too small for the size of their terms.

    ``bound`` is the square root of the size of an example's terms, shape (n,).
    """
    # Not a number compares false, and has.
    return not bool(bound.double().square().sum() <= _CANCELLING * length * total)


def _gram(rows: Tensor, start: int, end: int) -> Tensor:
    """Return the products of some rows with themselves and all after them."""
    return torch.bmm(rows[:, start:end], rows[:, start:].mT)


def square(tensor: Tensor) -> Tensor:
    """Return the sum of squares of all elements."""
    found = roots(tensor)
    return found[0].square().squeeze(0) if len(found[0]) == 1 else squares_of(found, tensor.device)


def roots(tensor: Tensor) -> list[Tensor]:
    """Return vectors that have together the same sum of squares, but few elements.

    A single sum of ten million float32 squares loses three digits, and is not faster than a sum in
    double precision of blocks that are summed in single. ``tensor`` can be sparse.
    """
    dense = tensor.coalesce().values() if tensor.is_sparse else tensor
    if dense.numel() <= _SMALL:
        # Fewer calls matter more than what they do.
        return [torch.linalg.vector_norm(dense, dtype=torch.float64).reshape(1)]
    flat = at_least_single(dense).flatten()
    whole = flat.numel() // _BLOCK * _BLOCK
    blocks = [torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1)]
    if whole < flat.numel():
        blocks.append(torch.linalg.vector_norm(flat[whole:]).reshape(1))
    return blocks


def squares_of(found: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of vectors, such as :func:`roots` gives."""
    if not found:
        return zero(device)
    total: Tensor = torch.cat([one.to(device) for one in found]).double().square().sum()
    return total


def zero(device: torch.device) -> Tensor:
    """Return the sum over nothing."""
    return torch.zeros((), dtype=torch.float64, device=device)


def at_least_single(tensor: Tensor) -> Tensor:
    """Return the tensor in single precision, or in double if it is."""
    return tensor.to(single_or_double(tensor))


def single_or_double(tensor: Tensor) -> torch.dtype:
    """Return the precision in which sums over a tensor's elements are taken."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _row_norms(rows: Tensor) -> Tensor:
    """Return the norm of each example's only row, shape (n,)."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=(1, 2), dtype=single_or_double(rows))
    return norms
