"""Batches of tensors, made ready while a step runs, of the size that the controller asks for.

Guarantees: those of :class:`cabs.data.Loader`; ``tf.data`` reads examples ahead, not batches.
Refuses datasets that are batched already, and those that say that they shuffle anew at each pass,
which cannot go on where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import tensorflow as tf

from cabs import BatchSampler, StreamSampler
from cabs.data import Loader
from cabs.data.epoch_sampler import HasBatchSize
from cabs_tensorflow.data.dataset import Chunks, Rows, gathered, spec_of_examples, whole_arrays

# How many chunks of examples tf.data reads ahead of the loop.
_AHEAD = 2


def loader(
    source: Any,
    controller: HasBatchSize | int,
    *,
    lag: int = 0,
    shuffle: bool | None = None,
    seed: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    one_ahead: bool | None = None,
) -> Loader[Any]:
    """Return a loader of batches of tensors whose sizes follow the controller.

    Where :func:`cabs_tensorflow.dataset` gives a ``tf.data.Dataset``, for ``model.fit`` and for
    pipelines, this gives what a loop needs that is to be resumed: a state that counts what the loop
    has been given, and a lag that does not depend on how fast anything is.

    Args:
        source: Arrays with the examples along their first axes, in any nest that
            ``tf.data.Dataset.from_tensor_slices`` takes; or a ``tf.data.Dataset`` of single
            examples; or a function that is given the number of the epoch and returns one. A
            dataset that shuffles anew at each pass cannot be resumed: let the function give each
            epoch a ``seed`` of its own.
        controller: A :class:`cabs.Controller`, or a constant.
        lag: How many batches to make ready in advance, by a thread; see :class:`cabs.data.Loader`.
        shuffle: Whether every epoch has a random order of its own; True if left out. For arrays; a
            dataset shuffles itself.
        seed: Seed of these orders, at least 0.
        drop_last: Leave out the examples at the end of an epoch that fill no whole batch.
        rank: This process's rank.
        world_size: How many ranks draw from the same batches.
        one_ahead: Whether who iterates takes each batch while the one before it is still to be
            trained on, see :class:`cabs.data.Loader`.

    Returns:
        A :class:`cabs.data.Loader`. A ``tf.function`` over its batches is traced once with
        ``reduce_retracing=True``, or an ``input_signature`` with an unknown batch axis.

    Raises:
        TypeError: If an argument is of the wrong kind, or the examples are no dense tensors.
        ValueError: If arrays differ in the number of examples, an option does not fit the source,
            or a dataset is batched already.

    Example:
        >>> import cabs, cabs_tensorflow, numpy as np
        >>> controller = cabs.Controller(4, sizes=cabs.BatchSizes.range(2, 8))
        >>> batches = cabs_tensorflow.loader(np.arange(10), controller, shuffle=False, lag=1)
        >>> for batch in batches:
        ...     print(batch.numpy(), batches.batch.lag)
        ...     _ = controller.update(learning_rate=0.1, variance_trace=60.0, loss=1.0)
        [0 1 2 3] 0
        [4 5 6 7] 1
        [8 9] 1
    """
    shares: dict[str, Any] = {"drop_last": drop_last, "rank": rank, "world_size": world_size}
    if isinstance(source, tf.data.Dataset) or callable(source):
        if shuffle:
            raise ValueError(
                "shuffle=True is for arrays, got a tf.data.Dataset, which has an order of its own; "
                "call its shuffle(...) before"
            )
        stream = _Stream(source)
        cut = StreamSampler.of_blocks(stream, controller, **shares)
        return Loader(stream.packed, cut, lag=lag, one_ahead=one_ahead)
    whole, examples = whole_arrays(source)
    if not examples:
        raise ValueError("source must hold at least one example, got empty arrays")
    sampler = BatchSampler(
        examples, controller, shuffle=True if shuffle is None else shuffle, seed=seed, **shares
    )
    return Loader(partial(_gathered_on_host, whole), sampler, lag=lag, one_ahead=one_ahead)


def _gathered_on_host(whole: Any, indices: Any) -> Any:
    with tf.device("CPU:0"):
        return gathered(whole, indices)


class _Stream:
    """The examples of a ``tf.data.Dataset``, or of one for each epoch."""

    def __init__(self, source: Any) -> None:
        self._of_epoch: Callable[[int], Any]
        if isinstance(source, tf.data.Dataset):
            _check_order(source)
            self._of_epoch = lambda _: source
        else:
            self._of_epoch = source
        self._spec: Any = None

    def __call__(self, epoch: int) -> Iterator[Rows]:
        """Return the examples of an epoch, many at a time."""
        examples = self._of_epoch(epoch)
        if not isinstance(examples, tf.data.Dataset):
            raise TypeError(
                f"source must return a tf.data.Dataset for each epoch, got {examples!r}"
            )
        self._spec = spec_of_examples(examples)
        return iter(Chunks(examples, ahead=_AHEAD))

    def packed(self, rows: Rows) -> Any:
        """Return examples as the tensors of a batch."""
        with tf.device("CPU:0"):
            tensors = [tf.constant(array) for array in rows.arrays]
        return tf.nest.pack_sequence_as(self._spec, tensors)


def _check_order(source: Any) -> None:
    """Raise ValueError for a dataset with another order at each pass, as far as it says so."""
    if getattr(source, "_reshuffle_each_iteration", False):
        raise ValueError(
            "source must come in the same order whenever it is read, got a dataset that is "
            "shuffled anew at each pass; give a function of the epoch, such as "
            "lambda epoch: examples.shuffle(1000, seed=epoch)"
        )
    for inner in source._inputs():
        _check_order(inner)
