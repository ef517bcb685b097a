"""What a step costs, from the seconds of the steps themselves: a fixed part, and one an example.

Guarantees: a pure function of the timings; slow first steps, pauses and other outliers count for
nothing beside times that agree; of any number of timings a bounded number is kept.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

# Timings kept of batches of about one size, the last ones, and from how many these count.
_KEPT, _ENOUGH = 31, 3
# Timings between two fits.
_BETWEEN = 4
# The last timings, of which all but some tell that the clock has drifted, and by which factor.
_RECENT, _STRAYS, _DRIFT = 24, 3, 1.5
# For how many timings the sizes are varied, at least and at most, and the deviation that ends it.
_LEAST, _TRIED, _SURE = 16, 96, 0.1
# For normal numbers: a standard deviation over a median absolute deviation, and the standard errors
# of a median and of Tukey's biweight over that of a mean.
_OF_DEVIATION, _OF_MEDIAN, _OF_BIWEIGHT = 1.4826, 1.2533, 1.0260
# Standard deviations from which on the biweight counts a number for nothing, and how often weights
# follow from the line before.
_FAR, _ROUNDS = 4.685, 2

# Seconds that a step can take: what is beyond is a broken clock, and left out.
SHORTEST, LONGEST = 1e-9, 1e9

Timing = tuple[int, float]
"""The examples of a batch, and the seconds that its step took."""
Timings = tuple[tuple[Timing, ...], ...]
"""Those of sizes within a factor of 1.5 together, by size; the oldest timing of each first."""


class StepCost(NamedTuple):
    r"""What a step of m examples takes, :math:`t_0 + c m`, as fitted to timings.

    Example:
        >>> cost = StepCost(fixed=6e-3, per_example=1e-5, deviation=30.0)
        >>> round(cost.overhead)
        600
    """

    fixed: float
    r""":math:`t_0`, in seconds."""
    per_example: float
    r""":math:`c`, in seconds."""
    deviation: float
    """Standard error of :attr:`overhead`, in examples."""

    @property
    def overhead(self) -> float:
        r""":math:`h = t_0 / c`: how many examples take as long as the fixed part of a step."""
        return self.fixed / self.per_example


class Clock(NamedTuple):
    """The timings that are kept, and the cost fitted to them."""

    timings: Timings = ()
    recent: tuple[Timing, ...] = ()
    """The last timings, whatever their sizes."""
    steps: int = 0
    """How many there have been since the start, or since the clock drifted."""
    cost: StepCost | None = None
    explores: bool = True
    """Whether sizes are still to be varied, so that the two parts can be told apart."""

    @property
    def tries_larger(self) -> bool:
        """Whether it is a larger batch's turn, three steps at a time."""
        return self.steps // _ENOUGH % 2 == 1


def timed(clock: Clock, examples: int, seconds: float) -> Clock:
    """Return the clock with one more timing, unless no step can take such a time."""
    if not SHORTEST <= seconds <= LONGEST:
        return clock
    timing = examples, seconds
    recent, steps = (*clock.recent, timing)[-_RECENT:], clock.steps + 1
    if not clock.explores:
        # What is timed at other times than the sizes that tell the slope would tilt the line: a
        # machine that becomes slower as a whole has the same overhead.
        if clock.cost is not None and _has_drifted(clock.cost, recent):
            return Clock(cost=clock.cost)
        return clock._replace(recent=recent, steps=steps)
    timings = _sorted_in(clock.timings, timing)
    if steps % _BETWEEN:
        return Clock(timings, recent, steps, clock.cost)
    cost = _fitted(timings) or clock.cost
    if steps >= _TRIED or (steps >= _LEAST and _is_sure(cost, recent)):
        return Clock((), recent, steps, cost, explores=False)
    return Clock(timings, recent, steps, cost)


def _is_sure(cost: StepCost | None, recent: tuple[Timing, ...]) -> bool:
    """Return whether the overhead is known well enough, beside it and the sizes there are."""
    if cost is None:
        return False
    return cost.deviation <= _SURE * (cost.overhead + median(examples for examples, _ in recent))


def _sorted_in(timings: Timings, timing: Timing) -> Timings:
    """Return the timings with a new one among those of about the same size."""
    groups = {_about(one[0][0]): one for one in timings}
    size = _about(timing[0])
    groups[size] = (*groups.get(size, ()), timing)[-_KEPT:]
    return tuple(groups[size] for size in sorted(groups))


def _about(examples: int) -> tuple[int, int]:
    """Return what is alike for sizes within a factor of 1.5: the two leading bits, and how many."""
    bits = examples.bit_length()
    return bits, examples >> max(bits - 2, 0)


def _has_drifted(cost: StepCost, recent: tuple[Timing, ...]) -> bool:
    """Return whether nearly all of the last timings are those of another machine."""
    if len(recent) < _RECENT:
        return False
    away = sorted(_away(recent, cost.fixed, cost.per_example))
    return away[_STRAYS] > _DRIFT - 1.0 or away[-1 - _STRAYS] < 1.0 / _DRIFT - 1.0


def _fitted(timings: Timings) -> StepCost | None:
    """Return the line through the timings, weighed by their errors and by how far they are away.

    It starts from the line through the medians of each size, and goes on with Tukey's biweight
    (Beaton, Tukey: "The fitting of power series, meaning polynomials, illustrated on
    band-spectroscopic data", Technometrics 16, 1974): of a size with three timings, two of them
    pauses, the median is a pause.
    """
    groups = [one for one in timings if len(one) >= _ENOUGH]
    if len(groups) < 2:
        return None
    every = [one for group in timings for one in group]
    middles = [(median(m for m, _ in one), median(time for _, time in one)) for one in groups]
    # The error of a time is in proportion to it.
    weights = [len(one) / time**2 for one, (_, time) in zip(groups, middles, strict=True)]
    cost = _through(middles, weights, every, _OF_MEDIAN)
    for _ in range(_ROUNDS):
        away = _away(every, cost.fixed, cost.per_example)
        # Times of a clock that is exact agree to rounding.
        most = _FAR * max(_scatter(away), 1e-12)
        # A time over one more than how far it is away is what the line says.
        weights = [
            (max(1.0 - (one / most) ** 2, 0.0) * (1.0 + one) / seconds) ** 2
            for one, (_, seconds) in zip(away, every, strict=True)
        ]
        cost = _through(every, weights, every, _OF_BIWEIGHT)
    return cost


def _through(
    points: Sequence[tuple[float, float]],
    weights: list[float],
    timings: list[Timing],
    efficiency: float,
) -> StepCost:
    """Return the line through points, and how sure it is by how far away the timings are."""
    sizes, times = zip(*points, strict=True)
    total = math.fsum(weights)
    size = _dot(weights, sizes) / total
    time = _dot(weights, times) / total
    away = [one - size for one in sizes]
    # Above 0 where all that counts has one size: noise then hides the slope.
    spread = max(_dot([one * one for one in away], weights), 1e-12 * size * size * total)
    slope = _dot([one * weight for one, weight in zip(away, weights, strict=True)], times) / spread
    # Sizes that lie together can have a line that falls, or meets zero too late.
    least = max(time - slope * size, 0.0), max(slope, 0.0)
    scatter = efficiency * _scatter(_away(timings, *least))
    error = scatter / math.sqrt(spread)
    # A slope that noise hides is taken for as large as it may be: h is then too small, and finite.
    slope = max(slope, error, 1e-9 * time / size)
    fixed = max(time - slope * size, 0.0)
    # h = time / slope - size, whose two parts err independently.
    deviation = math.hypot(time / slope * (error / slope), scatter / math.sqrt(total) / slope)
    return StepCost(fixed, slope, deviation)


def _away(timings: Iterable[Timing], fixed: float, per_example: float) -> list[float]:
    """Return by how much times are longer than a line says, relative to it."""
    return [seconds / (fixed + per_example * examples) - 1.0 for examples, seconds in timings]


def _scatter(away: Iterable[float]) -> float:
    """Return the relative standard deviation of a timing, as far as most of them tell."""
    return _OF_DEVIATION * median(map(abs, away))


def _dot(left: Iterable[float], right: Iterable[float]) -> float:
    return math.fsum(map(operator.mul, left, right))
