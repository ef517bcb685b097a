"""The run log: one JSON line a decision, after a header with the settings.

Guarantees: every line is handed to the operating system before ``write`` returns, so a killed run
loses at most the line being written; a log is one unbroken sequence of decisions, also after the
run was resumed from a checkpoint; what is read is what was decided, to the bit, since every
decision is made again when it is read. Refuses to read a log of another format or version, or one
damaged anywhere but in a last line that lacks its end.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from io import FileIO
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from cabs.checkpoint import read_state
from cabs.configuration import Configuration
from cabs.controller import Controller
from cabs.decision import Decision, Observation, Reason, State, decide
from cabs.formats import check_mark
from cabs.scalars import Scalar, as_float

_FORMAT = "cabs.run_log"
_VERSION = 1


class RunLog:
    """Writes the decisions of a controller to a file, as they are made.

    Args:
        path: The file, by custom with the ending ``.jsonl``.
        controller: The controller whose decisions will be written; for a new file, in the state in
            which it makes the first of them.
        mode: ``"x"`` makes a new file and refuses to touch one that exists, ``"w"`` replaces it,
            ``"a"`` goes on with the log of a run that was resumed. When the first decision is then
            written, those in the log from its step on, which the run makes again, are moved to a
            file of the same name and ``.dropped``.

    Raises:
        FileExistsError: In mode ``"x"``, if the file exists.
        ValueError: In mode ``"a"``, if the file is no run log or belongs to other settings.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> controller = Controller(16)
        >>> with RunLog(path, controller) as log:
        ...     decision = controller.update(learning_rate=0.1, variance_trace=400.0, loss=1.0)
        ...     log.write(decision, examples=16)
        >>> run = read_run(path)
        >>> run.decisions[0] == decision, run.measurements[0]
        (True, {'examples': 16})
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        controller: Controller,
        *,
        mode: Literal["x", "w", "a"] = "x",
    ) -> None:
        if mode not in ("x", "w", "a"):
            raise ValueError(f"mode must be 'x', 'w' or 'a', got mode = {mode!r}")
        self.path = Path(os.fsdecode(path))
        start = controller.state_dict()
        self._configuration, state = read_state(start)
        content = self.path.read_bytes() if mode == "a" and self.path.exists() else b""
        # What the log holds, until the first decision says where it goes on.
        self._known: _Lines | None = None
        if content and not _is_begun_header(content):
            self._known = _parse(self.path, content)
            configuration = self._known.run.configuration
            if configuration != self._configuration:
                raise ValueError(
                    f"{self.path} is the log of a run with other settings: "
                    f"{self._configuration.difference(configuration)}"
                )
            # Unbuffered: one write a line reaches the operating system whole or is the last.
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
            self._end = len(content)
        else:
            self._file = open(self.path, "xb" if mode == "x" else "wb", buffering=0)  # noqa: SIM115
            header = {"format": _FORMAT, "version": _VERSION, "start": start}
            try:
                self._end = _append(self._file, _line(header))
            except OSError:
                self.close()
                self.path.unlink()
                raise
        # The state before the next decision.
        self._state = state

    def write(self, decision: Decision, /, **measurements: Scalar) -> None:
        """Write one decision, with any numbers that the loop has at hand.

        Args:
            decision: What ``controller.update`` returned.
            measurements: Numbers by name. ``examples``, the size of the batch just trained on,
                gives plots their axis.

        Raises:
            ValueError: If the decision is not the next one of the run.
            OSError: If the line could not be written, as on a full disk. It is taken back, and the
                decision can be written again.
        """
        observation = decision.observation
        line = _line(
            {
                "step": decision.step,
                "learning_rate": _plain(observation.learning_rate),
                "variance_trace": _plain(observation.variance_trace),
                "loss": _number(observation.loss),
                "batch_size": decision.batch_size,
                "raw": decision.raw,
                "average_variance_trace": decision.average_variance_trace,
                "average_loss": decision.average_loss,
                "reason": decision.reason.value,
                "learning_rate_factor": decision.learning_rate_factor,
                "measurements": {
                    name: _measurement(value, name) for name, value in measurements.items()
                },
            }
        )
        if self._file.seek(0, os.SEEK_END) != self._end:
            raise ValueError(f"{self.path} was changed by somebody else since this log was opened")
        if self._known is not None:
            self._go_on(self._known, decision)
        after = self._follow(self._state, decision)
        self._end = _append(self._file, line)
        self._state = after

    def _follow(self, state: State, decision: Decision) -> State:
        """Return the state after a decision, which must be what follows from the state before."""
        after, expected = decide(self._configuration, state, decision.observation)
        if decision != expected:
            raise ValueError(
                f"the decision of step {decision.step} does not follow from what {self.path} "
                f"holds, which goes on with step {state.step}; write each decision of one "
                "controller once, and after loading a state open its log again with mode='a'"
            )
        return after

    def _go_on(self, known: _Lines, decision: Decision) -> None:
        """Set aside what the log holds from a decision on, which must follow from the rest."""
        before = decision.step - known.run.start.step
        if not 0 <= before < len(known.states):
            raise ValueError(
                f"{self.path} holds {len(known.run.decisions)} decisions from step "
                f"{known.run.start.step} on, and cannot go on with step {decision.step}; write to "
                "a new file"
            )
        state, end = known.states[before], known.ends[before]
        self._follow(state, decision)
        self._file.seek(end)
        tail = self._file.readall()
        if tail:
            with open(f"{self.path}.dropped", "ab", buffering=0) as dropped:
                _append(dropped, tail if tail.endswith(b"\n") else tail + b"\n")
        self._end = self._file.truncate(end)
        self._state, self._known = state, None

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Run:
    """What a run log holds.

    Example:
        >>> from cabs.decision import initial_state
        >>> settings = Configuration(16)
        >>> Run(settings, initial_state(settings), [], [], cut_off=False).start.batch_size
        16
    """

    configuration: Configuration
    """The controller's settings."""
    start: State
    """The controller's state before the first decision."""
    decisions: list[Decision]
    """All decisions, in order."""
    measurements: list[dict[str, int | float]]
    """The loop's own numbers, one dictionary a decision."""
    cut_off: bool
    """Whether the last line was cut off, as when the run was killed; it is left out."""


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run log, and make every decision in it again.

    Raises:
        ValueError: If the file is no run log, is of another version, or holds anything that was not
            decided; the message names the line.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> RunLog(path, Controller(16)).close()
        >>> read_run(path).decisions
        []
    """
    path = Path(os.fsdecode(path))
    return _parse(path, path.read_bytes()).run


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _append(file: FileIO, line: bytes) -> int:
    """Write a line at the end of a file, or leave the file as it was; return its new length."""
    end = file.seek(0, os.SEEK_END)
    try:
        written = file.write(line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes were written to {file.name!r}")
    except OSError:
        file.truncate(end)
        raise
    return end + len(line)


class _Lines(NamedTuple):
    """What a log holds, with the state and the offset in bytes at which each line ends."""

    run: Run
    states: list[State]
    """Header first."""
    ends: list[int]
    """Header first."""


def _parse(path: Path, content: bytes) -> _Lines:
    lines = content.split(b"\n")
    cut_off = lines.pop() != b""
    if not lines:
        raise ValueError(f"{path} is no run log: it has no whole line")
    configuration, start = _read_header(path, lines[0])
    known = _Lines(Run(configuration, start, [], [], cut_off), [start], [len(lines[0]) + 1])
    for number, line in enumerate(lines[1:], start=2):
        try:
            decision, numbers = _read_record(_load(line))
            state, again = decide(configuration, known.states[-1], decision.observation)
            if again != decision:
                raise ValueError(f"expected {again}, got {decision}")
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, is not what was decided: {error}") from error
        known.run.decisions.append(decision)
        known.run.measurements.append(numbers)
        known.states.append(state)
        known.ends.append(known.ends[-1] + len(line) + 1)
    return known


def _is_begun_header(content: bytes) -> bool:
    """Return whether a file holds nothing but the beginning of a header."""
    opening = json.dumps({"format": _FORMAT})[:-1].encode()
    begun = len(content) >= 8 and content[: len(opening)] == opening[: len(content)]
    return begun and b"\n" not in content


def _load(line: bytes) -> Any:
    """Return what a line of JSON holds; ValueError for what is none, or says a thing twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("it names a value twice")
        return values

    try:
        return json.loads(line, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _read_header(path: Path, line: bytes) -> tuple[Configuration, State]:
    try:
        header = _load(line)
    except ValueError as error:
        raise ValueError(f"{path} is no run log: its first line is no JSON") from error
    check_mark(header, path, "run log", _FORMAT, _VERSION)
    try:
        return read_state(header.get("start"))
    except ValueError as error:
        raise ValueError(f"{path}, line 1: {error}") from error


def _read_record(record: dict[str, Any]) -> tuple[Decision, dict[str, int | float]]:
    """Return the decision that a line holds, and the loop's numbers beside it."""
    rates = _floats(record["learning_rate"])
    if rates is None:
        raise ValueError("it has no learning_rate")
    traces, loss = _floats(record["variance_trace"]), _float(record["loss"])
    decision = Decision(
        step=_int(record["step"]),
        batch_size=_int(record["batch_size"]),
        raw=_float_or_none(record["raw"]),
        average_variance_trace=_float_or_none(record["average_variance_trace"]),
        average_loss=_float_or_none(record["average_loss"]),
        reason=Reason(record["reason"]),
        learning_rate_factor=_float(record["learning_rate_factor"]),
        observation=Observation(rates, traces, loss),
    )
    numbers = record["measurements"].items()
    return decision, {
        name: value if type(value) is int else _float(value) for name, value in numbers
    }


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


def _float(value: Any) -> float:
    if isinstance(value, str):
        return _WORDS[value]
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _float_or_none(value: Any) -> float | None:
    return None if value is None else _float(value)


def _floats(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    return tuple(map(_float, value)) if isinstance(value, list) else (_float(value),)


def _int(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no integer")
    return value
