"""Sums over ranks: how they begin, and what it means if they do not arrive.

Guarantees: a program may end as soon as it has its sum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# What the last sums were waited for by. Without it the thread of gloo that did the work can be the
# last to let go of the tensor, for which it needs Python: if that has ended meanwhile, the process
# is aborted, and hangs if it takes its process group apart.
_kept: deque[Any] = deque(maxlen=16)


def begin_sum(tensor: Tensor, group: Any) -> Any:
    """Begin to add up a tensor over ranks, in place, and return what waits for it."""
    work = torch.distributed.all_reduce(tensor, group=group, async_op=True)
    _kept.append(work)
    return work


@contextmanager
def arriving(ranks: int) -> Iterator[None]:
    """Say, where a sum over ranks fails, what that means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"the sums over {ranks} ranks have not arrived: a rank has ended, is later than the "
            "timeout of the process group allows, or does something else; start all ranks again "
            "from a checkpoint"
        ) from error
