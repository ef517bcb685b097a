"""What runs inside the workers of a data loader: reading examples, and packing them.

Guarantees: an example that cannot be read spoils no other that was to travel with it; datasets are
asked as PyTorch's own workers would ask them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.utils.data._utils.worker as torch_worker
from torch._utils import ExceptionWrapper
from torch.utils.data import Dataset, IterableDataset

from cabs_torch.packing import Packed, pack
from cabs_torch.randomness import reseed, seeds_of


class Chunk(NamedTuple):
    """Indices of examples that are read together, one behind the other in the order of an epoch."""

    epoch: int
    indices: npt.NDArray[np.int64]


class Read(NamedTuple):
    """What was read of a chunk."""

    examples: Packed
    failure: ExceptionWrapper | None
    """Why the example after these could not be read."""


def _packed(examples: list[Any]) -> Packed:
    return pack(examples, shared=torch_worker.get_worker_info() is not None)


class ChunkReader(Dataset[Read]):
    """A dataset of chunks, over one that has an index.

    ``seed`` is that of the examples' random numbers; with None they are left alone.
    """

    def __init__(self, dataset: Any, seed: int | None) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, chunk: Chunk) -> Read:
        """Return the examples of a chunk, up to the first that cannot be read."""
        examples: list[Any] = []
        try:
            examples.extend(self.read(chunk))
        except Exception as error:
            failed = int(chunk.indices[len(examples)])
            error.add_note(f"cabs: while reading example {failed} of the dataset")
            return Read(_packed(examples), ExceptionWrapper(where="in a worker of the data loader"))
        return Read(_packed(examples), None)

    def read(self, chunk: Chunk) -> Iterator[Any]:
        """Yield the examples of a chunk."""
        indices = chunk.indices.tolist()
        if self.seed is None:
            together = getattr(self.dataset, "__getitems__", None)
            yield from together(indices) if together else map(self.dataset.__getitem__, indices)
        else:
            seeds = seeds_of(self.seed, chunk.epoch, indices)
            for index, seed in zip(indices, seeds, strict=True):
                reseed(seed)
                yield self.dataset[index]


class BlockReader(IterableDataset[Read]):
    """A stream of blocks of so many examples, over a stream of examples."""

    def __init__(self, dataset: Any, seed: int | None, epoch: int, length: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = epoch
        self.length = length

    def __iter__(self) -> Iterator[Read]:
        """Yield the stream's examples, in blocks; it ends where one cannot be read."""
        info = torch_worker.get_worker_info()
        if self.seed is not None:
            (seed,) = seeds_of(self.seed, self.epoch, [0 if info is None else info.id])
            reseed(seed)
        examples: list[Any] = []
        try:
            for example in self.dataset:
                examples.append(example)
                if len(examples) == self.length:
                    yield Read(_packed(examples), None)
                    examples = []
        except Exception:
            failure = ExceptionWrapper(where="in a worker of the data loader")
            yield Read(_packed(examples), failure)
            return
        if examples:
            yield Read(_packed(examples), None)


class Initialize:
    """Begins a worker: the dataset that it tells of is the user's own."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self._worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        """Run in each worker before anything is read."""
        info = torch_worker._worker_info
        assert info is not None
        # It would tell of the reader that was put around the dataset.
        reader: Any = info.dataset
        torch_worker._worker_info = dataclasses.replace(info, dataset=reader.dataset)
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)
