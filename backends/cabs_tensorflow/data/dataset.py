"""A ``tf.data.Dataset`` whose batches have the size that is asked for when each is drawn.

Guarantees: nothing is drawn before it is wanted, whatever ``tf.data`` would like to prefetch, but
for as many batches as the caller asks for; every example once an epoch; one element spec for all
sizes, from which a ``tf.function`` is traced once. Refuses to cut batches that are already cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import tensorflow as tf

from cabs import BatchSampler, StreamSampler
from cabs.data.epoch_sampler import HasBatchSize
from cabs.values.scalars import as_bool, as_integer
from cabs_tensorflow.data.drawn import Drawn

# Examples of a dataset that are read at once. The more, the less Python costs for each of them.
_CHUNK = 64


def dataset(
    controller: HasBatchSize | int | BatchSampler,
    source: Any,
    *,
    shuffle: bool | None = None,
    seed: int | None = None,
    drop_last: bool | None = None,
    prefetch: int = 0,
) -> Any:
    """Return a dataset of batches whose sizes follow a controller.

    Iterating is one epoch, as with :class:`cabs.BatchSampler`: over arrays, the rest of the current
    epoch where the last loop was left early; over a dataset, a new pass. No example is left alone
    for the last batch of an epoch, since one example shows no variance.

    The size is that of ``controller.batch_size`` when ``next`` is called: the lag is 0. What is
    prefetched, here or by a ``prefetch`` or a parallel ``map`` after it, is sized that many batches
    too early. A ``map`` without ``num_parallel_calls`` has no lag.

    Args:
        controller: A :class:`cabs.Controller`, or a constant; over arrays also a
            :class:`cabs.BatchSampler`, whose ``state_dict`` then tells how far the loop has come.
        source: Arrays with the examples along their first axes, in any nest that
            ``tf.data.Dataset.from_tensor_slices`` takes; or a ``tf.data.Dataset`` of single
            examples, not batched, in the order that it has.
        shuffle: Whether every epoch has a random order of its own; True if left out. For arrays; a
            dataset shuffles itself.
        seed: Seed of these orders, 0 if left out. For arrays.
        drop_last: Leave out the examples at the end of an epoch that fill no whole batch; False if
            left out.
        prefetch: How many batches to draw ahead: the lag, in steps, between a decision and the
            first batch that follows it, where a batch is drawn in less time than a step takes; it
            is never longer. A sampler's state counts these batches.

    Returns:
        A ``tf.data.Dataset`` whose ``element_spec`` has an unknown batch axis. With ``@tf.function(
        input_signature=batches.element_spec)`` a step is traced once; from the sizes of the batches
        themselves, one after the other, it would be traced for each.

    Raises:
        TypeError: If an argument is of the wrong kind, or the examples are no dense tensors.
        ValueError: If arrays differ in the number of examples, an option does not fit the source,
            or a dataset is batched already.

    Example:
        >>> import cabs, cabs_tensorflow, numpy as np
        >>> controller = cabs.Controller(4, sizes=cabs.BatchSizes.range(2, 8))
        >>> inputs, labels = np.arange(20.0).reshape(10, 2), np.arange(10)
        >>> batches = cabs_tensorflow.dataset(controller, (inputs, labels), shuffle=False)
        >>> for x, y in batches:
        ...     print(x.shape, y.numpy())
        ...     _ = controller.update(learning_rate=0.1, variance_trace=60.0, loss=1.0)
        (4, 2) [0 1 2 3]
        (6, 2) [4 5 6 7 8 9]
    """
    prefetch = as_integer(prefetch, "prefetch", 0)
    if isinstance(controller, (int, np.integer)):
        controller = as_integer(controller, "controller", 1)
    elif not hasattr(controller, "batch_size"):
        raise TypeError(
            "controller must be a cabs.Controller, an integer, or a cabs.BatchSampler, got "
            f"{controller!r}"
        )
    if isinstance(source, tf.data.Dataset):
        if isinstance(controller, BatchSampler) or shuffle is not None or seed is not None:
            raise ValueError(
                "a sampler, shuffle and seed are for arrays, got a tf.data.Dataset, which has an "
                "order of its own; call its shuffle(...) before, and pass the controller"
            )
        batches = _of_dataset(controller, source, drop_last)
    else:
        batches = _of_arrays(controller, source, shuffle, seed, drop_last)
    batches = batches.with_options(_on_demand())
    return batches.prefetch(prefetch) if prefetch else batches


def _on_demand() -> Any:
    """Return options under which nothing is prefetched, or mapped in parallel, unasked."""
    # Either would do, autotuning off or both optimizations; options set later may undo one.
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False
    options.experimental_optimization.map_parallelization = False
    options.deterministic = True
    return options


def _of_arrays(
    controller: HasBatchSize | int | BatchSampler,
    source: Any,
    shuffle: bool | None,
    seed: int | None,
    drop_last: bool | None,
) -> Any:
    whole, examples = whole_arrays(source)
    if isinstance(controller, BatchSampler):
        sampler = controller
        if (shuffle, seed, drop_last) != (None, None, None):
            raise ValueError(
                "shuffle, seed and drop_last are those of the sampler; leave them out, or pass the "
                "controller in place of the sampler"
            )
        if sampler.examples != examples:
            raise ValueError(
                f"the sampler draws from {sampler.examples} examples and source holds {examples}; "
                "make a sampler for this source"
            )
    else:
        sampler = BatchSampler(
            examples,
            controller,
            shuffle=True if shuffle is None else shuffle,
            seed=0 if seed is None else seed,
            drop_last=False if drop_last is None else drop_last,
        )
    drawn = Drawn(sampler)
    indices = tf.data.Dataset.from_generator(
        lambda: drawn.noted(sampler), output_signature=tf.TensorSpec([None], tf.int64)
    )
    gather = tf.autograph.experimental.do_not_convert(partial(gathered, whole))
    return drawn.mark(indices.map(gather))


def whole_arrays(source: Any) -> tuple[Any, int]:
    """Return arrays as tensors, and how many examples there are in each."""
    # On the host: a copy of everything on a GPU would be copied back for each batch.
    with tf.device("CPU:0"):
        together = tf.data.Dataset.from_tensors(source)
        _check_dense(together)
        whole = next(iter(together))
        # Says whether there are as many examples in each.
        tf.data.Dataset.from_tensor_slices(whole)
    return whole, int(tf.nest.flatten(whole)[0].shape[0])


def gathered(whole: Any, indices: Any) -> Any:
    """Return some examples of arrays."""
    return tf.nest.map_structure(lambda array: tf.gather(array, indices), whole)


def _of_dataset(controller: Any, source: Any, drop_last: bool | None) -> Any:
    spec = spec_of_examples(source)
    drop_last = False if drop_last is None else as_bool(drop_last, "drop_last")
    batched = tf.nest.map_structure(
        lambda part: tf.TensorSpec(tf.TensorShape([None]).concatenate(part.shape), part.dtype), spec
    )

    drawn = Drawn(controller)

    def cut() -> Iterator[Any]:
        chunks = iter(Chunks(source))
        # An empty dataset is an empty dataset: what is wrong with that, its user knows.
        first = next(chunks, None)
        if first is None:
            return
        whole = chain([first], chunks)
        blocks = StreamSampler.of_blocks(lambda _: whole, controller, drop_last=drop_last)
        for rows in drawn.noted(blocks):
            yield tf.nest.pack_sequence_as(spec, rows.arrays)

    return drawn.mark(tf.data.Dataset.from_generator(cut, output_signature=batched))


def spec_of_examples(source: Any) -> Any:
    """Return the element spec of a dataset of single examples; ValueError if it has others."""
    _check_dense(source)
    spec = source.element_spec
    if all(part.shape.rank and part.shape[0] is None for part in tf.nest.flatten(spec)):
        raise ValueError(
            "source must be a dataset of single examples, got elements whose first axes are all "
            f"unknown, as those of batches are: {spec}; call unbatch() on it, or leave out batch()"
        )
    return spec


class Rows:
    """Examples that lie in arrays, as :meth:`cabs.StreamSampler.of_blocks` takes them."""

    def __init__(self, arrays: list[Any]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, rows: slice) -> Rows:
        return Rows([array[rows] for array in self.arrays])

    def __add__(self, other: Rows) -> Rows:
        return Rows(list(map(np.concatenate, zip(self.arrays, other.arrays, strict=True))))


class Chunks:
    """The examples of a dataset, many at a time; iterating reads it from its start."""

    def __init__(self, source: Any, *, ahead: int = 0) -> None:
        chunks = source.batch(_CHUNK)
        self._chunks = chunks.prefetch(ahead) if ahead else chunks

    def __iter__(self) -> Iterator[Rows]:
        return (Rows(tf.nest.flatten(chunk)) for chunk in self._chunks.as_numpy_iterator())


def _check_dense(examples: Any) -> None:
    for part in tf.nest.flatten(examples.element_spec):
        if not isinstance(part, tf.TensorSpec):
            raise TypeError(
                f"source must hold dense tensors, got {part}; pad or densify the examples first"
            )
