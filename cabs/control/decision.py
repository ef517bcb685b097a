"""The decision as a pure function: configuration, state, observation -> new state, decision.

Guarantees: the same inputs give the same outputs to the bit, on any machine with IEEE arithmetic;
no value that is not finite reaches an average; every decision says why. Refuses to guess: an
observation that does not fit raises before anything has changed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from enum import StrEnum
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from cabs.control.averages import LONGER, Averages, debiased_step, debiased_weight
from cabs.control.configuration import Configuration
from cabs.control.costs import Clock, timed
from cabs.control.curve import Curve, extended, steps_in
from cabs.control.rules import CABS, Known


class Reason(StrEnum):
    """Why a decision chose its batch size. In the last seven nothing was decided: it was held.

    Example:
        >>> Reason.MAXIMUM.value, Reason.MAXIMUM.held
        ('maximum', False)
        >>> Reason("loss at floor").held
        True
    """

    RULE = "rule"
    """The allowed size nearest to the rule's value."""
    MINIMUM = "minimum"
    """The rule asks for less than the smallest size."""
    MAXIMUM = "maximum"
    """The rule asks for more than the largest size."""
    HYSTERESIS = "hysteresis"
    """The rule asks for a change too small to be made."""
    GROWTH = "growth limit"
    """The rule asks for more growth than one step may bring."""
    EXPLORING = "exploring"
    """The size is varied, so that the clock shows what a step costs."""
    LEARNING_RATE_NOT_FINITE = "learning rate not finite"
    """The observation was left out."""
    VARIANCE_NOT_FINITE = "variance not finite"
    """The observation was left out; one example alone shows no variance."""
    LOSS_NOT_FINITE = "loss not finite"
    """The observation was left out."""
    GRADIENT_NOT_FINITE = "gradient not finite"
    """The observation was left out."""
    NO_PROGRESS = "no progress"
    """The loss does not fall and is not positive, so that the rule for the least time has none."""
    LOSS_AT_FLOOR = "loss at floor"
    """The averaged loss is at or under the floor, where the rule has no value."""
    RULE_NOT_FINITE = "rule not finite"
    """The observations are finite and the rule's terms overflow in opposite directions."""

    @property
    def held(self) -> bool:
        """Whether the batch size was held for want of a value of the rule."""
        return self in _HELD


_HELD = frozenset(
    {
        Reason.LEARNING_RATE_NOT_FINITE,
        Reason.VARIANCE_NOT_FINITE,
        Reason.LOSS_NOT_FINITE,
        Reason.GRADIENT_NOT_FINITE,
        Reason.NO_PROGRESS,
        Reason.LOSS_AT_FLOOR,
        Reason.RULE_NOT_FINITE,
    }
)

# Looking a member up in its enumeration takes longer than the rule (Python 3.11).
_RULE, _MAXIMUM = Reason.RULE, Reason.MAXIMUM


class Observation(NamedTuple):
    """What one training step told the controller.

    Example:
        >>> Observation(learning_rate=(0.1,), variance_trace=(900.0,), loss=1.5).loss
        1.5
    """

    learning_rate: tuple[float, ...]
    """One for all parameters, or one per parameter group."""
    variance_trace: tuple[float, ...] | None
    """One per parameter group; None at a step without a measurement."""
    loss: float
    """Mean loss of the batch."""
    expected_gradient_norm_squared: float | None = None
    """That of all parameters, unbiased; None unless the rule needs it."""
    seconds: float | None = None
    """What the step took; None where nobody timed it."""
    examples: int | None = None
    """How many examples it was, if it was timed."""


class State(NamedTuple):
    """All that a controller remembers between two steps.

    Example:
        >>> initial_state(Configuration(16)).batch_size
        16
    """

    step: int
    """How many observations there have been."""
    held: int
    """At how many of them the batch size was held."""
    age: int
    """How many observations ago the variance was measured, that one included."""
    batch_size: int
    """Size of the next batch."""
    learning_rate_factor: float
    """That of the last decision."""
    averages: Averages
    curve: Curve = ()
    """The loss over all steps, if the rule needs it."""
    clock: Clock = Clock()
    """What steps took, if the rule needs it."""


class Decision(NamedTuple):
    """What the controller decided at one step, and why.

    Example:
        >>> _, decision = decide(
        ...     Configuration(16),
        ...     initial_state(Configuration(16)),
        ...     Observation(learning_rate=(0.1,), variance_trace=(900.0,), loss=1.5),
        ... )
        >>> decision.raw, decision.batch_size, decision.held
        (60.0, 60, False)
    """

    step: int
    """Counted from 0."""
    batch_size: int
    """Size of the next batch, in examples."""
    raw: float | None
    """The rule's value, in examples, before it was moved to an allowed size; None if held."""
    average_variance_trace: float | None
    """The averaged trace, summed over parameter groups; None before the first measurement."""
    average_loss: float | None
    """The averaged loss; None before the first."""
    reason: Reason
    """Why this size."""
    learning_rate_factor: float
    """Multiply the learning rate by this, and the rule asks for the size chosen.

    Below 1 where it asks for more than the largest size, and its value depends on the rate: chosen
    size over raw value for the paper's. A held decision keeps the last. Go on reporting the
    learning rate without it.
    """
    observation: Observation
    """What was decided upon."""

    @property
    def held(self) -> bool:
        """Whether the batch size was held for want of a value of the rule."""
        return self.reason in _HELD


def initial_state(configuration: Configuration) -> State:
    """Return the state before the first observation.

    Example:
        >>> initial_state(Configuration(16)).step
        0
    """
    # The published averages start at a variance of 0 and a loss of 1; the debiased ones at none.
    return State(
        step=0,
        held=0,
        age=configuration.every,
        batch_size=configuration.batch_size,
        learning_rate_factor=1.0,
        averages=Averages((), 0.0, 0.0 if configuration.debias else 1.0, 0.0, 0.0, 0.0),
    )


def is_due(configuration: Configuration, state: State) -> bool:
    """Return whether the next observation must hold the variance."""
    return state.age >= configuration.every


def decide(
    configuration: Configuration, state: State, observation: Observation
) -> tuple[State, Decision]:
    """Return the state after the observation, and the decision.

    Raises:
        ValueError: If a learning rate is negative, the numbers of parameter groups do not fit, or
            the variance is missing where it is due.

    Example:
        >>> configuration = Configuration(16, every=2)
        >>> state = initial_state(configuration)
        >>> for trace in ((900.0,), None):
        ...     observation = Observation((0.1,), trace, loss=1.5)
        ...     state, decision = decide(configuration, state, observation)
        >>> state.step, decision.batch_size
        (2, 60)
    """
    rates, traces, loss, _, seconds, examples = observation
    _check(configuration, state, observation)
    rule = configuration.rule
    average = _debiased if configuration.debias else _published
    averages, curve = average(configuration, state.averages, observation), state.curve
    if rule.needs_curve and math.isfinite(loss):
        curve = extended(curve, loss)
    batch_size, factor, clock = state.batch_size, state.learning_rate_factor, state.clock
    # Only steps that measure the variance are timed; the others are faster.
    if rule.needs_clock and traces is not None and seconds is not None and examples is not None:
        clock = timed(clock, examples, seconds)
    overhead = clock.cost.overhead if clock.cost else 0.0
    if configuration.single_precision:
        raw = _published_rule(rates, averages)
    else:
        before = max(state.step + 1 - state.held - steps_in(curve), 0) if curve else 0
        raw = rule.asked(rates, Known(averages, curve, before, batch_size, overhead))
    # A rate or trace that is not finite leaves the paper's rule without a finite value; others do
    # not look at everything.
    is_sound = type(rule) is CABS or _is_finite(observation)
    if raw is None or not is_sound or not math.isfinite(raw):
        reason = _why_held(configuration, observation, averages)
        if reason not in _WITHOUT_VALUE:
            averages, curve, raw = state.averages, state.curve, None
        elif raw is not None:
            raw = None if math.isnan(raw) else math.copysign(sys.float_info.max, raw)
    if raw is not None:
        if clock.steps and clock.explores and len(configuration.sizes) > 1:
            batch_size, reason = _explored(configuration, clock, batch_size, raw)
        else:
            batch_size, reason = _choose(configuration, batch_size, raw)
        is_capped = raw > configuration.sizes.maximum
        # What is tried for the clock is no reason to change the rate.
        chosen = configuration.sizes.maximum if reason is Reason.EXPLORING else batch_size
        factor = rule.rate_factor(chosen, raw, overhead) if is_capped else 1.0
        # Rounding is not to make it more than one, or nothing.
        factor = min(max(factor, sys.float_info.min), 1.0)
    measured = traces is not None and averages is not state.averages
    means = averages.variance_trace
    after = State(
        state.step + 1,
        state.held + (raw is None),
        1 if measured else state.age + 1,
        batch_size,
        factor,
        averages,
        curve,
        clock,
    )
    decision = Decision(
        state.step,
        batch_size,
        raw,
        (means[0] if len(means) == 1 else sum(means)) if means else None,
        averages.loss if averages.loss_weight else None,
        reason,
        factor,
        observation,
    )
    return after, decision


# Where the observation was taken in, and the rule has no value.
_WITHOUT_VALUE = (Reason.LOSS_AT_FLOOR, Reason.NO_PROGRESS, Reason.RULE_NOT_FINITE)


def _check(configuration: Configuration, state: State, observation: Observation) -> None:
    """Raise ValueError if an observation does not fit the state."""
    rates, traces, _, square = observation[:4]
    known = state.averages.variance_trace
    if (square is None) != (traces is None or not configuration.rule.needs_gradient):
        raise ValueError(
            "expected_gradient_norm_squared must be given with the variance where the rule needs "
            f"it, and only there, got {square} for {configuration.rule}; give what an adapter "
            "returned, or both numbers"
        )
    if observation.seconds is not None or observation.examples is not None:
        _check_timing(observation.seconds, observation.examples)
    for rate in rates:
        if rate < 0.0:
            raise ValueError(f"learning_rate must be at least 0, got learning_rate = {rate}")
    if traces is None:
        if is_due(configuration, state):
            raise ValueError(
                f"variance_trace is missing at step {state.step}, where the controller is due a "
                "measurement; pass it whenever controller.due is true"
            )
        traces = known
    elif known and len(traces) != len(known):
        raise ValueError(
            f"variance_trace must have one number per parameter group, {len(known)} "
            f"as in the steps before, got {len(traces)}; use a new controller for new groups"
        )
    if len(rates) != 1 and len(rates) != len(traces):
        raise ValueError(
            f"learning_rate must be one number or one per parameter group, got {len(rates)} "
            f"learning rates for {len(traces)} traces"
        )


def _check_timing(seconds: float | None, examples: int | None) -> None:
    if seconds is None or examples is None or examples < 1:
        raise ValueError(f"seconds must be of a number of examples, got examples = {examples}")
    if seconds < 0.0:
        raise ValueError(f"seconds must be at least 0, got seconds = {seconds}")


def _is_finite(observation: Observation) -> bool:
    rates, traces, loss, square = observation[:4]
    return all(map(math.isfinite, (*rates, *(traces or ()), loss, square or 0.0)))


def _why_held(configuration: Configuration, observation: Observation, averages: Averages) -> Reason:
    """Return why the averages, with the observation in them, give the rule no finite value."""
    rates, traces, loss, square = observation[:4]
    if not (math.isfinite(loss) and math.isfinite(averages.loss)):
        return Reason.LOSS_NOT_FINITE
    if not all(map(math.isfinite, rates)):
        return Reason.LEARNING_RATE_NOT_FINITE
    if not all(map(math.isfinite, (*(traces or ()), *averages.variance_trace))):
        return Reason.VARIANCE_NOT_FINITE
    if not (math.isfinite(square or 0.0) and math.isfinite(averages.gradient_square)):
        return Reason.GRADIENT_NOT_FINITE
    rule = configuration.rule
    is_at_floor = averages.loss <= getattr(rule, "loss_floor", -math.inf)
    return Reason(rule.held_reason) if is_at_floor else Reason.RULE_NOT_FINITE


def _debiased(
    configuration: Configuration, averages: Averages, observation: Observation
) -> Averages:
    """Return the debiased averages with the observation in them."""
    smoothing = configuration.smoothing
    means, weight, loss, loss_weight, square, square_weight = averages
    _, values, observed, measured = observation[:4]
    loss_weight = debiased_weight(loss_weight, smoothing)
    if values is not None:
        weight = debiased_weight(weight, smoothing)
        if len(values) == 1:  # the same without the machinery, in a third of the time
            means = (debiased_step(means[0] if means else 0.0, values[0], weight),)
        else:
            means = tuple(map(debiased_step, means or repeat(0.0), values, repeat(weight)))
    if measured is not None:
        square_weight = debiased_weight(square_weight, 1.0 - (1.0 - smoothing) / LONGER)
        square = debiased_step(square, measured, square_weight)
    loss = debiased_step(loss, observed, loss_weight)
    return Averages(means, weight, loss, loss_weight, square, square_weight)


def _published(
    configuration: Configuration, averages: Averages, observation: Observation
) -> Averages:
    """Return the averages of the authors' code with the observation in them."""
    number: Callable[[float], Any] = np.float32 if configuration.single_precision else np.float64
    smoothing = number(configuration.smoothing)

    def step(mean: float, value: float) -> float:
        return float(smoothing * number(mean) + (number(1.0) - smoothing) * number(value))

    means, weight, values = *averages[:2], observation.variance_trace
    square, square_weight, measured = *averages[4:], observation.expected_gradient_norm_squared
    with np.errstate(all="ignore"):
        if values is not None:
            means, weight = tuple(map(step, means or repeat(0.0), values)), 1.0
        if measured is not None:
            square, square_weight = step(square, measured), 1.0
        loss = step(averages.loss, observation.loss)
        return Averages(means, weight, loss, 1.0, square, square_weight)


def _published_rule(rates: tuple[float, ...], averages: Averages) -> float | None:
    """Return the rule's value in the precision and order of operations of the authors' code."""
    traces = averages.variance_trace
    if not 0.0 < averages.loss < math.inf:
        return None
    with np.errstate(all="ignore"):
        loss = np.float32(averages.loss)
        if len(rates) == 1:
            total = sum(map(np.float32, traces), np.float32(0.0))
            return float(np.float32(rates[0]) * (total / loss))
        pairs = zip(rates, traces, strict=True)
        terms = [np.float32(rate) * (np.float32(trace) / loss) for rate, trace in pairs]
        return float(sum(terms, np.float32(0.0)))


def _choose(configuration: Configuration, current: int, raw: float) -> tuple[int, Reason]:
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


def _explored(
    configuration: Configuration, clock: Clock, current: int, raw: float
) -> tuple[int, Reason]:
    """Return half of what is asked for, or four times as much, in turn.

    For Adam, in whose second moment the noise of small batches stays, nothing smaller than asked,
    but for a quarter of the largest size where more than that is asked for.
    """
    sizes, is_adaptive = configuration.sizes, getattr(configuration.rule, "adaptive", False)
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
