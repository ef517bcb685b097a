"""The parts of examples, taken out of tensors that hold a batch.

Guarantees: a view where there can be one; no tensor's values are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cabs.gradients.layout import Layout


def take(layout: Layout, tensor: Tensor, examples: int) -> Tensor:
    """Return the first examples' parts of a tensor, shape (examples, *layout.one)."""
    axis, inside = layout.axis()
    if axis == 0 and inside == 1:
        rows = tensor.reshape(layout.examples, -1, *tensor.shape[1:])
        return rows if examples == layout.examples else rows[:examples]
    split = (*layout.shape[:axis], inside, layout.examples, -1, *layout.shape[axis + 1 :])
    taken = tensor.reshape(split).movedim(axis + 1, 0)[:examples]
    return taken.flatten(axis + 1, axis + 2)


def only(layout: Layout, tensor: Tensor, members: Sequence[int]) -> Tensor:
    """Return the tensor with the elements of all other examples replaced by zeros."""
    is_kept = torch.zeros(layout.examples, 1, dtype=torch.bool, device=tensor.device)
    is_kept[members] = True
    blocks = tensor.reshape(layout.outer, layout.examples, -1)
    return torch.where(is_kept, blocks, 0.0).reshape(layout.shape)
