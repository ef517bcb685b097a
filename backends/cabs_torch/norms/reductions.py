"""Sums of squares, and the chunks in which examples are taken.

Guarantees: exact up to rounding, accumulated in float32 or better, whatever autocast says, and
never negative; examples are taken a few at a time, since the page faults of large temporaries cost
more than the arithmetic; on a GPU nothing waits for the device.

Every sum is a 0-d float64 tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cabs_torch import tracing

# Elements of the temporaries that a chunk of examples may need: 8 MiB in float32, since a processor
# waits for the pages of larger ones. A GPU waits for kernels, of which each chunk is some: 256 MiB.
_CHUNK, _CHUNK_OF_DEVICE = 2**21, 2**26

# Elements of a temporary of which a processor's cache holds several, measured.
_CACHED = 2**17

# Squares summed in single precision before the sum goes on in double.
_BLOCK = 2048

_WIDE = (torch.float32, torch.float64)

# Elements up to which squares are summed in double precision at once.
_SMALL = 2**14


# Elements that are copied in about the time of the calls for one parameter, measured.
_COPIED = 2**16

# Elements that a GPU copies while a kernel is launched.
_LAUNCHED = 2**18


def parts(examples: int, needed: int, chunk: int | None, device: torch.device) -> Iterator[slice]:
    """Yield slices of examples, of ``chunk``, or of as many as ``needed`` elements each allow."""
    whole = examples if tracing.is_traced() else max(1, most(device) // max(needed, 1))
    size = chunk or whole
    for start in range(0, examples, size):
        yield slice(start, min(start + size, examples))


def rows(tensor: Tensor) -> Tensor:
    """Return what is indexed by rows: not sparse, and with an axis at least."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    return dense if dense.dim() else dense.reshape(1)


def blocks(rows: Tensor) -> Iterator[slice]:
    """Yield slices of rows, of which several temporaries fit into a processor's cache."""
    width = rows[:1].numel() if rows.device.type == "cpu" else 0
    size = max(1, _CACHED // width) if width else len(rows)
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


def square(tensor: Tensor) -> Tensor:
    """Return the sum of squares of all elements."""
    found = partial_norms(tensor)
    norm: Tensor = torch.linalg.vector_norm(joined(found), dtype=torch.float64)
    return norm.square()


def partial_norms(tensor: Tensor) -> list[Tensor]:
    """Return vectors that have together the same sum of squares, but few elements.

    A single sum of ten million float32 squares loses three digits, and is not faster than a sum in
    double precision of blocks that are summed in single. ``tensor`` can be sparse.
    """
    dense = tensor.coalesce().values() if tensor.is_sparse else tensor
    if is_small(dense):
        # Fewer calls matter more than what they do.
        return [torch.linalg.vector_norm(dense, dtype=torch.float64).reshape(1)]
    if not dense.is_contiguous():
        # In the order in which elements lie in memory, none has to be copied.
        dense = dense.permute(sorted(range(dense.dim()), key=dense.stride, reverse=True))
    flat = at_least_single(dense).flatten()
    whole = flat.numel() // _BLOCK * _BLOCK
    blocks = [torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1)]
    if whole < flat.numel():
        blocks.append(torch.linalg.vector_norm(flat[whole:]).reshape(1))
    return blocks


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return parts along their first axis; one alone as it is."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def added(squares: Sequence[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors; one alone as it is."""
    return squares[0] if len(squares) == 1 else torch.stack([*squares]).sum()


def is_small(tensor: Tensor) -> bool:
    """Return whether a tensor's squares cost a call, and nothing else worth speaking of."""
    return tensor.numel() <= _SMALL


def waiting(device: torch.device) -> int:
    """Return up to how many elements are copied to save a call."""
    if tracing.is_traced():
        return 0
    return _COPIED if tracing.may_look(device) else _LAUNCHED


def most(device: torch.device) -> int:
    """Return how many elements the temporaries of a chunk may have."""
    is_near = tracing.may_look(device) or tracing.is_traced()
    return _CHUNK if is_near else _CHUNK_OF_DEVICE


def with_squares(total: Tensor | None, rows: Tensor) -> Tensor:
    """Return a total, (1, ...), with the rows' elementwise squares added, in its memory."""
    if is_small(rows[:1]) or not tracing.may_look(rows.device):
        summed = rows.square().sum(dim=0, keepdim=True)
        return summed if total is None else total.add_(summed)
    # Without a temporary as large as the rows: four times as fast.
    for row in rows.split(1):
        total = row.square() if total is None else total.addcmul_(row, row)
    assert total is not None
    return total


def zero(device: torch.device) -> Tensor:
    """Return the sum over nothing."""
    return torch.zeros((), dtype=torch.float64, device=device)


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient that can be sparse as one that is not, in single precision or double."""
    return at_least_single(gradient.to_dense() if gradient.is_sparse else gradient)


def at_least_single(tensor: Tensor) -> Tensor:
    """Return the tensor in single precision, or in double if it is."""
    return tensor if tensor.dtype in _WIDE else tensor.to(single_or_double(tensor))


def single_or_double(tensor: Tensor) -> torch.dtype:
    """Return the precision in which sums over a tensor's elements are taken."""
    dtype = tensor.dtype
    return dtype if dtype in _WIDE else torch.promote_types(dtype, torch.float32)
