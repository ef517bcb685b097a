"""Which batches a dataset has drawn, and who decided their sizes.

Guarantees: a batch that a step is given is compared with those that were drawn, whatever the lag is
and wherever an epoch ends; where a dataset comes from is read off the dataset, not its batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from cabs import BatchSampler

_NAME = "_cabs_drawn"


class Drawn:
    """The batches of one dataset.

    Args:
        controller: What decides their sizes: a constant, or what has a ``batch_size``.
    """

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._waiting: Counter[int] = Counter()

    @property
    def batch_size(self) -> int:
        """The size that the next batch to be drawn will be asked for with."""
        return int(getattr(self._controller, "batch_size", self._controller))

    @property
    def order(self) -> Any:
        """What tells which examples come next, plain values; None where that is not known."""
        is_known = isinstance(self._controller, BatchSampler)
        return self._controller.state_dict() if is_known else None

    def noted(self, batches: Any) -> Iterator[Any]:
        """Yield batches, and remember how many examples each of them has."""
        for batch in batches:
            self._waiting[len(batch)] += 1
            yield batch

    def give(self, examples: int) -> None:
        """Take note of a batch that a step is given, before it is taken.

        Raises:
            ValueError: If no batch of so many examples has been drawn, or each was given before.
        """
        if not self._waiting[examples]:
            raise ValueError(
                f"a step is given {examples} examples, and no batch of {examples} was drawn for "
                f"it; the next one is to have {self.batch_size}. Cut, filter, repeat or cache "
                "examples before cabs_tensorflow.dataset, and leave its batches whole"
            )
        self._waiting[examples] -= 1

    def mark(self, dataset: Any) -> Any:
        """Return a dataset that is known to give these batches, and so do those made of it."""
        setattr(dataset, _NAME, self)
        return dataset


def drawn_by(dataset: Any) -> Drawn:
    """Return the batches that a dataset hands on.

    Raises:
        TypeError: If it is no ``tf.data.Dataset``.
        ValueError: If they do not come from :func:`cabs_tensorflow.dataset`.
    """
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            "x must be a tf.data.Dataset of batches that the controller sizes, got "
            f"{type(dataset).__name__}; pass cabs_tensorflow.dataset(controller, (x, y))"
        )
    waiting = [dataset]
    while waiting:
        one = waiting.pop()
        found = getattr(one, _NAME, None)
        if isinstance(found, Drawn):
            return found
        waiting.extend(one._inputs())
    raise ValueError(
        "x must be batches that the controller sizes, got a tf.data.Dataset that is not made of "
        "cabs_tensorflow.dataset; pass cabs_tensorflow.dataset(controller, examples), where "
        "examples are single ones, such as x.unbatch(); with a constant in place of the controller "
        "it measures and decides, and sizes stay as they are"
    )
