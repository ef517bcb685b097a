"""Seconds from one step to the next, on the clock of the machine.

Guarantees: nothing is synchronised for the sake of the clock; what is left out, or loaded, is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_Batch = TypeVar("_Batch")


class Stopwatch:
    """Takes the time from one :meth:`cabs.Controller.update` to the next.

    Give it to ``update`` as ``seconds``, which reads it once the statistics have arrived: a step
    then ends where its backward pass has ended on the device too, and nothing waits for the clock
    alone. Loading is in the time of a step, as it is in that of training.

    Args:
        clock: What returns the present time, in seconds.

    Example:
        >>> import cabs
        >>> controller = cabs.Controller(16, rule=cabs.Progress())
        >>> times = iter([0.0, 0.3, 0.7])
        >>> watch = cabs.Stopwatch(clock=lambda: next(times))
        >>> for _ in range(3):
        ...     made = controller.update(
        ...         learning_rate=0.1, variance_trace=900.0, loss=1.5, seconds=watch
        ...     )
        ...     made.observation.seconds is None or round(made.observation.seconds, 6)
        True
        0.3
        0.4
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began: float | None = None
        self._left_out = 0.0
        self.total = 0.0
        """Seconds of all steps so far."""
        self.loaded = 0.0
        """Seconds of them that :meth:`loading` has waited for batches."""

    def lap(self) -> float | None:
        """Return the seconds since the last call, less what was left out; None the first time."""
        now, began = self._clock(), self._began
        self._began, left_out, self._left_out = now, self._left_out, 0.0
        if began is None:
            self.loaded = 0.0
            return None
        seconds = now - began - left_out
        self.total += seconds
        return seconds

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave out what is done inside: evaluation, a checkpoint, a figure."""
        start, before = self._clock(), self._left_out
        try:
            yield
        finally:
            # What is left out inside of this is left out once.
            self._left_out = before + self._clock() - start

    def loading(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """Yield the batches, and count in :attr:`loaded` the seconds that they took to come."""
        each = iter(batches)
        while True:
            start = self._clock()
            try:
                batch = next(each)
            except StopIteration:
                return
            self.loaded += self._clock() - start
            yield batch
