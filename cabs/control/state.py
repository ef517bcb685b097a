"""A controller's settings and state as plain values, and back.

Guarantees: what was written reads back equal to the bit, through JSON too; what was not written by
a controller is refused with the reason, never misread.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from typing import Any

from cabs.control.averages import LONGER, Averages
from cabs.control.configuration import Configuration
from cabs.control.costs import LONGEST, SHORTEST, Clock, StepCost
from cabs.control.curve import is_filled, steps_in
from cabs.control.decision import State, is_due
from cabs.values.formats import check_mark, check_whole

_FORMAT = "cabs.control.controller"
_VERSION = 1


def write_state(configuration: Configuration, state: State) -> dict[str, Any]:
    """Return settings and state as plain values that JSON can hold."""
    values = {**state._asdict(), **state.averages._asdict()}
    del values["averages"]
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "configuration": configuration.to_json(),
        "state": {
            **values,
            "variance_trace": list(state.averages.variance_trace),
            "curve": [list(bucket) for bucket in state.curve],
            "clock": {
                "timings": [[list(one) for one in group] for group in state.clock.timings],
                "recent": [list(one) for one in state.clock.recent],
                "steps": state.clock.steps,
                "cost": state.clock.cost and list(state.clock.cost),
                "explores": state.clock.explores,
            },
        },
    }


def fingerprint_of(configuration: Configuration, state: State) -> int:
    """Return a hash of settings and state below 2**20, alike on every machine.

    So small that sums of its squares over thousands of ranks are exact in float64.
    """
    text = json.dumps(write_state(configuration, state), sort_keys=True)
    return zlib.crc32(text.encode()) >> 12


def read_state(state_dict: Any) -> tuple[Configuration, State]:
    """Return what a controller's state dictionary holds; ValueError if it is none."""
    check_mark(state_dict, "this", "state of a controller", _FORMAT, _VERSION)
    check_whole(state_dict, ("format", "version", "configuration", "state"))
    configuration = Configuration.from_json(state_dict["configuration"])
    values = state_dict["state"]
    try:
        if not isinstance(values, dict) or set(values) != _KINDS.keys():
            holds = sorted(map(str, values)) if isinstance(values, dict) else repr(values)[:80]
            raise ValueError(f"it holds {holds}, expected {sorted(_KINDS)}")
        for name, is_sound in _KINDS.items():
            if not is_sound(values[name]):
                raise ValueError(f"it has {name} = {values[name]!r}")
        averages = Averages(
            tuple(map(float, values["variance_trace"])),
            *(float(values[name]) for name in Averages._fields[1:]),
        )
        plain = {name: values[name] for name in State._fields if name != "averages"}
        plain["learning_rate_factor"] = float(plain["learning_rate_factor"])
        plain["curve"] = tuple((length, float(mean)) for length, mean in plain["curve"])
        plain["clock"] = _read_clock(plain["clock"])
        state = State(**plain, averages=averages)
        if state.batch_size not in configuration.sizes:
            raise ValueError(f"it has batch_size = {state.batch_size}, which its sizes exclude")
        most = (1.0 + 1e-9) / (1.0 - configuration.smoothing)
        if state.held > state.step or state.age < 1:
            raise ValueError("its counts contradict each other")
        if not averages.variance_weight <= averages.loss_weight <= most:
            raise ValueError("its averages weigh more than they can")
        if steps_in(state.curve) > state.step or (
            state.curve and not configuration.rule.needs_curve
        ):
            raise ValueError("its curve is not that of its steps")
        if state.clock.steps > state.step or (
            state.clock.steps and not configuration.rule.needs_clock
        ):
            raise ValueError("its clock is not that of its steps")
        rule, due = configuration.rule, is_due(configuration, state)
        if averages.gradient_weight > (LONGER * most if rule.needs_gradient else 0.0):
            raise ValueError("its gradient weighs more than it can")
        measured = bool(averages.variance_trace)
        weighted = averages.variance_weight > 0.0
        unseen = averages.loss_weight == 0.0 and state.step > state.held
        is_whole = measured and (averages.gradient_weight > 0.0 or not rule.needs_gradient)
        if measured != weighted or unseen or not (is_whole or due):
            raise ValueError("its averages and their weights contradict each other")
    except (TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ValueError(f"this state is damaged: {error}") from error
    return configuration, state


def carry_over(before: Configuration, state: State, after: Configuration) -> State:
    """Return a state under other settings; ValueError if its averages mean nothing under them."""
    kept = {name: getattr(before, name) for name in ("smoothing", "debias", "single_precision")}
    unlike = dataclasses.replace(after, **kept).difference(after)
    if unlike:
        raise ValueError(
            f"the averages of this state are of another kind: {unlike}; these settings cannot "
            "change within a run"
        )
    averages, curve, rule = state.averages, state.curve, after.rule
    if bool(before.rule.in_metric) != bool(rule.in_metric):
        # Norms in another metric, which mean nothing here.
        averages = averages._replace(
            variance_trace=(), variance_weight=0.0, gradient_square=0.0, gradient_weight=0.0
        )
    if not rule.needs_curve:
        curve = ()
    clock = state.clock if rule.needs_clock else Clock()
    if not rule.needs_gradient:
        averages = averages._replace(gradient_square=0.0, gradient_weight=0.0)
    is_whole = averages.gradient_weight > 0.0 or not rule.needs_gradient
    # Where something was not measured yet, a measurement stays due.
    is_measured = is_whole and averages.variance_trace
    age = state.age if is_measured else max(state.age, after.every)
    size = after.sizes.nearest(state.batch_size)
    return state._replace(batch_size=size, age=age, averages=averages, curve=curve, clock=clock)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_weight(value: Any) -> bool:
    return _is_finite(value) and value >= 0.0


def _is_curve(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(
            isinstance(one, list) and len(one) == 2 and _is_count(one[0]) and _is_finite(one[1])
            for one in value
        )
        and is_filled([length for length, _ in value])
    )


def _read_clock(values: dict[str, Any]) -> Clock:
    """Return the clock; ValueError if it is none."""
    timings, recent, cost = values["timings"], values["recent"], values["cost"]
    is_sound = (
        isinstance(timings, list)
        and all(one and _is_timings(one) for one in timings)
        and _is_timings(recent)
        and _is_count(values["steps"])
        and type(values["explores"]) is bool
        and (cost is None or _is_cost(cost))
    )
    if not is_sound:
        raise ValueError(f"it has clock = {values!r}")
    return Clock(
        tuple(map(_timings, timings)),
        _timings(recent),
        values["steps"],
        None if cost is None else StepCost(*map(float, cost)),
        values["explores"],
    )


def _is_timings(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(one, list)
        and len(one) == 2
        and _is_count(one[0])
        and one[0] > 0
        and _is_finite(one[1])
        and SHORTEST <= one[1] <= LONGEST
        for one in values
    )


def _timings(values: list[list[Any]]) -> tuple[tuple[int, float], ...]:
    return tuple((examples, float(seconds)) for examples, seconds in values)


def _is_cost(values: Any) -> bool:
    is_whole = isinstance(values, list) and len(values) == len(StepCost._fields)
    return is_whole and all(map(_is_weight, values)) and values[1] > 0.0


# What each value of a state must be.
_KINDS: dict[str, Any] = {
    "step": _is_count,
    "held": _is_count,
    "age": _is_count,
    "batch_size": _is_count,
    "learning_rate_factor": lambda value: _is_finite(value) and 0.0 < value <= 1.0,
    "variance_trace": lambda value: isinstance(value, list) and all(map(_is_finite, value)),
    "variance_weight": _is_weight,
    "loss": _is_finite,
    "loss_weight": _is_weight,
    "gradient_square": _is_finite,
    "gradient_weight": _is_weight,
    "curve": _is_curve,
    "clock": lambda value: isinstance(value, dict) and value.keys() == {*Clock._fields},
}
