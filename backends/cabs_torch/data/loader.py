"""Batches from a dataset, read by workers, of the size that the controller asks for.

Guarantees: workers read examples ahead, not batches: the order of an epoch is known before the
sizes are, so the size of a batch is asked for when it is handed out, however far the workers have
come. What an example is does not depend on the number of workers, on the sizes, or on where a run
was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import IterableDataset

from cabs import BatchSampler, StreamSampler
from cabs.data import Loader
from cabs.data.epoch_sampler import HasBatchSize
from cabs.values.scalars import as_bool, as_integer
from cabs_torch.data.processes import data_loader
from cabs_torch.data.reading import Collate, ReadByWorkers, ReadHere, Reading, Stream
from cabs_torch.data.workers import ChunkReader, Initialize


def loader(
    dataset: Any,
    controller: HasBatchSize | int,
    *,
    lag: int = 0,
    shuffle: bool | None = None,
    seed: int = 0,
    drop_last: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    reseed: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool = False,
    timeout: float = 0,
    worker_init_fn: Callable[[int], None] | None = None,
    multiprocessing_context: Any = None,
    persistent_workers: bool = False,
    one_ahead: bool | None = None,
) -> Loader[Any]:
    """Return a loader over a dataset whose batch sizes follow the controller.

    The workers of a :class:`torch.utils.data.DataLoader` read examples ahead, about two batches of
    the current size. A batch is put together when the loop asks for it, of as many examples as the
    controller then says: the lag is 0. ``lag=1`` puts the next batch together, and pins it, in a
    thread while a step runs.

    In DDP each rank draws its share of every batch, by default by its rank in
    :mod:`torch.distributed`. The shares differ by at most one example, so weigh their gradients by
    them, and let all controllers decide upon the same numbers.

    Args:
        dataset: A map-style dataset, or an ``IterableDataset``. The former may grow or shrink
            between epochs, each of which has as many examples as there are when it begins; with
            several ranks, alike on all of them. The latter is read from its start
            by each worker, and sharded by itself, as PyTorch asks for; its order then depends on
            the number of workers.
        controller: A :class:`cabs.Controller`, or a constant.
        lag: How many batches to put together in advance, each of which is sized that many steps
            earlier.
        shuffle: Whether every epoch has a random order of its own; True if left out. A stream has
            an order of its own, and its ``set_epoch`` is called with each epoch's number if it has
            one.
        seed: Seed of the orders, and of the examples' random numbers, at least 0.
        drop_last: Leave out the examples at the end of an epoch that fill no whole batch.
        rank: This process's rank; that of ``torch.distributed``, where it is initialized, if left
            out. An ``IterableDataset`` must then be the same on all ranks, and be said to be by
            giving both numbers.
        world_size: How many ranks there are; as for ``rank``.
        reseed: Whether to seed the global generators of Python, NumPy and PyTorch by seed, epoch
            and index before each example is read (by the epoch, in a stream), so that random
            augmentations can be repeated. Costs some microseconds an example. Without it, a
            dataset's ``__getitems__`` is used.
        num_workers: How many processes read; with 0, this one does.
        collate_fn: Puts a list of examples together, in this process; PyTorch's ``default_collate``
            if left out. With a lag it should draw no random numbers, which would be training's.
            Tensors and arrays that a worker has read are contiguous and lie in memory with those of
            other examples: clone what is kept.
        pin_memory: Whether to copy batches into pinned memory.
        timeout: How many seconds to wait for a worker before it is an error; 0 for ever.
        worker_init_fn: Called with a worker's number when it begins.
        multiprocessing_context: How workers are started.
        persistent_workers: Whether workers live on from one epoch to the next, while the dataset
            is as long as it was.
        one_ahead: Whether who iterates takes each batch while the one before it is still to be
            trained on; found out in the hosts that are known to if left out, see
            :class:`cabs.data.Loader`.

    Returns:
        A :class:`cabs.data.Loader`. Its ``state_dict`` holds the controller's state too.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of its range or does not fit the dataset; when a batch is drawn,
            if the dataset has become shorter since the epoch began.

    Example:
        >>> import cabs, cabs_torch, torch
        >>> from torch.utils.data import TensorDataset
        >>> dataset = TensorDataset(torch.arange(10.0), torch.arange(10))
        >>> controller = cabs.Controller(2, sizes=cabs.BatchSizes.range(2, 8))
        >>> batches = cabs_torch.loader(dataset, controller, shuffle=False)
        >>> for inputs, labels in batches:
        ...     print(labels)
        ...     _ = controller.update(learning_rate=0.1, variance_trace=50.0, loss=1.0)
        tensor([0, 1])
        tensor([2, 3, 4, 5, 6])
        tensor([7, 8, 9])
    """
    reseed, pin_memory = as_bool(reseed, "reseed"), as_bool(pin_memory, "pin_memory")
    seed, num_workers = as_integer(seed, "seed", 0), as_integer(num_workers, "num_workers", 0)
    if reseed and lag and not num_workers:
        raise ValueError(
            "with a lag and no workers a thread reads the dataset, whose random numbers would be "
            "training's; use num_workers=1 or more, or reseed=False for a dataset that draws none"
        )
    for name, function in (("collate_fn", collate_fn), ("worker_init_fn", worker_init_fn)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {name} = {function!r}")
    is_stream = isinstance(dataset, IterableDataset)
    rank, world_size = _place_among_ranks(rank, world_size, is_stream=is_stream)
    options = {
        "num_workers": num_workers,
        "timeout": timeout,
        "multiprocessing_context": multiprocessing_context,
        "persistent_workers": persistent_workers,
        "worker_init_fn": Initialize(worker_init_fn) if num_workers else None,
    }
    shares: dict[str, Any] = {"drop_last": drop_last, "rank": rank, "world_size": world_size}
    examples_seed = seed if reseed else None
    collate = Collate(collate_fn, pin_memory, None if lag else examples_seed, rank)
    if is_stream:
        if shuffle:
            raise ValueError(
                "shuffle=True is for datasets with an index, got an IterableDataset, which has an "
                "order of its own; shuffle in its __iter__"
            )
        if persistent_workers:
            raise ValueError(
                "persistent_workers=True is for datasets with an index; the workers of an "
                "IterableDataset have to learn of the epoch when they start"
            )
        stream = Stream(dataset, examples_seed, options)
        cut = StreamSampler.of_blocks(stream, controller, order=stream.order, **shares)
        return Loader(Reading(collate), cut, lag=lag, one_ahead=one_ahead)
    if not len(dataset):
        raise ValueError("dataset must hold at least one example, got an empty one")
    sampler = BatchSampler(
        lambda: len(dataset),
        controller,
        shuffle=True if shuffle is None else shuffle,
        seed=seed,
        **shares,
    )
    reader = ChunkReader(dataset, examples_seed)
    # Says at once what it does not take.
    data_loader(reader, examples_seed, 0, {**options, "sampler": ()})
    fetch: ReadByWorkers | ReadHere
    if num_workers:
        fetch = ReadByWorkers(reader, collate, world_size, options)
    else:
        fetch = ReadHere(reader, collate)
    return Loader(fetch, sampler, lag=lag, one_ahead=one_ahead)


def _place_among_ranks(
    rank: int | None, world_size: int | None, *, is_stream: bool
) -> tuple[int, int]:
    distributed = torch.distributed
    is_up = distributed.is_available() and distributed.is_initialized()
    if is_stream and is_up and distributed.get_world_size() > 1 and None in (rank, world_size):
        raise ValueError(
            "an IterableDataset may shard itself by rank, and would then lose examples; give rank "
            "and world_size if it is the same stream on all ranks, each of which keeps its share"
        )
    if rank is None:
        rank = distributed.get_rank() if is_up else 0
    if world_size is None:
        world_size = distributed.get_world_size() if is_up else 1
    return rank, world_size
