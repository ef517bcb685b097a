"""What the conformance suite asks of an adapter; a new framework's gives all of it."""

from typing import Any, NamedTuple, Protocol

import numpy as np


class Measured(NamedTuple):
    """What a call returned: the mean loss, named gradients of it, and the adapter's statistics."""

    loss: float
    gradients: dict[str, np.ndarray]
    statistics: Any


class Adapter(Protocol):
    """An adapter, in NumPy's arrays.

    ``losses_of(operations, parameters, batch)`` returns one loss an example, shape (m,).
    """

    draws: int
    """How many networks are drawn: fewer where each has to be compiled."""
    ulps: int
    """How far gradients may be from those of the plain step, in units in the last place."""
    operations: Any
    """The framework's own, under the names of ``operations.py``."""

    def measure(self, losses_of, parameters, batch, *, sample=None) -> Measured:
        """Return what the adapter's main call returns."""

    def plain(self, losses_of, parameters, batch) -> dict[str, np.ndarray]:
        """Return the gradients of the mean loss as they are without this library."""

    def of_group(self, examples, gradients) -> Any:
        """Return the partial statistics of a group, from its size and mean gradient."""

    def complete(self, part, gradients, loss=None) -> Any:
        """Return statistics, from their part and the gradient of all examples."""
