"""What a loader tells of a batch, and what makes batches for it.

Guarantees: whoever makes batches is told of every batch that was drawn, in order, and of all that
is to come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy.typing as npt

Batch = TypeVar("Batch", covariant=True)


class DrawnBatch(NamedTuple):
    """What a loader tells of a batch that it handed out.

    Example:
        >>> import cabs, numpy as np
        >>> loader = cabs.data.Loader(np.arange(10.0).take, cabs.BatchSampler(10, 4, shuffle=False))
        >>> for batch in loader:
        ...     print(loader.batch.start, loader.batch.examples, loader.batch.lag)
        0 4 0
        4 4 0
        8 2 0
    """

    epoch: int
    """Counted from 0."""
    start: int
    """Position in the epoch of its first example, over all ranks."""
    examples: int
    """How many examples it has, over all ranks."""
    asked: int
    """The size that was asked for; it differs at the end of an epoch."""
    lag: int
    """How many batches were handed out after the size was asked for, and before this one."""
    drawn: Any
    """What the sampler drew: this rank's indices, or its examples of a stream."""


@runtime_checkable
class Fetch(Protocol[Batch]):
    """What makes batches for a loader, where a function would not do.

    It is told what will be asked for, and is asked for all of it, in order. Derived from, it does
    nothing but what is written anew.

    Example:
        >>> import cabs
        >>> class Squares(Fetch[list[int]]):
        ...     def begin(self, epoch, upcoming, size):
        ...         self.squares = iter([index**2 for index in upcoming.tolist()])
        ...     def fetch(self, batch):
        ...         return [next(self.squares) for _ in batch.drawn]
        >>> list(cabs.data.Loader(Squares(), cabs.BatchSampler(6, 4, shuffle=False)))
        [[0, 1, 4, 9], [16, 25]]
    """

    def begin(
        self,
        epoch: int,  # noqa: ARG002
        upcoming: npt.NDArray[Any] | None,  # noqa: ARG002
        size: int,  # noqa: ARG002
    ) -> None:
        """Prepare for these indices, in this order; None for what a stream holds.

        ``size`` is what the first batch was asked to have, over all ranks. Whatever was prepared
        before is not asked for any more.
        """
        return

    def fetch(self, batch: DrawnBatch) -> Batch:
        """Return a batch that was drawn; in a thread, if the loader has a lag."""
        ...

    def end(self) -> None:
        """Let go of what the next epoch does not need."""
        return

    def close(self) -> None:
        """Let go of everything, since something failed, or nobody goes on."""
        return


class Function(Fetch[Batch]):
    """A plain function that makes batches, which needs no preparation."""

    def __init__(self, function: Callable[[Any], Batch]) -> None:
        self._function = function

    def fetch(self, batch: DrawnBatch) -> Batch:
        """Return what the function makes of what was drawn."""
        return self._function(batch.drawn)
