"""The loss over the steps of a run, in buckets that lie evenly in the logarithm of the steps.

Guarantees: of k losses no more than 9 log2(k) numbers are kept, and a mean over the steps between
two fractions of k is that of the losses there, up to a share of one bucket at each end.
"""

from __future__ import annotations

import math

from cabs.control.averages import debiased_step

Curve = tuple[tuple[int, float], ...]
"""Buckets, the oldest first: over how many steps, and the mean loss there."""

# An eighth of the steps before it is as long as a bucket gets.
_SHARE = 8


def extended(curve: Curve, loss: float) -> Curve:
    """Return the curve with the loss of one more step."""
    if curve:
        length, mean = curve[-1]
        if length < _full(steps_in(curve) - length):
            return (*curve[:-1], (length + 1, debiased_step(mean, loss, length + 1.0)))
    return (*curve, (1, loss))


def is_filled(lengths: list[int]) -> bool:
    """Return whether buckets of such lengths are those of a curve."""
    start, last = 0, len(lengths) - 1
    for number, length in enumerate(lengths):
        full = _full(start)
        if not 1 <= length <= full or (length < full and number != last):
            return False
        start += length
    return True


def _full(start: int) -> int:
    """Return how long the bucket gets that begins there."""
    return max(start // _SHARE, 1)


def steps_in(curve: Curve) -> int:
    """Return how many losses a curve is of."""
    return sum([length for length, _ in curve])


def mean_loss(curve: Curve, start: float, stop: float) -> float:
    """Return the mean loss from one step to another; a bucket counts by its share."""
    total, at = 0.0, steps_in(curve)
    # From the last one back, since most buckets are of the first steps.
    for length, mean in reversed(curve):
        end, at = at, at - length
        if end <= start:
            break
        shared = min(end, stop) - max(at, start)
        if shared > 0.0:
            total += mean * (shared / (stop - start))
    return total


def decay_exponent(curve: Curve, loss_floor: float, steps_before: int = 0) -> float:
    r"""Return :math:`\alpha` of a loss that falls as :math:`F_* + B k^{-\alpha}`, in [0.05, 2].

    From the means over two stretches, from a ninth to a third of the steps and from there to
    the last, whose ratio is :math:`3^\alpha`. 1 in the first eight steps, and 0.05 where the loss
    does not fall. With steps before those of the curve, the two lie close to each other in
    :math:`\ln k`, and tell little: 1/2, the paper's, is weighed against what they tell by how much
    closer, squared.
    """
    steps = steps_in(curve)
    if steps < 8:
        return _USUAL if steps_before else 1.0
    apart = _apart(steps, steps_before)
    late, early = (value - loss_floor for value in _stretches(curve, steps))
    if not (late > 0.0 and early > 0.0):
        found = _SLOWEST
    else:
        found = min(max((math.log(early) - math.log(late)) / apart, _SLOWEST), 2.0)
    if not steps_before:
        return found
    told = (apart / math.log(_LONGER)) ** 2
    return told * found + (1.0 - told) * _USUAL


def decrease(curve: Curve, steps_before: int = 0) -> float:
    """Return how much the loss falls per e-fold of the steps; negative where it rises.

    The difference of the same two means, for a loss of any sign; 0 in the first eight steps.
    """
    steps = steps_in(curve)
    if steps < 8:
        return 0.0
    late, early = _stretches(curve, steps)
    is_rounding = abs(early - late) <= 1e-9 * max(abs(early), abs(late))
    return 0.0 if is_rounding else (early - late) / _apart(steps, steps_before)


_SLOWEST, _USUAL = 0.05, 0.5

# Of two stretches, how many times longer the last is. With 2, noise and the bend at the end of a
# fast beginning show more than with 3 (docs/progress.rst).
_LONGER = 3.0


def _stretches(curve: Curve, steps: int) -> tuple[float, float]:
    between = steps / _LONGER
    return mean_loss(curve, between, steps), mean_loss(curve, between / _LONGER, between)


def _apart(steps: int, steps_before: int) -> float:
    """Return how far apart the middles of the two are in ln k."""
    late = 0.5 * steps * (1.0 + 1.0 / _LONGER)
    return math.log((steps_before + late) / (steps_before + late / _LONGER))
