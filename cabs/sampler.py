"""Batches of indices whose size is asked for when each batch is drawn.

Guarantees: in every epoch each example is drawn exactly once over all ranks, whatever the sizes
do; the order depends on the seed, the epoch and the number of examples alone, not on the machine,
the NumPy release, the sizes or the number of ranks; which rank has an example does not depend on
the sizes either, so that it can be fetched before they are known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cabs.epochs import EpochSampler, HasBatchSize
from cabs.scalars import as_bool, as_integer


class BatchSampler(EpochSampler[npt.NDArray[np.int64]]):
    """Draws batches of example indices, each of the size that the controller then asks for.

    Iterating yields the rest of the current epoch: after a ``break``, or in a sampler that was
    restored in the middle of one, the next loop goes on where the last one stopped. With several
    ranks, each draws its share of every batch: of the epoch's order, every ``world_size``-th
    example. The shares differ by at most one example, so weigh gradients by them. One example alone
    shows no variance, so that less than two for each rank are not left over for the last batch of
    an epoch: the batch before it gives some up, or takes them.

    Args:
        examples: How many examples there are.
        batch_size: A :class:`cabs.Controller`, or a constant.
        shuffle: Whether every epoch has a random order of its own.
        seed: Seed of these orders, at least 0.
        drop_last: Leave out the examples at the end of an epoch that fill no whole batch.
        rank: This process's rank.
        world_size: How many ranks draw from the same batches. All must ask for the same sizes.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of its range.

    Example:
        >>> sampler = BatchSampler(10, 4, shuffle=False)
        >>> [indices.tolist() for indices in sampler]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        >>> sampler.epoch
        1
    """

    _NAME = "batch sampler"

    def __init__(
        self,
        examples: int,
        batch_size: HasBatchSize | int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, drop_last=drop_last, rank=rank, world_size=world_size)
        self.examples = as_integer(examples, "examples", 1)
        self.shuffle = as_bool(shuffle, "shuffle")
        self.seed = as_integer(seed, "seed", 0)
        # The order of an epoch, and which one that is.
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def upcoming(self) -> npt.NDArray[np.int64]:
        """Return what this rank will draw in the rest of the epoch, in order: int64 indices.

        Example:
            >>> sampler = BatchSampler(10, 4, shuffle=False, rank=1, world_size=2)
            >>> sampler.upcoming().tolist()
            [1, 3, 5, 7, 9]
        """
        return self._of_this_rank(self._position, self.examples)

    def _left(self, wanted: int) -> int:  # noqa: ARG002
        return self.examples - self._position

    def _take(self, start: int, end: int) -> npt.NDArray[np.int64]:
        return self._of_this_rank(start, end)

    def _of_this_rank(self, start: int, end: int) -> npt.NDArray[np.int64]:
        if self._order is None or self._order[0] != self._epoch:
            self._order = self._epoch, self._order_of(self._epoch)
        # A copy: what is handed out is the caller's own.
        if self.world_size == 1:
            return self._order[1][start:end].copy()
        first = start + (self.rank - start) % self.world_size
        return self._order[1][first : end : self.world_size].copy()

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the order of an epoch, shape (examples,)."""
        if not self.shuffle:
            return np.arange(self.examples, dtype=np.int64)
        # NumPy keeps the raw stream of a bit generator for ever, but not that of permutation()
        # (NEP 19). So: sort random keys, each with its index in the low bits, which makes them
        # distinct and the result independent of the sorting algorithm.
        width = np.uint64(self.examples.bit_length())
        seed = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        keys = np.asarray(np.random.PCG64(seed).random_raw(self.examples), dtype=np.uint64)
        keys >>= width
        keys <<= width
        keys |= np.arange(self.examples, dtype=np.uint64)
        keys.sort()
        keys &= (np.uint64(1) << width) - np.uint64(1)
        return keys.view(np.int64)

    def __repr__(self) -> str:
        return (
            f"BatchSampler(examples={self.examples}, epoch={self.epoch}, "
            f"position={self.position}, rank={self.rank} of {self.world_size})"
        )

    def _identity(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }
