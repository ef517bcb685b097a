"""Streaming moments of gradients that arrive as arrays, in chunks of any size.

Guarantees: one pass, memory of three vectors, and the accuracy of a two-pass float64 computation
whatever the offset or scale of the values and however they are cut into chunks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cabs.gradients.statistics import GradientStatistics


class GradientMoments:
    r"""Mean and variance of gradients, by the updates of Welford and of Chan, Golub, LeVeque.

    Each row is the mean gradient of a group of examples: of one example, unless ``sizes`` says
    otherwise. Then the variance is the between-group mean square of
    :class:`cabs.GradientStatistics`, and estimates the variance of one example's gradient.

    Sources: Welford, "Note on a method for calculating corrected sums of squares and products",
    Technometrics 4 (1962); Chan, Golub, LeVeque, "Algorithms for computing the sample variance",
    The American Statistician 37 (1983), equation 2.1.

    Example:
        >>> moments = GradientMoments()
        >>> moments.update([[1.0, 0.0], [3.0, 0.0]])
        >>> moments.update([[5.0, 6.0]])
        >>> moments.mean
        array([3., 2.])
        >>> moments.variance
        array([ 4., 12.])
        >>> moments.variance_trace
        16.0
    """

    __slots__ = ("_deviation", "_mean", "_origin", "examples", "groups")

    def __init__(self) -> None:
        self.examples = 0
        """How many examples have been seen."""
        self.groups = 0
        """How many rows have been seen."""
        # The first row. All else is kept relative to it, so that an offset common to all rows,
        # however large, takes no digits from their differences.
        self._origin: npt.NDArray[np.float64] = np.zeros(())
        self._mean: npt.NDArray[np.float64] = np.zeros(())
        # Per coordinate, the weighted sum of squared deviations from the mean.
        self._deviation: npt.NDArray[np.float64] = np.zeros(())

    def update(self, gradients: npt.ArrayLike, *, sizes: npt.ArrayLike | None = None) -> None:
        """Take in a chunk of rows.

        Args:
            gradients: Shape (n, ...): n gradients of any shape, the same in every chunk; n may
                be 0.
            sizes: Shape (n,): how many examples each row is the mean of; one each by default.

        Raises:
            ValueError: If a shape does not fit, or a size is not a positive integer.
        """
        # Any float64 view will do: rows are only read.
        rows = np.asarray(gradients, dtype=np.float64)
        if rows.ndim == 0:
            raise ValueError("gradients must have a leading axis of examples, got a single number")
        if self.groups and rows.shape[1:] != self._mean.shape:
            raise ValueError(
                f"gradients must have shape (n, *{self._mean.shape}) as in the chunks before, "
                f"got shape {rows.shape}"
            )
        counts = _sizes_of(rows, sizes)
        if not len(rows):
            return
        if not self.groups:
            self._start(rows[0])
        examples = int(counts.sum())
        weights = counts.reshape((-1,) + (1,) * (rows.ndim - 1)).astype(np.float64)
        deviations = rows - self._origin
        mean = (weights * deviations).sum(axis=0) / examples
        deviations -= mean
        self._combine(examples, len(rows), mean, (weights * deviations**2).sum(axis=0))

    def merge(self, other: GradientMoments) -> None:
        """Take in all that ``other`` has seen; ``other`` stays as it is.

        Raises:
            ValueError: If the two hold gradients of different shapes.
        """
        if self.groups and other.groups and self._mean.shape != other._mean.shape:
            raise ValueError(
                f"moments of gradients of shape {self._mean.shape} cannot take in those of shape "
                f"{other._mean.shape}"
            )
        if not other.groups:
            return
        if not self.groups:
            self._start(other._origin)
        mean = other._mean + (other._origin - self._origin)
        self._combine(other.examples, other.groups, mean, other._deviation)

    def _start(self, origin: npt.NDArray[np.float64]) -> None:
        self._origin = origin.copy()
        self._mean = np.zeros(origin.shape)
        self._deviation = np.zeros(origin.shape)

    def _combine(
        self,
        examples: int,
        groups: int,
        mean: npt.NDArray[np.float64],
        deviation: npt.NDArray[np.float64],
    ) -> None:
        """Merge by Chan, Golub, LeVeque, equation 2.1, with weights for counts."""
        share = examples / (self.examples + examples)
        step = mean - self._mean
        self._mean += share * step
        self._deviation += deviation + self.examples * share * step**2
        self.examples += examples
        self.groups += groups

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean gradient over all examples, in the shape of one gradient; 0 before the first."""
        return self._origin + self._mean

    @property
    def variance(self) -> npt.NDArray[np.float64]:
        """Variance of each coordinate, in the shape of one gradient; ``nan`` for one row."""
        if self.groups < 2:
            return np.full(self._mean.shape, np.nan)
        return self._deviation / (self.groups - 1)

    @property
    def variance_trace(self) -> float:
        r""":math:`\mathrm{tr}(\Sigma)`, the sum of the variances; ``nan`` for one row."""
        return float(self._deviation.sum()) / (self.groups - 1) if self.groups > 1 else math.nan

    @property
    def statistics(self) -> GradientStatistics:
        """The same in four numbers; ValueError before the first row.

        Where the mean is 1e8 times the deviations or more, the difference of two of them that gives
        the variance is lost to rounding, and :attr:`variance_trace` of this object is not.
        """
        gradient_norm_squared = float(np.sum(self.mean**2))
        group_square_sum = float(self._deviation.sum()) + self.examples * gradient_norm_squared
        return GradientStatistics(
            self.examples, self.groups, group_square_sum, gradient_norm_squared
        )


def _sizes_of(rows: npt.NDArray[np.float64], sizes: npt.ArrayLike | None) -> npt.NDArray[Any]:
    """Return how many examples each row stands for."""
    if sizes is None:
        return np.ones(len(rows), dtype=np.int64)
    counts = np.asarray(sizes)
    if counts.shape != (len(rows),):
        raise ValueError(
            f"sizes must have shape ({len(rows)},), one size a row, got shape {counts.shape}"
        )
    if len(rows) and (counts.dtype.kind not in "iu" or counts.min() < 1):
        raise ValueError(f"sizes must be positive integers, got sizes = {counts}")
    return counts
