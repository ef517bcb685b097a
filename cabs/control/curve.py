"""The loss over the steps of a run, in buckets that grow with their age.

Guarantees: of k losses no more than 9 log2(k) numbers are kept, and a mean over the steps between
two fractions of k is that of the losses there, up to a share of one bucket at each end.
"""

from __future__ import annotations

import math

Curve = tuple[tuple[int, float], ...]
"""Buckets, the oldest first: over how many steps, a power of two, and the mean loss there."""

# Buckets of each length, from which the two oldest become one of the next length.
_EACH = 8


def extended(curve: Curve, loss: float) -> Curve:
    """Return the curve with the loss of one more step."""
    buckets = [*curve, (1, loss)]
    length, end = 1, len(buckets)
    while True:
        start = end
        while start and buckets[start - 1][0] == length:
            start -= 1
        if end - start <= _EACH:
            return tuple(buckets)
        (_, first), (_, second) = buckets[start : start + 2]
        # Halves, since a sum of two finite numbers can overflow.
        buckets[start : start + 2] = [(2 * length, 0.5 * first + 0.5 * second)]
        length, end = 2 * length, start + 1


def steps_in(curve: Curve) -> int:
    """Return how many losses a curve is of."""
    return sum(length for length, _ in curve)


def mean_loss(curve: Curve, start: float, stop: float) -> float:
    """Return the mean loss from one step to another; a bucket counts by its share."""
    total = at = 0.0
    for length, mean in curve:
        shared = min(at + length, stop) - max(at, start)
        if shared > 0.0:
            total += mean * (shared / (stop - start))
        at += length
    return total


def decay_exponent(curve: Curve, loss_floor: float, steps_before: int = 0) -> float:
    r"""Return :math:`\alpha` of a loss that falls as :math:`F_* + B k^{-\alpha}`, in [0.05, 2].

    From the means over the last half of the steps and over the quarter before it, whose ratio is
    :math:`2^\alpha`. 1 in the first eight steps, and 0.05 where the loss does not fall. With steps
    before those of the curve, the two means lie close to each other in :math:`\ln k`, and tell
    little: 1/2, the paper's, is weighed against what they tell by how much closer, squared.
    """
    steps = steps_in(curve)
    if steps < 8:
        return _USUAL if steps_before else 1.0
    late, early = (value - loss_floor for value in _halves(curve, steps))
    if not (late > 0.0 and early > 0.0):
        found = _SLOWEST
    else:
        apart = _apart(steps, steps_before)
        found = min(max((math.log2(early) - math.log2(late)) / apart, _SLOWEST), 2.0)
    if not steps_before:
        return found
    told = _apart(steps, steps_before) ** 2
    return told * found + (1.0 - told) * _USUAL


def decrease(curve: Curve, steps_before: int = 0) -> float:
    """Return how much the loss falls per e-fold of the steps; negative where it rises.

    The difference of the same two means, for a loss of any sign; 0 in the first eight steps.
    """
    steps = steps_in(curve)
    if steps < 8:
        return 0.0
    late, early = _halves(curve, steps)
    is_rounding = abs(early - late) <= 1e-9 * max(abs(early), abs(late))
    return 0.0 if is_rounding else (early - late) / math.log(2.0) / _apart(steps, steps_before)


_SLOWEST, _USUAL = 0.05, 0.5


def _halves(curve: Curve, steps: int) -> tuple[float, float]:
    return mean_loss(curve, steps / 2, steps), mean_loss(curve, steps / 4, steps / 2)


def _apart(steps: int, steps_before: int) -> float:
    """Return how many times the number of steps doubles between the middles of the two."""
    late, early = steps_before + 0.75 * steps, steps_before + 0.375 * steps
    return math.log2(late / early) if steps_before else 1.0
