"""How a loader gets at examples: in this process, by workers, or out of a stream.

Guarantees: an example that cannot be read raises when its batch is asked for, and no sooner; what
the workers send is what was asked for, or an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.pin_memory import pin_memory as pinned

from cabs import BatchSampler, DrawnBatch
from cabs_torch import randomness
from cabs_torch.packing import unpack
from cabs_torch.workers import BlockReader, Chunk, ChunkReader, Read

# How many requests each worker has to hand, so that it need not wait for the next.
_REQUESTS = 2
# The fewest examples of a request that are worth its costs, about those of reading an image.
_SMALLEST = 8
# Of a stream, whose blocks cannot follow the batch size: their size is the order of its examples.
_BLOCK = 32


def _as_it_is(read: Any) -> Any:
    return read


def _data_loader(reader: Any, seed: int | None, epoch: int, options: dict[str, Any]) -> Any:
    # Its own generator: the data loader would draw from training's.
    generator = torch.Generator()
    generator.manual_seed(randomness.seeds_of(seed or 0, epoch, [2**64 - 1])[0])
    return DataLoader(
        reader,
        generator=generator,
        batch_size=None,
        collate_fn=_as_it_is,
        prefetch_factor=_REQUESTS,
        **options,
    )


class Collate:
    """Puts examples together, with random numbers of the batch's own."""

    def __init__(self, collate_fn: Any, pin_memory: bool, seed: int | None) -> None:
        self._collate_fn = default_collate if collate_fn is None else collate_fn
        # What PyTorch's own does draws no random numbers.
        self._seed = None if collate_fn is None else seed
        self._is_pinned = pin_memory and torch.accelerator.is_available()

    def begin(self, epoch: int, upcoming: Any) -> None:
        """Prepare nothing."""

    def fetch(self, batch: DrawnBatch) -> Any:
        """Return a batch of a stream."""
        return self(batch, batch.drawn)

    def close(self) -> None:
        """Leave nothing."""

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
                # Apart from the examples', whose indices are below.
                place = 2**63 + batch.start
                randomness.reseed(randomness.seeds_of(self._seed, batch.epoch, [place])[0])
                together = self._collate_fn(examples)
        return pinned(together) if self._is_pinned else together


class ReadHere:
    """Reads in this process."""

    def __init__(self, reader: ChunkReader, collate: Collate) -> None:
        self._reader = reader
        self._collate = collate

    def begin(self, epoch: int, upcoming: Any) -> None:
        """Prepare nothing."""

    def fetch(self, batch: DrawnBatch) -> Any:
        """Return the batch of these indices."""
        chunk = Chunk(batch.epoch, batch.drawn)
        if self._reader.seed is None:
            return self._collate(batch, list(self._reader.read(chunk)))
        with randomness.set_aside():
            examples = list(self._reader.read(chunk))
        return self._collate(batch, examples)

    def close(self) -> None:
        """Leave nothing."""


class ReadByWorkers:
    """Reads by workers, which run ahead along the order of the epoch."""

    def __init__(
        self,
        reader: ChunkReader,
        sampler: BatchSampler,
        collate: Collate,
        options: dict[str, Any],
    ) -> None:
        self._reader = reader
        self._sampler = sampler
        self._collate = collate
        self._options = options
        self._data_loader: Any = None
        self._arriving: Any = None
        self._examples: deque[Any] = deque()
        self._failure: Any = None

    def begin(self, epoch: int, upcoming: Any) -> None:
        """Let the workers begin with what will be asked for."""
        self._epoch, self._upcoming = epoch, upcoming
        self._requested, self._taken = 0, 0
        self._examples.clear()
        self._failure = None
        # Before the next one starts, the last iterator's workers have to end.
        self._arriving = None
        if self._data_loader is None or not self._options["persistent_workers"]:
            options = {**self._options, "sampler": _Requests(self._requests)}
            self._data_loader = _data_loader(self._reader, self._reader.seed, epoch, options)
        self._arriving = iter(self._data_loader)

    def _requests(self) -> Iterator[Chunk]:
        """Yield what the workers are to read, in order, about two batches ahead."""
        while self._requested < len(self._upcoming):
            share = -(-self._sampler.batch_size // self._sampler.world_size)
            length = max(_SMALLEST, -(-share // self._options["num_workers"]))
            first = self._requested
            self._requested = min(first + length, len(self._upcoming))
            yield Chunk(self._epoch, self._upcoming[first : self._requested])

    def fetch(self, batch: DrawnBatch) -> Any:
        """Return the batch of these indices, which must be the next."""
        end = self._taken + len(batch.drawn)
        if not np.array_equal(self._upcoming[self._taken : end], batch.drawn):
            raise RuntimeError(
                f"batches must be asked for in the order of the epoch, got {batch}; make a loader "
                "for each loop"
            )
        while len(self._examples) < len(batch.drawn):
            if self._failure is not None:
                self._failure.reraise()
            read: Read = next(self._arriving)
            self._examples.extend(unpack(read.examples))
            self._failure = read.failure
        self._taken = end
        return self._collate(batch, [self._examples.popleft() for _ in range(len(batch.drawn))])

    def close(self) -> None:
        """Let the workers end."""
        self._arriving = self._data_loader = self._failure = None
        self._examples.clear()


class _Requests:
    """An iterable over what a function yields, as a data loader takes it for a sampler."""

    def __init__(self, function: Callable[[], Iterator[Chunk]]) -> None:
        self._function = function

    def __iter__(self) -> Iterator[Chunk]:
        return self._function()


class Stream:
    """The blocks of an epoch of an ``IterableDataset``."""

    def __init__(self, dataset: Any, seed: int | None, options: dict[str, Any]) -> None:
        self._dataset = dataset
        self._seed = seed
        self._options = options
        workers = options["num_workers"]
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
        for read in _data_loader(reader, self._seed, epoch, self._options):
            yield unpack(read.examples)
            if read.failure is not None:
                read.failure.reraise()

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
