"""Exponential averages: a pure step, and the small object around it.

Guarantees: the debiased average of a constant is that constant, to the bit, and an average lies
between the smallest and the largest value that it has seen, up to rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cabs.values.scalars import Scalar, as_float

# Over how many times as many steps the gradient's norm is averaged, a small difference of large
# numbers.
LONGER = 5.0


class Averages(NamedTuple):
    """The smoothed observations.

    Example:
        >>> Averages(variance_trace=(900.0,), variance_weight=1.0, loss=1.5, loss_weight=1.0).loss
        1.5
    """

    variance_trace: tuple[float, ...]
    """One per parameter group; empty before the first measurement."""
    variance_weight: float
    """Total weight of the measurements in them."""
    loss: float
    loss_weight: float
    """Total weight of the observations in it."""
    gradient_square: float = 0.0
    """Of the squared norm of the expected gradient, where the rule needs it."""
    gradient_weight: float = 0.0
    """Total weight of the measurements in it."""


def debiased_weight(weight: float, smoothing: float) -> float:
    """Return the total weight after one more value, 1 + beta + beta^2 + ..."""
    return 1.0 + smoothing * weight


def debiased_step(mean: float, value: float, weight: float) -> float:
    """Return the average after ``value``; ``weight`` counts it already.

    Equal to the usual exponential average divided by 1 - beta^t (Kingma, Ba: "Adam", section 3),
    written so that equal values leave it where it is, and a weight of 1 keeps the value alone.
    """
    share = (weight - 1.0) / weight
    average = value + (mean - value) * share
    # The difference of two finite numbers can overflow; their average cannot.
    return average if math.isfinite(average) else mean * share + value / weight


def check_smoothing(smoothing: Scalar) -> float:
    """Return the constant beta as a float, or raise ValueError."""
    beta = as_float(smoothing, "smoothing")
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"smoothing must be in [0, 1), got smoothing = {beta}")
    return beta


class DebiasedAverage:
    r"""Exponential average of a stream of numbers, without the bias towards its start.

    .. math:: \bar x_t = \frac{\sum_{s \le t} \beta^{t-s} x_s}{\sum_{s \le t} \beta^{t-s}}

    Args:
        smoothing: :math:`\beta` in [0, 1); 0 keeps the last value only.

    Raises:
        ValueError: If ``smoothing`` is outside [0, 1).

    Example:
        >>> average = DebiasedAverage(0.5)
        >>> average.update(1.0), average.update(4.0)
        (1.0, 3.0)
        >>> average.value
        3.0
    """

    __slots__ = ("_mean", "_weight", "smoothing")

    def __init__(self, smoothing: float = 0.95) -> None:
        self.smoothing = check_smoothing(smoothing)
        self._mean = 0.0
        self._weight = 0.0

    def update(self, value: Scalar) -> float:
        """Take in one finite number and return the average; ValueError if it is not finite."""
        number = as_float(value, "value")
        if not math.isfinite(number):
            raise ValueError(
                f"value must be finite, got value = {number}; leave it out of the average"
            )
        self._weight = debiased_weight(self._weight, self.smoothing)
        self._mean = debiased_step(self._mean, number, self._weight)
        return self._mean

    @property
    def value(self) -> float:
        """The average; ``nan`` before the first value."""
        return self._mean if self._weight else math.nan
