"""What one rank brings to the sum over ranks, with a mark that is equal where they train alike."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank brings."""

    examples: int
    """Its own."""
    batch: int
    """How many examples it takes all ranks to have."""
    is_told: bool
    """Whether that was given, and not taken from the size of its share."""
    fingerprint: int | None
    """That of its controller."""
    loss: Tensor | None
    """Summed over its examples, None if nobody has said."""
    squares: Tensor
    """Sums of m_k |g_k|^2, shape (groups,)."""
    norms: Tensor
    """Its shares of the squared norm of the mean gradient, the same shape."""
    alike: Tensor
    """Square of the gradients that every rank should hold, 0-d."""
    measured: int
    """How many groups of examples are measured."""
    problem: str = ""
    """Why these squares are not those of the mean gradient."""
    before: Tensor | None = None
    """Square of the gradients that were there before, 0-d."""
    is_in_metric: bool = False
    """Whether norms are in the metric of the optimizer's step."""
    is_by_example: bool = True
    """Whether a group is an example, and not a microbatch."""
    each: int = 0
    """How many microbatches all ranks are to have each, 0 where any number will do."""
    seconds: float | None = None
    """What the step before took on this rank's clock."""

    @property
    def mark(self) -> int:
        """A number below 2**18 that is the same on all ranks if they train together."""
        said = (
            self.batch,
            self.fingerprint,
            self.is_by_example,
            len(self.squares),
            self.each,
            self.loss is None,
        )
        # So that a float64 holds the sum of the squares of 2**17 ranks exactly.
        return zlib.crc32(repr(said).encode()) >> 14
