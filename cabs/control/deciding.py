"""The decision as a pure function: configuration, state, observation -> new state, decision.

Guarantees: the same inputs give the same outputs to the bit, for the paper's rule on any machine
with IEEE arithmetic, for others where the logarithms of the C library are the same; no value that
is not finite reaches an average; an observation that does not fit raises before anything has
changed.
"""

from __future__ import annotations

import math
import sys
from itertools import repeat

from cabs.control import published
from cabs.control.averages import LONGER, Averages, debiased_step, debiased_weight
from cabs.control.choice import explored, nearest
from cabs.control.configuration import Configuration
from cabs.control.costs import timed
from cabs.control.curve import extended, steps_in
from cabs.control.decision import Decision, Observation, State, is_due
from cabs.control.reasons import Reason
from cabs.control.rules import CABS, Known


def decide(
    configuration: Configuration, state: State, observation: Observation
) -> tuple[State, Decision]:
    """Return the state after the observation, and the decision.

    Raises:
        ValueError: If a learning rate is negative, the numbers of parameter groups do not fit, or
            the variance is missing where it is due.

    Example:
        >>> from cabs.control import initial_state
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
    average = _debiased if configuration.debias else published.averaged
    averages, curve = average(configuration, state.averages, observation), state.curve
    if rule.needs_curve and math.isfinite(loss):
        curve = extended(curve, loss)
    batch_size, factor, clock = state.batch_size, state.learning_rate_factor, state.clock
    # Only steps that measure the variance are timed; the others are faster.
    if rule.needs_clock and traces is not None and seconds is not None and examples is not None:
        clock = timed(clock, examples, seconds)
    overhead = clock.cost.overhead if clock.cost else 0.0
    if configuration.single_precision:
        raw = published.rule(rates, averages)
    else:
        before = max(state.step + 1 - state.held - steps_in(curve), 0) if curve else 0
        raw = rule.asked(rates, Known(averages, curve, before, batch_size, overhead))
    # A rate or trace that is not finite leaves the paper's rule without a finite value; others do
    # not look at everything.
    is_sound = type(rule) is CABS or _is_finite(observation)
    value = None if isinstance(raw, Reason) else raw
    if value is None or not is_sound or not math.isfinite(value):
        reason = raw if isinstance(raw, Reason) else Reason.RULE_NOT_FINITE
        if left_out := _why_left_out(observation, averages):
            reason, averages, curve, value = left_out, state.averages, state.curve, None
        elif not isinstance(raw, Reason):
            value = None if math.isnan(raw) else math.copysign(sys.float_info.max, raw)
    if value is not None:
        if clock.steps and clock.explores and len(configuration.sizes) > 1:
            batch_size, reason = explored(configuration, clock, batch_size, value)
        else:
            batch_size, reason = nearest(configuration, batch_size, value)
        is_capped = value > configuration.sizes.maximum
        # What is tried for the clock is no reason to change the rate.
        chosen = configuration.sizes.maximum if reason is Reason.EXPLORING else batch_size
        factor = rule.rate_factor(chosen, value, overhead) if is_capped else 1.0
        # Rounding is not to make it more than one, or nothing.
        factor = min(max(factor, sys.float_info.min), 1.0)
    measured = traces is not None and averages is not state.averages
    means = averages.variance_trace
    after = State(
        state.step + 1,
        state.held + (value is None),
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
        value,
        (means[0] if len(means) == 1 else sum(means)) if means else None,
        averages.loss if averages.loss_weight else None,
        reason,
        factor,
        observation,
    )
    return after, decision


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
            f"learning rates for {len(traces)} traces; measure by the optimizer's groups too, as "
            "cabs_torch.backward(losses, optimizer=optimizer) does, or give one rate"
        )


def _check_timing(seconds: float | None, examples: int | None) -> None:
    if seconds is None or examples is None or examples < 1:
        raise ValueError(f"seconds must be of a number of examples, got examples = {examples}")
    if seconds < 0.0:
        raise ValueError(f"seconds must be at least 0, got seconds = {seconds}")


def _is_finite(observation: Observation) -> bool:
    rates, traces, loss, square = observation[:4]
    return all(map(math.isfinite, (*rates, *(traces or ()), loss, square or 0.0)))


def _why_left_out(observation: Observation, averages: Averages) -> Reason | None:
    """Return why the averages must not have the observation in them, None if they may."""
    rates, traces, loss, square = observation[:4]
    if not (math.isfinite(loss) and math.isfinite(averages.loss)):
        return Reason.LOSS_NOT_FINITE
    if not all(map(math.isfinite, rates)):
        return Reason.LEARNING_RATE_NOT_FINITE
    if not all(map(math.isfinite, (*(traces or ()), *averages.variance_trace))):
        return Reason.VARIANCE_NOT_FINITE
    if not (math.isfinite(square or 0.0) and math.isfinite(averages.gradient_square)):
        return Reason.GRADIENT_NOT_FINITE
    return None


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
