"""Batches cut from a stream of examples, of which nobody knows how many there are.

Guarantees: in every epoch each example of the stream is in exactly one batch, in the order of the
stream, whatever the sizes do; no more is read ahead, unless it is asked for, than two examples
for each rank beyond the batch, by which it is seen whether too few would be left over.
Refuses streams that cannot be read again, since an epoch could then not be resumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Self

from cabs.data.epoch_sampler import EpochSampler, HasBatchSize
from cabs.values.scalars import as_integer


class StreamSampler(EpochSampler[Any]):
    """Cuts a stream into lists of examples, each as long as the controller then asks for.

    What :class:`cabs.BatchSampler` is for examples with an index, this is for those that only come
    one after the other. A restored sampler reads the stream from its start and passes over what was
    drawn before, so the stream of an epoch has to be the same again.

    Args:
        examples: What an epoch iterates over: an iterable that can be iterated over again, or a
            function that is given the number of the epoch and returns an iterable.
        batch_size: A :class:`cabs.Controller`, or a constant.
        ahead: How many examples a thread reads in advance, while the loop is busy; with 0 they are
            read when they are drawn.
        drop_last: Leave out the examples at the end of an epoch that fill no whole batch.
        rank: This process's rank. Each reads the whole stream and keeps its share.
        world_size: How many ranks draw from the same batches. All must ask for the same sizes.

    Raises:
        TypeError: If an argument is of the wrong kind, such as an iterator that would be empty the
            second time.
        ValueError: If one is out of its range; when an epoch is begun, if its stream is empty or
            shorter than what was drawn of it before.

    Example:
        >>> sampler = StreamSampler("abcdefgh", 3)
        >>> list(sampler)
        [['a', 'b', 'c'], ['d', 'e', 'f'], ['g', 'h']]
    """

    _NAME = "stream sampler"

    def __init__(
        self,
        examples: Iterable[Any] | Callable[[int], Iterable[Any]],
        batch_size: HasBatchSize | int,
        *,
        ahead: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, drop_last=drop_last, rank=rank, world_size=world_size)
        ahead = as_integer(ahead, "ahead", 0)
        opened = _opener(examples)

        def blocks(epoch: int) -> Iterator[Sequence[Any]]:
            if ahead:
                return _read_ahead(opened(epoch), ahead)
            return ([example] for example in opened(epoch))

        self._open: Callable[[int], Iterator[Sequence[Any]]] = blocks
        self._order = ""
        self._blocks: _Blocks | None = None

    @classmethod
    def of_blocks(
        cls,
        blocks: Iterable[Any] | Callable[[int], Iterable[Any]],
        batch_size: HasBatchSize | int,
        *,
        order: str = "",
        **options: Any,
    ) -> Self:
        """Return a sampler of a stream whose examples come in blocks, as they are read fastest.

        ``order`` says in words what decides the order of the stream, for example how many workers
        read it; a state is refused where it is another. Blocks are lists, or anything else that has
        a length, slices, and a sum that puts one behind the other. Batches are of the same kind.

        Example:
            >>> list(StreamSampler.of_blocks(["abcde", "fgh"], 4))
            ['abcd', 'efgh']
        """
        sampler = cls((), batch_size, **options)
        sampler._open = _opener(blocks)
        sampler._order = order
        return sampler

    def go_to(self, epoch: int, position: int) -> None:
        """Go on from a position of an epoch; the stream is read again if it lies elsewhere."""
        super().go_to(epoch, position)
        self.close()

    def close(self) -> None:
        """Leave the stream; the next batch reads it again."""
        if self._blocks is not None:
            self._blocks.close()
            self._blocks = None

    def _left(self, wanted: int) -> int:
        try:
            if self._blocks is None:
                self._blocks = self._reopened()
            left = self._blocks.fill(wanted + self._smallest(wanted))
            if left == self._position == 0:
                raise ValueError(
                    f"the stream of epoch {self._epoch} holds no example; give an iterable that "
                    "can be iterated over again, or a function of the epoch that returns one"
                )
        except BaseException:
            # A generator that has raised would seem to have come to its end.
            self.close()
            raise
        return left

    def _reopened(self) -> _Blocks:
        """Return the stream of the current epoch, at the current position."""
        blocks = _Blocks(self._open(self._epoch))
        passed = blocks.drop(self._position)
        if passed < self._position:
            raise ValueError(
                f"the stream of epoch {self._epoch} has ended after {passed} examples, of which "
                f"{self._position} were drawn before; it is not the same stream"
            )
        return blocks

    def _take(self, start: int, end: int) -> Any:
        assert self._blocks is not None
        whole = self._blocks.take(end - start)
        if self.world_size == 1:
            return whole
        return whole[(self.rank - start) % self.world_size :: self.world_size]

    def __repr__(self) -> str:
        return (
            f"StreamSampler(epoch={self.epoch}, position={self.position}, "
            f"rank={self.rank} of {self.world_size})"
        )

    def _identity(self) -> dict[str, Any]:
        return {"drop_last": self.drop_last, "order": self._order}


def _opener(examples: Any) -> Callable[[int], Iterator[Any]]:
    """Return a function of the epoch that returns an iterator over its stream."""
    if callable(examples):
        return lambda epoch: iter(examples(epoch))
    if not hasattr(examples, "__iter__"):
        raise TypeError(
            "examples must be an iterable, or a function of the epoch that returns one, got "
            f"{examples!r}"
        )
    if isinstance(examples, Iterator):
        raise TypeError(
            f"examples can be iterated over only once, got {examples!r}; give what it is made "
            "from, or a function of the epoch that makes it"
        )
    return lambda _: iter(examples)


def _read_ahead(examples: Iterator[Any], ahead: int) -> Iterator[list[Any]]:
    """Yield blocks of examples that a thread reads, so many examples in advance."""
    # Halves: one may be taken while the other is read.
    length = -(-ahead // 2)

    def read() -> list[Any]:
        return list(islice(examples, length))

    with ThreadPoolExecutor(1, thread_name_prefix="cabs-stream") as thread:
        coming = deque(thread.submit(read) for _ in range(-(-ahead // length)))
        try:
            while block := coming.popleft().result():
                coming.append(thread.submit(read))
                yield block
        finally:
            for future in coming:
                future.cancel()


class _Blocks:
    """The blocks of a stream that have been read and not been taken."""

    def __init__(self, blocks: Iterator[Sequence[Any]]) -> None:
        self._unread = blocks
        self._read: deque[Any] = deque()
        self._length = 0

    def fill(self, wanted: int) -> int:
        """Read until there are ``wanted`` examples; return how many there are."""
        while self._length < wanted:
            block = next(self._unread, None)
            if block is None:
                break
            if len(block):
                self._read.append(block)
                self._length += len(block)
        return self._length

    def take(self, length: int) -> Any:
        """Return the first ``length`` examples, at least 1, of those that were read."""
        taken, missing = [], length
        while missing:
            block = self._read.popleft()
            if len(block) > missing:
                self._read.appendleft(block[missing:])
                block = block[:missing]
            taken.append(block)
            missing -= len(block)
        self._length -= length
        return taken[0] if len(taken) == 1 else _joined(taken)

    def drop(self, length: int) -> int:
        """Pass over so many examples; return how many there were."""
        dropped = 0
        while dropped < length and self.fill(1):
            step = min(length - dropped, self._length)
            self.take(step)
            dropped += step
        return dropped

    def close(self) -> None:
        """Tell the stream, where it can be told, that nobody goes on reading."""
        close = getattr(self._unread, "close", None)
        if close is not None:
            close()


def _joined(blocks: list[Any]) -> Any:
    if isinstance(blocks[0], list):
        return [example for block in blocks for example in block]
    total = blocks[0]
    for block in blocks[1:]:
        total = total + block
    return total
