"""Batches of indices whose size is asked for when each batch is drawn.

Guarantees: in every epoch each example is drawn exactly once over all ranks, whatever the sizes
do; the order depends on the seed, the epoch and the number of examples alone, not on the machine,
the NumPy release, the sizes or the number of ranks; a sampler that goes on from a saved state
draws what the first one would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cabs.formats import check_mark
from cabs.scalars import as_bool, as_integer

_FORMAT = "cabs.batch_sampler"
_VERSION = 1


class HasBatchSize(Protocol):
    """Anything that says the size of the next batch, as a controller does."""

    @property
    def batch_size(self) -> int:
        """Size of the next batch, in examples."""
        ...


class BatchSampler:
    """Draws batches of example indices, each of the size that the controller then asks for.

    Iterating yields the rest of the current epoch: after a ``break``, or in a sampler that was
    restored in the middle of one, the next loop goes on where the last one stopped. With several
    ranks, each draws its share of every batch; the shares differ by at most one example, so weigh
    gradients by them. A short last batch can leave a rank without an example; ``drop_last`` avoids
    that. One example alone shows no variance, so none is left over for the last batch of an epoch:
    the batch before it gives one up, or takes it.

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
        self.examples = as_integer(examples, "examples", 1)
        self.shuffle = as_bool(shuffle, "shuffle")
        self.seed = as_integer(seed, "seed", 0)
        self.drop_last = as_bool(drop_last, "drop_last")
        self.world_size = as_integer(world_size, "world_size", 1)
        self.rank = as_integer(rank, "rank", 0)
        if self.rank >= self.world_size:
            raise ValueError(
                f"rank must be below world_size, got rank = {rank}, world_size = {world_size}"
            )
        if isinstance(batch_size, (int, np.integer)):
            self._source: HasBatchSize = _Constant(as_integer(batch_size, "batch_size", 1))
        elif hasattr(batch_size, "batch_size"):
            self._source = batch_size
        else:
            raise TypeError(
                f"batch_size must be a controller, or an integer, got batch_size = {batch_size!r}"
            )
        self._epoch = 0
        self._position = 0
        self._order: npt.NDArray[np.int64] | None = None

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 0; the next one once the loop over it has ended."""
        return self._epoch

    @property
    def position(self) -> int:
        """How many examples of the epoch have been drawn, by all ranks together."""
        return self._position

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the rest of the epoch, batch by batch: int64 indices of shape (share,)."""
        epoch = self._epoch
        while self._epoch == epoch:
            indices = self._draw()
            if indices is not None:
                yield indices

    def _draw(self) -> npt.NDArray[np.int64] | None:
        """Draw the next batch; at the end of the epoch go on to the next one and return None."""
        start, left = self._position, self.examples - self._position
        size = as_integer(self._source.batch_size, "batch_size", 1)
        if size < min(self.world_size, left):
            raise ValueError(
                f"a batch of {size} leaves some of {self.world_size} ranks without an example; "
                "raise the smallest size allowed"
            )
        if size > left and self.drop_last:
            if start == 0:
                raise ValueError(
                    f"a batch of {size} cannot be drawn from {self.examples} examples with "
                    "drop_last; lower the largest size or set drop_last=False"
                )
            left = 0
        if left == 0:
            self._epoch += 1
            self._position = 0
            self._order = None
            return None
        size = self._not_leaving_one(min(size, left), left)
        if self._order is None:
            self._order = self._order_of(self._epoch)
        first = start + size * self.rank // self.world_size
        last = start + size * (self.rank + 1) // self.world_size
        # Moved on before the batch is handed out: a state saved in the loop's body counts it.
        self._position = start + size
        return self._order[first:last]

    def _not_leaving_one(self, size: int, left: int) -> int:
        """Return a batch's size, changed by one if a single example would be the last batch."""
        if left - size != 1 or size == 1 or self.drop_last:
            return size
        return size - 1 if size - 1 >= max(2, self.world_size) else size + 1

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

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values; it counts the batches handed out.

        Example:
            >>> sampler = BatchSampler(10, 4)
            >>> first = next(iter(sampler))
            >>> resumed = BatchSampler(10, 4)
            >>> resumed.load_state_dict(sampler.state_dict())
            >>> rest = [index for batch in resumed for index in batch.tolist()]
            >>> sorted([*first.tolist(), *rest]) == list(range(10))
            True
        """
        return {
            "format": _FORMAT,
            "version": _VERSION,
            **self._identity(),
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a state that :meth:`state_dict` returned, on any rank of any world size.

        Raises:
            ValueError: If it is no such state, is of another version, or belongs to another
                sequence of batches; the message says how. Nothing has changed then.
        """
        check_mark(state_dict, "this", "state of a batch sampler", _FORMAT, _VERSION)
        if set(state_dict) != set(self.state_dict()):
            raise ValueError(f"this state is not whole: it holds {sorted(state_dict)}")
        different = [
            f"{name} = {state_dict[name]!r} there and {value!r} here"
            for name, value in self._identity().items()
            if type(state_dict[name]) is not type(value) or state_dict[name] != value
        ]
        if different:
            raise ValueError(f"this state belongs to other batches: {', '.join(different)}")
        epoch, position = state_dict["epoch"], state_dict["position"]
        if type(epoch) is not int or type(position) is not int or epoch < 0:
            raise ValueError(f"this state is damaged: epoch = {epoch!r}, position = {position!r}")
        if not 0 <= position <= self.examples:
            raise ValueError(
                f"this state is damaged: position = {position} of {self.examples} examples"
            )
        self._epoch, self._position, self._order = epoch, position, None

    def __repr__(self) -> str:
        return (
            f"BatchSampler(examples={self.examples}, epoch={self.epoch}, "
            f"position={self.position}, rank={self.rank} of {self.world_size})"
        )

    def _identity(self) -> dict[str, Any]:
        """Return what decides the order of the examples."""
        return {
            "examples": self.examples,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }


class _Constant:
    """A batch size that never changes."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
