"""The allowed size for a rule's value: the nearest, or another while a step's cost is measured."""

from __future__ import annotations

from cabs.control.configuration import Configuration
from cabs.control.costs import Clock
from cabs.control.reasons import Reason

# Looking a member up in its enumeration takes longer than the rule (Python 3.11).
_RULE, _MAXIMUM = Reason.RULE, Reason.MAXIMUM


def nearest(configuration: Configuration, current: int, raw: float) -> tuple[int, Reason]:
    """Return the allowed size for the rule's value, and the reason that bound last."""
    sizes = configuration.sizes
    size = sizes.nearest(raw)
    reason = _RULE
    if raw > sizes.maximum:
        reason = _MAXIMUM
    elif raw < sizes.minimum:
        reason = Reason.MINIMUM
    if configuration.hysteresis and size != current:
        # A change must still be asked for when the value is moved back by the margin.
        margin = 1.0 + configuration.hysteresis
        if size > current and sizes.nearest(raw / margin) <= current:
            return current, Reason.HYSTERESIS
        if size < current and sizes.nearest(raw * margin) >= current:
            return current, Reason.HYSTERESIS
    if configuration.max_growth is not None and size > current:
        limit = sizes.limit_growth(current, configuration.max_growth)
        if size > limit:
            return limit, Reason.GROWTH
    return size, reason


def explored(
    configuration: Configuration, clock: Clock, current: int, raw: float
) -> tuple[int, Reason]:
    """Return half of what is asked for, or four times as much, in turn.

    Under Adam, in whose second moment the noise of small batches stays, nothing smaller than asked;
    but a quarter of the largest size where more than that is asked for.
    """
    sizes, is_adaptive = configuration.sizes, bool(configuration.rule.in_metric)
    size = sizes.nearest(raw if is_adaptive else 0.5 * raw)
    # Before anything is known of the cost, a look at a size that shows its order of magnitude.
    known = clock.cost is not None
    if is_adaptive and not known:
        size = max(size, configuration.batch_size)
    larger = sizes.nearest(max(4.0 * raw, (4.0 if known or is_adaptive else 16.0) * size))
    if clock.tries_larger:
        size = larger
    elif size == larger:
        # The largest size leaves smaller ones alone.
        size = sizes.nearest(0.25 * size)
    if configuration.max_growth is not None and size > current:
        size = min(size, sizes.limit_growth(current, configuration.max_growth))
    return size, Reason.EXPLORING
