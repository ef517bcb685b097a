"""What runs inside the workers of a data loader: reading examples, and packing them.

Guarantees: an example that cannot be read spoils no other that was to travel with it; datasets are
asked as PyTorch's own workers would ask them.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.utils.data._utils.worker as torch_worker
from torch._utils import ExceptionWrapper
from torch.utils.data import Dataset, IterableDataset

from cabs_torch.data.randomness import reseed, seeds_of
from cabs_torch.data.transport import Packed, pack


class Chunk(NamedTuple):
    """Indices of examples that are read together, one behind the other in the order of an epoch."""

    epoch: int
    indices: npt.NDArray[np.int64]


class Read(NamedTuple):
    """What was read of a chunk."""

    examples: Packed
    failure: ExceptionWrapper | None
    """Why the example after these could not be read."""


def sent(examples: list[Any], failure: Exception | None) -> Read:
    """Return what was read, and why no more, as it can be sent to another process."""
    shared = torch_worker.get_worker_info() is not None
    try:
        packed = pack(examples, shared=shared)
    except Exception as error:
        # Some example cannot be pickled: send what comes before the first of them.
        error.add_note(
            "cabs: an example cannot be sent by a worker; make it of tensors, arrays, numbers and "
            "text, or use num_workers=0"
        )
        whole = 0
        while whole < len(examples) and _can_be_packed(examples[whole]):
            whole += 1
        packed, failure = pack(examples[:whole], shared=shared), error
    return Read(packed, None if failure is None else _wrapped(failure))


def _can_be_packed(example: Any) -> bool:
    try:
        pack([example])
    except Exception:
        return False
    return True


def _wrapped(error: Exception) -> ExceptionWrapper:
    trace = (type(error), error, error.__traceback__)
    wrapper = ExceptionWrapper(trace, where="in a worker of the data loader")
    try:
        pickle.dumps(wrapper)
    except Exception:
        # A type that only the worker knows.
        return ExceptionWrapper((RuntimeError, error, error.__traceback__), where=wrapper.where)
    return wrapper


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
            self._read(chunk, examples)
        except Exception as error:
            return sent(examples, error)
        return sent(examples, None)

    def read(self, chunk: Chunk) -> list[Any]:
        """Return the examples of a chunk."""
        examples: list[Any] = []
        self._read(chunk, examples)
        return examples

    def _read(self, chunk: Chunk, examples: list[Any]) -> None:
        """Add the examples of a chunk to a list, up to the first that cannot be read."""
        indices = chunk.indices.tolist()
        together = getattr(self.dataset, "__getitems__", None)
        if self.seed is None and together is not None:
            found = together(indices)
            if len(found) != len(indices):
                raise ValueError(
                    f"__getitems__ of {type(self.dataset).__name__} must return one example for "
                    f"each index, got {len(found)} for {len(indices)}"
                )
            examples.extend(found)
            return
        seeds = None if self.seed is None else seeds_of(self.seed, chunk.epoch, indices)
        for place, index in enumerate(indices):
            if seeds is not None:
                reseed(seeds[place])
            try:
                examples.append(self.dataset[index])
            except Exception as error:
                error.add_note(f"cabs: while reading example {index} of the dataset")
                raise


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
                    yield sent(examples, None)
                    examples = []
        except Exception as error:
            yield sent(examples, error)
            return
        if examples:
            yield sent(examples, None)


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
