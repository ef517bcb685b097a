"""Batches of indices whose size is asked for when each batch is drawn.

Guarantees: in every epoch each example is drawn exactly once over all ranks, whatever the sizes
do; where their number changes, an epoch has as many as there were when it began; the order depends
on the seed, the epoch and the number of examples alone, not on the machine, the NumPy release, the
sizes or the number of ranks; which rank has an example does not depend on the sizes either, so that
it can be fetched before they are known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cabs.data.epoch_sampler import EpochSampler, HasBatchSize
from cabs.values.scalars import as_bool, as_integer

# Of how many epochs the length is kept: as many as a loader keeps batches, whose states may be
# wanted.
_EPOCHS = 64


class BatchSampler(EpochSampler[npt.NDArray[np.int64]]):
    """Draws batches of example indices, each of the size that the controller then asks for.

    Iterating yields the rest of the current epoch: after a ``break``, or in a sampler that was
    restored in the middle of one, the next loop goes on where the last one stopped. With several
    ranks, each draws its share of every batch: of the epoch's order, every ``world_size``-th
    example. The shares differ by at most one example, so weigh gradients by them. One example alone
    shows no variance, so that less than two for each rank are not left over for the last batch of
    an epoch: the batch before it gives some up, or takes them.

    Args:
        examples: How many examples there are; or a function that says so, for a number that
            changes. It is called when an epoch begins, which then has as many, and with each batch.
            Examples that come meanwhile are drawn from the next epoch on, which is warned of once.
        batch_size: A :class:`cabs.Controller`, or a constant.
        shuffle: Whether every epoch has a random order of its own.
        seed: Seed of these orders, at least 0.
        drop_last: Leave out the examples at the end of an epoch that fill no whole batch.
        rank: This process's rank.
        world_size: How many ranks draw from the same batches. All must ask for the same sizes.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of its range; when a batch is drawn, if there are fewer examples
            than when the epoch began.

    Example:
        >>> sampler = BatchSampler(10, 4, shuffle=False)
        >>> [indices.tolist() for indices in sampler]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        >>> sampler.epoch
        1

        Examples that are collected while training goes on:

        >>> replay = ["a", "b", "c", "d"]
        >>> sampler = BatchSampler(lambda: len(replay), 2, shuffle=False)
        >>> [indices.tolist() for indices in sampler]
        [[0, 1], [2, 3]]
        >>> replay += ["e", "f"]
        >>> [indices.tolist() for indices in sampler]
        [[0, 1], [2, 3], [4, 5]]
    """

    _NAME = "batch sampler"

    def __init__(
        self,
        examples: int | Callable[[], int],
        batch_size: HasBatchSize | int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, drop_last=drop_last, rank=rank, world_size=world_size)
        self._count = examples if callable(examples) else None
        self._now = self._counted() if callable(examples) else as_integer(examples, "examples", 1)
        # Of the running epoch and of those before it, where the number changes.
        self._lengths: dict[int, int] = {}
        self.shuffle = as_bool(shuffle, "shuffle")
        self.seed = as_integer(seed, "seed", 0)
        self._has_warned = False
        # The order of an epoch, and which one that is.
        self._order: tuple[int, int, npt.NDArray[np.int64]] | None = None

    @property
    def examples(self) -> int:
        """How many examples the current epoch has, over all ranks."""
        return self._length_of(self._epoch)

    def begin(self) -> bool:
        """Have the epoch, if nothing of it was drawn, as long as it is now.

        Return whether it was known with another length.
        """
        before = self._lengths.get(self._epoch)
        if self._count is None or (self._position > 0 and before is not None):
            return False
        now = self._now = self._counted()
        lengths = {self._epoch - 1: now, **self._lengths, self._epoch: now}
        first = self._epoch - _EPOCHS
        self._lengths = {epoch: length for epoch, length in lengths.items() if epoch >= first}
        return before not in (None, now)

    def _counted(self) -> int:
        """Return how many examples there are at this moment."""
        assert self._count is not None
        return as_integer(self._count(), "examples", 1)

    def _length_of(self, epoch: int) -> int:
        return self._lengths.get(epoch, self._now)

    def draw(self, size: int) -> npt.NDArray[np.int64] | None:
        """Draw the next batch of the epoch, of a size that was asked for; None at its end.

        Raises:
            ValueError: If the size leaves a rank without an example, or is larger than the whole
                epoch with ``drop_last``; if there are fewer examples than when the epoch began.
        """
        if self._count is not None:
            self._check_count()
        return super().draw(size)

    def _check_count(self) -> None:
        """Raise ValueError if examples of the epoch are gone; warn if there are others."""
        if self._epoch not in self._lengths:
            self.begin()
        now, length = self._counted(), self.examples
        if now < length:
            raise ValueError(
                f"epoch {self._epoch} began with {length} examples, of which {self._position} were "
                f"drawn, and there are {now} now; let examples go between epochs, or make a new "
                "sampler or loader"
            )
        if now > length and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"there are {now} examples now, and epoch {self._epoch} began with {length}: it "
                "ends with these, and the others come from the next one on",
                RuntimeWarning,
                stacklevel=2,
            )

    def upcoming(self) -> npt.NDArray[np.int64]:
        """Return what this rank will draw in the rest of the epoch, in order: int64 indices.

        Example:
            >>> sampler = BatchSampler(10, 4, shuffle=False, rank=1, world_size=2)
            >>> sampler.upcoming().tolist()
            [1, 3, 5, 7, 9]
        """
        if self._count is not None and self._epoch not in self._lengths:
            self.begin()
        return self._of_this_rank(self._position, self.examples)

    def _left(self, wanted: int) -> int:  # noqa: ARG002
        return self.examples - self._position

    def _take(self, start: int, end: int) -> npt.NDArray[np.int64]:
        return self._of_this_rank(start, end)

    def _of_this_rank(self, start: int, end: int) -> npt.NDArray[np.int64]:
        of = self._epoch, self._length_of(self._epoch)
        if self._order is None or self._order[:2] != of:
            self._order = *of, self._order_of(*of)
        # A copy: what is handed out is the caller's own.
        if self.world_size == 1:
            return self._order[2][start:end].copy()
        first = start + (self.rank - start) % self.world_size
        return self._order[2][first : end : self.world_size].copy()

    def _order_of(self, epoch: int, examples: int) -> npt.NDArray[np.int64]:
        """Return the order of an epoch, shape (examples,)."""
        if not self.shuffle:
            return np.arange(examples, dtype=np.int64)
        # NumPy keeps the raw stream of a bit generator for ever, but not that of permutation()
        # (NEP 19). So: sort random keys, each with its index in the low bits, which makes them
        # distinct and the result independent of the sorting algorithm.
        width = np.uint64(examples.bit_length())
        seed = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        keys = np.asarray(np.random.PCG64(seed).random_raw(examples), dtype=np.uint64)
        keys >>= width
        keys <<= width
        keys |= np.arange(examples, dtype=np.uint64)
        keys.sort()
        keys &= (np.uint64(1) << width) - np.uint64(1)
        return keys.view(np.int64)

    def __repr__(self) -> str:
        return (
            f"BatchSampler(examples={self.examples}, epoch={self.epoch}, "
            f"position={self.position}, rank={self.rank} of {self.world_size})"
        )

    def bookmark(self) -> Any:
        """Return what :meth:`go_back` needs to undo the loading of a state."""
        return super().bookmark(), self._lengths

    def go_back(self, bookmark: Any) -> None:
        """Be where :meth:`bookmark` was called."""
        at, self._lengths = bookmark
        super().go_back(at)

    def state_at(self, epoch: int, position: int) -> dict[str, Any]:
        """Return the state of a sampler that has come to this position, as plain values."""
        return {**super().state_at(epoch, position), "examples": self._length_of(epoch)}

    def _identity_for(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        identity = self._identity()
        if self._count is None:
            return identity
        there = state_dict["examples"]
        # Of an epoch that has begun, others than these would be drawn.
        is_between = state_dict["position"] == 0 or state_dict["position"] == there
        is_number = type(there) is int and there >= 1
        return {**identity, "examples": there if is_between and is_number else self._counted()}

    def _restore(self, epoch: int, position: int, examples: int) -> None:
        if self._count is not None:
            if position == examples != self._counted():
                epoch, position = epoch + 1, 0
            else:
                self._lengths = {epoch: examples}
        self.go_to(epoch, position)

    def _identity(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }
