"""The lines of a run log: a header, or one decision and the loop's numbers, as JSON and back.

Guarantees: what was written reads back equal, to the bit; a line is read alike whether it is just
as it was written or was put in other words of JSON. Refuses, with the reason, what names a value
twice, lacks one, or holds one of another kind than was written.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from cabs.control.configuration import Configuration
from cabs.control.decision import Decision, Observation, State
from cabs.control.reasons import Reason
from cabs.control.state import read_state
from cabs.values.formats import check_mark
from cabs.values.scalars import Scalar, as_float

_FORMAT = "cabs.run_log"
_VERSION = 1


def write_header(start: dict[str, Any]) -> bytes:
    """Return the first line of a log that starts from a controller's state dictionary."""
    return _line({"format": _FORMAT, "version": _VERSION, "start": start})


def is_begun_header(line: bytes) -> bool:
    """Return whether a file's only line is the beginning of a header, and no whole line."""
    opening = json.dumps({"format": _FORMAT})[:-1].encode()
    begun = len(line) >= 8 and line[: len(opening)] == opening[: len(line)]
    return begun and b"\n" not in line


def read_header(line: bytes, subject: str | os.PathLike[str]) -> tuple[Configuration, State]:
    """Return what the first line of a log holds; ValueError, about ``subject``, if it is none."""
    try:
        header = _load(line)
    except ValueError as error:
        raise ValueError(f"{subject} is no run log: its first line is no JSON") from error
    check_mark(header, subject, "run log", _FORMAT, _VERSION)
    try:
        return read_state(header.get("start"))
    except ValueError as error:
        raise ValueError(f"{subject}, line 1: {error}") from error


def write_record(decision: Decision, measurements: Mapping[str, Scalar]) -> bytes:
    """Return the line of a decision; TypeError or ValueError for a measurement that is no number.

    Example:
        >>> from cabs import Controller
        >>> made = Controller(16).update(learning_rate=0.1, variance_trace=400.0, loss=1.0)
        >>> read_record(write_record(made, {"examples": 16})) == (made, {"examples": 16})
        True
    """
    observation = decision.observation
    average_variance_trace = decision.average_variance_trace
    return _line(
        {
            "step": decision.step,
            "learning_rate": _plain(observation.learning_rate),
            "variance_trace": _plain(observation.variance_trace),
            "loss": _number(observation.loss),
            "expected_gradient_norm_squared": (
                None if observation[3] is None else _number(observation[3])
            ),
            "seconds": None if observation.seconds is None else _number(observation.seconds),
            "timed_examples": observation.examples,
            "batch_size": decision.batch_size,
            "raw": decision.raw,
            # The sum over parameter groups can overflow, though each is finite.
            "average_variance_trace": (
                None if average_variance_trace is None else _number(average_variance_trace)
            ),
            "average_loss": decision.average_loss,
            "reason": decision.reason.value,
            "learning_rate_factor": decision.learning_rate_factor,
            "measurements": {
                name: _measurement(value, name) for name, value in measurements.items()
            },
        }
    )


def read_record(line: bytes) -> tuple[Decision, dict[str, int | float]]:
    """Return the decision that a line holds, and the loop's numbers beside it.

    Raises:
        ValueError: If the line is no decision; the message says why.
    """
    return _read_as_written(line) or _read_json(line)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


# JSON has no infinities and no NaN; they are written as these words.
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0.0 else "-Infinity")


def _measurement(value: Scalar, name: str) -> int | float | str:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return _number(as_float(value, name))


def _plain(values: tuple[float, ...] | None) -> Any:
    """Return one number as itself and several as a list."""
    if values is None:
        return None
    return _number(values[0]) if len(values) == 1 else [_number(value) for value in values]


# A line as json.dumps spaces it, with its values in the order of write_record, no word among its
# numbers and no comma in a name, and nothing large enough to be beyond the range of a float. What
# matches is JSON, and is read in half of the time that a parser of JSON and the checks of what it
# returns take; all else is left to these.
_NUMBER = r"-?(?!0[0-9])[0-9]{1,17}+(?:\.[0-9]++)?+(?:e[-+][0-9][0-9])?+"
_PAIR = rf'"[ !#-+\--\[\]-~]*+": {_NUMBER}'
_KINDS = {
    "integer": r"([1-9][0-9]*+|0)",
    "integer or none": r"([1-9][0-9]*+|0|null)",
    "number": rf"({_NUMBER})",
    "number or none": rf"({_NUMBER}|null)",
    "numbers": rf"({_NUMBER}|\[{_NUMBER}(?:, {_NUMBER})*\])",
    "numbers or none": rf"({_NUMBER}|null|\[{_NUMBER}(?:, {_NUMBER})*\])",
    "word": r'"([a-z ]++)"',
    "pairs": rf"\{{((?:{_PAIR}(?:, {_PAIR})*)?)\}}",
}
_AS_WRITTEN = {
    "step": "integer",
    "learning_rate": "numbers",
    "variance_trace": "numbers or none",
    "loss": "number",
    "expected_gradient_norm_squared": "number or none",
    "seconds": "number or none",
    "timed_examples": "integer or none",
    "batch_size": "integer",
    "raw": "number or none",
    "average_variance_trace": "number or none",
    "average_loss": "number or none",
    "reason": "word",
    "learning_rate_factor": "number",
    "measurements": "pairs",
}
_match = re.compile(
    ", ".join(f'"{name}": {_KINDS[kind]}' for name, kind in _AS_WRITTEN.items()).join(
        [r"\{", r"\}\n"]
    )
).fullmatch
_REASONS = {reason.value: reason for reason in Reason}
# Named tuples are made by a function in Python, which takes longer than all that it does.
_make = tuple.__new__


def _read_as_written(line: bytes) -> tuple[Decision, dict[str, int | float]] | None:
    """Return what a line holds that is just as it was written; None for any other."""
    try:
        found = _match(line.decode("ascii"))
        if found is None:
            return None
        step, rates, traces, loss, square, seconds, examples, size, *rest = found.groups()
        raw, trace, average, reason, factor, pairs = rest
        observation = _make(
            Observation,
            (
                (float(rates),) if rates[0] != "[" else _read_list(rates),
                (float(traces),) if traces[0] not in "[n" else _read_list(traces),
                float(loss),
                None if square == "null" else float(square),
                None if seconds == "null" else float(seconds),
                None if examples == "null" else int(examples),
            ),
        )
        decision = _make(
            Decision,
            (
                int(step),
                int(size),
                None if raw == "null" else float(raw),
                None if trace == "null" else float(trace),
                None if average == "null" else float(average),
                _REASONS[reason],
                float(factor),
                observation,
            ),
        )
    except (KeyError, ValueError):
        return None
    numbers: dict[str, int | float] = {}
    if pairs:
        written = pairs.split(", ")
        for pair in written:
            name, _, value = pair.rpartition(": ")
            numbers[name[1:-1]] = float(value) if "." in value or "e" in value else int(value)
        if len(numbers) != len(written):
            return None
    return decision, numbers


def _read_list(text: str) -> tuple[float, ...] | None:
    return None if text == "null" else tuple(map(float, text[1:-1].split(", ")))


def _read_json(line: bytes) -> tuple[Decision, dict[str, int | float]]:
    """Return what a line of JSON holds, in whatever order and spacing."""
    record = _load(line)
    if not isinstance(record, dict):
        raise ValueError(f"it is {_short(record)}, expected the names and values of a decision")
    missing = [name for name in _AS_WRITTEN if name not in record]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    reason, measurements = record["reason"], record["measurements"]
    if not isinstance(reason, str) or reason not in _REASONS:
        raise ValueError(f"it has reason = {_short(reason)}, which is none")
    if not isinstance(measurements, dict):
        raise ValueError(f"it has measurements = {_short(measurements)}, expected names and values")
    rates = _floats(record, "learning_rate")
    traces = None if record["variance_trace"] is None else _floats(record, "variance_trace")
    decision = Decision(
        step=_int(record, "step"),
        batch_size=_int(record, "batch_size"),
        raw=_float_or_none(record, "raw"),
        average_variance_trace=_float_or_none(record, "average_variance_trace"),
        average_loss=_float_or_none(record, "average_loss"),
        reason=_REASONS[reason],
        learning_rate_factor=_float(record["learning_rate_factor"], "learning_rate_factor"),
        observation=Observation(
            rates,
            traces,
            _float(record["loss"], "loss"),
            _float_or_none(record, "expected_gradient_norm_squared"),
            _float_or_none(record, "seconds"),
            None if record["timed_examples"] is None else _int(record, "timed_examples"),
        ),
    )
    return decision, {
        name: value if type(value) is int else _float(value, f"measurement {name!r}")
        for name, value in measurements.items()
    }


def _load(line: bytes) -> Any:
    """Return what a line of JSON holds; ValueError for what is none, or says a thing twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("it names a value twice")
        return values

    try:
        return json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg}, at character {error.pos + 1}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no JSON: byte {error.start + 1} is no UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _short(value: Any) -> str:
    """Return a value of JSON in so few characters that a message stays one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _float(value: Any, name: str) -> float:
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"it has {name} = {_short(value)}, which is no number that is written so")


def _float_or_none(record: dict[str, Any], name: str) -> float | None:
    return None if record[name] is None else _float(record[name], name)


def _floats(record: dict[str, Any], name: str) -> tuple[float, ...]:
    value = record[name]
    if not isinstance(value, list):
        return (_float(value, name),)
    if not value:
        raise ValueError(f"it has no {name} in the list of them")
    return tuple(_float(number, name) for number in value)


def _int(record: dict[str, Any], name: str) -> int:
    value = record[name]
    if type(value) is not int:
        raise ValueError(f"it has {name} = {_short(value)}, which is no integer")
    return value
