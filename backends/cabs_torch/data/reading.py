"""How a loader gets at examples: in this process, by workers, or out of a stream.

Guarantees: an example with an index that cannot be read raises when its batch is asked for, and no
sooner; what the workers send is what was asked for, or an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.pin_memory import pin_memory as pinned

from cabs.data import DrawnBatch, Fetch
from cabs_torch.data import randomness
from cabs_torch.data.processes import begun, data_loader, ended
from cabs_torch.data.transport import unpack
from cabs_torch.data.workers import BlockReader, Chunk, ChunkReader, Read

# The fewest examples of a request that are worth its costs, about those of reading an image.
_SMALLEST = 8
# Of a stream, whose blocks cannot follow the batch size: their size is the order of its examples.
_BLOCK = 32


class Collate:
    """Puts examples together, with random numbers of the batch's own."""

    def __init__(self, collate_fn: Any, pin_memory: bool, seed: int | None, rank: int) -> None:
        self._rank = rank
        self._collate_fn = default_collate if collate_fn is None else collate_fn
        # What PyTorch's own does draws no random numbers.
        self._seed = None if collate_fn is None else seed
        self._is_pinned = pin_memory and torch.accelerator.is_available()

    def __call__(self, batch: DrawnBatch, examples: list[Any]) -> Any:
        """Return the batch of these examples."""
        if not examples and self._collate_fn is default_collate:
            raise ValueError(
                f"this rank has none of the last {batch.examples} examples of the epoch, which was "
                "begun by fewer ranks; end it with as many as before, or give a collate_fn that "
                "makes an empty batch"
            )
        if self._seed is None:
            together = self._collate_fn(examples)
        else:
            with randomness.set_aside():
                # Apart from the examples', whose indices are below, and from other ranks'.
                place = 2**63 + batch.start + self._rank
                randomness.reseed(randomness.seeds_of(self._seed, batch.epoch, [place])[0])
                together = self._collate_fn(examples)
        return pinned(together) if self._is_pinned else together


class Reading(Fetch[Any]):
    """Makes batches of what was drawn from a stream."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def fetch(self, batch: DrawnBatch) -> Any:
        """Return a batch of examples that are at hand."""
        return self._collate(batch, batch.drawn)


class ReadHere(Reading):
    """Reads in this process."""

    def __init__(self, reader: ChunkReader, collate: Collate) -> None:
        super().__init__(collate)
        self._reader = reader

    def fetch(self, batch: DrawnBatch) -> Any:
        """Return the batch of these indices."""
        chunk = Chunk(batch.epoch, batch.drawn)
        if self._reader.seed is None:
            return self._collate(batch, self._reader.read(chunk))
        with randomness.set_aside():
            examples = self._reader.read(chunk)
        return self._collate(batch, examples)


class ReadByWorkers(Reading):
    """Reads by workers, which run ahead along the order of the epoch."""

    def __init__(
        self, reader: ChunkReader, collate: Collate, world_size: int, options: dict[str, Any]
    ) -> None:
        super().__init__(collate)
        self._reader = reader
        self._options = options
        self._requests = _Requests(world_size * options["num_workers"])
        self._data_loader: Any = None
        # Of the dataset, of which each worker has a copy.
        self._length = 0
        self._arrivals: _Arrivals | None = None

    def begin(self, epoch: int, upcoming: Any, size: int) -> None:
        """Let the workers begin with what will be asked for."""
        length = len(self._reader.dataset)
        if not self._options["persistent_workers"] or length != self._length:
            self.close()
        self._length = length
        self._requests.begin(epoch, upcoming, size)
        if self._data_loader is None:
            options = {**self._options, "sampler": self._requests}
            self._data_loader = data_loader(self._reader, self._reader.seed, epoch, options)
        self._arrivals = _Arrivals(begun(self._data_loader), upcoming)

    def fetch(self, batch: DrawnBatch) -> Any:
        """Return the batch of these indices, which must be the next."""
        arrivals = self._arrivals
        assert arrivals is not None
        self._requests.size = batch.asked
        return self._collate(batch, arrivals.take(batch.drawn))

    def end(self) -> None:
        """Let the workers end, unless they are to live on."""
        if not self._options["persistent_workers"]:
            self.close()

    def close(self) -> None:
        """Let the workers end."""
        arrivals, self._arrivals, self._data_loader = self._arrivals, None, None
        if arrivals is not None:
            arrivals.close()


class _Requests:
    """Yields what the workers of an epoch are to read, in order, about two batches ahead.

    Holds nothing that holds the data loader, so that its workers end when nobody has it any more.
    """

    def __init__(self, shares: int) -> None:
        self._shares = shares
        self.size = 1

    def begin(self, epoch: int, upcoming: Any, size: int) -> None:
        """Go on with these indices, when a data loader next iterates."""
        self._epoch, self._upcoming, self.size = epoch, upcoming, size

    def __iter__(self) -> Iterator[Chunk]:
        epoch, upcoming, first = self._epoch, self._upcoming, 0
        while first < len(upcoming):
            # As much for each worker as all of them together need for a batch.
            length = max(_SMALLEST, -(-self.size // self._shares))
            yield Chunk(epoch, upcoming[first : first + length])
            first += length


class _Arrivals:
    """What the workers of an epoch have sent, to be taken in order."""

    def __init__(self, arriving: Iterator[Read], upcoming: Any) -> None:
        self._arriving = arriving
        self._upcoming = upcoming
        self._taken = 0
        self._examples: deque[Any] = deque()
        self._failure: Any = None

    def close(self) -> None:
        """Let the workers end."""
        ended(self._arriving)

    def take(self, indices: Any) -> list[Any]:
        """Return the next examples, which must be those of these indices."""
        end = self._taken + len(indices)
        if not np.array_equal(self._upcoming[self._taken : end], indices):
            raise RuntimeError(
                f"examples must be asked for in the order of the epoch, got {indices}; make a "
                "loader for each loop"
            )
        while len(self._examples) < len(indices):
            if self._failure is not None:
                self._failure.reraise()
            read = next(self._arriving, None)
            if read is None:
                raise RuntimeError(
                    f"the workers have sent {self._taken + len(self._examples)} examples in place "
                    f"of {len(self._upcoming)}; iterate over the loader again"
                )
            self._examples.extend(unpack(read.examples))
            self._failure = read.failure
        self._taken = end
        return [self._examples.popleft() for _ in range(len(indices))]


class Stream:
    """The blocks of an epoch of an ``IterableDataset``."""

    def __init__(self, dataset: Any, seed: int | None, options: dict[str, Any]) -> None:
        self._dataset = dataset
        self._seed = seed
        self._options = options
        workers = options["num_workers"]
        # Says at once what it does not take.
        data_loader(BlockReader(dataset, seed, 0, _BLOCK), seed, 0, options)
        # One worker reads in the order in which this process would.
        self.order = f"{workers} workers, {_BLOCK} at a time" if workers > 1 else ""

    def __call__(self, epoch: int) -> Iterator[list[Any]]:
        """Yield lists of examples, from the first on."""
        set_epoch = getattr(self._dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        if not self._options["num_workers"]:
            return self._here(epoch)
        return self._by_workers(epoch)

    def _by_workers(self, epoch: int) -> Iterator[list[Any]]:
        reader = BlockReader(self._dataset, self._seed, epoch, _BLOCK)
        return _blocks(begun(data_loader(reader, self._seed, epoch, self._options)))

    def _here(self, epoch: int) -> Iterator[list[Any]]:
        if self._seed is None:
            yield from ([example] for example in self._dataset)
            return
        (number,) = randomness.seeds_of(self._seed, epoch, [0])
        examples: Any = None
        states: Any = None
        failure: Exception | None = None
        while failure is None:
            block: list[Any] = []
            with randomness.set_aside():
                try:
                    if examples is None:
                        randomness.reseed(number)
                        examples = iter(self._dataset)
                    else:
                        randomness.put_back(states)
                    block.extend(islice(examples, _BLOCK))
                except Exception as error:
                    failure = error
                states = randomness.current()
            if block:
                yield block
            if failure is None and len(block) < _BLOCK:
                return
        raise failure


def _blocks(reads: Iterator[Read]) -> Iterator[list[Any]]:
    """Yield the examples that were read, and raise where one could not be."""
    try:
        for read in reads:
            yield unpack(read.examples)
            if read.failure is not None:
                read.failure.reraise()
    finally:
        ended(reads)
