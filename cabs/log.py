"""The run log: one JSON line a decision, after a header with the settings.

Guarantees: every line is handed to the operating system before ``write`` returns, so a killed run
loses at most the line being written; a log is one unbroken sequence of decisions, also after the
run was resumed from a checkpoint; what is read equals what was decided, to the bit. Refuses to
read a log of another format or version, or one damaged anywhere but in its last line.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from cabs.checkpoint import read_state
from cabs.configuration import Configuration
from cabs.controller import Controller
from cabs.decision import Decision, Observation, Reason, State
from cabs.scalars import Scalar, as_float

_FORMAT = "cabs.run_log"
_VERSION = 1


class RunLog:
    """Writes the decisions of a controller to a file, as they are made.

    Args:
        path: The file, by custom with the ending ``.jsonl``.
        controller: The controller whose decisions will be written, in the state in which it makes
            the first of them.
        mode: ``"x"`` makes a new file and refuses to touch one that exists, ``"w"`` replaces it,
            ``"a"`` goes on with the log of a run that was resumed: decisions in it from the
            controller's step on, and a line that was cut off, are dropped, since the run makes them
            again.

    Raises:
        FileExistsError: In mode ``"x"``, if the file exists.
        ValueError: In mode ``"a"``, if the file is no run log, belongs to other settings, or
            stops before the controller's step.

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
        self.path = Path(path)
        self._step = controller.step
        resumed = mode == "a" and self.path.exists()
        if resumed:
            keep = _length_before(self.path, controller)
            os.truncate(self.path, keep)
        # Unbuffered: one write a line reaches the operating system whole or is the last.
        self._file = open(self.path, "ab" if resumed else f"{mode}b", buffering=0)  # noqa: SIM115
        if not resumed:
            header = {"format": _FORMAT, "version": _VERSION, "start": controller.state_dict()}
            self._append(header)

    def write(self, decision: Decision, **measurements: Scalar) -> None:
        """Write one decision, with any numbers that the loop has at hand.

        Args:
            decision: What ``controller.update`` returned.
            measurements: Numbers by name. ``examples``, the size of the batch just trained on,
                gives plots their axis.

        Raises:
            ValueError: If the decision is not the next one of the run.
        """
        if decision.step != self._step:
            raise ValueError(
                f"the next decision to be written is that of step {self._step}, got step "
                f"{decision.step}; write each decision once"
            )
        observation = decision.observation
        self._append(
            {
                "step": decision.step,
                "learning_rate": _plain(observation.learning_rate),
                "variance_trace": _plain(observation.variance_trace),
                "loss": _number(observation.loss),
                "batch_size": decision.batch_size,
                "raw": decision.raw,
                "average_variance_trace": decision.variance_trace,
                "average_loss": decision.loss,
                "reason": decision.reason.value,
                "learning_rate_factor": decision.learning_rate_factor,
                "measurements": {
                    name: value if type(value) is int else _number(as_float(value, name))
                    for name, value in measurements.items()
                },
            }
        )
        self._step += 1

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes were written to {self.path}")

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
    """What a run log holds."""

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
    """Read a run log.

    Raises:
        ValueError: If the file is no run log, is of another version, or is damaged before its last
            line; the message names the line.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[Run, list[int]]:
    """Return the run, and the offset in bytes at which each of its lines ends, header first."""
    lines = path.read_bytes().split(b"\n")
    cut_off = lines.pop() != b""
    if not lines:
        raise ValueError(f"{path} is no run log: it has no whole line")
    configuration, start = _read_header(path, lines[0])
    decisions: list[Decision] = []
    measurements = []
    ends = [len(lines[0]) + 1]
    for number, line in enumerate(lines[1:], start=2):
        try:
            decision, numbers = _read_record(json.loads(line))
            if decision.step != start.step + len(decisions):
                raise ValueError(f"it has step {decision.step}")
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}, is no decision of this run: {error}"
            ) from error
        decisions.append(decision)
        measurements.append(numbers)
        ends.append(ends[-1] + len(line) + 1)
    return Run(configuration, start, decisions, measurements, cut_off), ends


def _read_header(path: Path, line: bytes) -> tuple[Configuration, State]:
    try:
        header = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} is no run log: its first line is no JSON") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"{path} is no run log: its first line is {line[:80]!r}")
    if header.get("version") != _VERSION:
        raise ValueError(
            f"{path} is a run log of version {header.get('version')!r}, expected {_VERSION}; read "
            "it with the release of cabs that wrote it"
        )
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
        variance_trace=_float_or_none(record["average_variance_trace"]),
        loss=_float_or_none(record["average_loss"]),
        reason=Reason(record["reason"]),
        learning_rate_factor=_float(record["learning_rate_factor"]),
        observation=Observation(rates, traces, loss),
    )
    numbers = record["measurements"].items()
    return decision, {
        name: value if type(value) is int else _float(value) for name, value in numbers
    }


def _length_before(path: Path, controller: Controller) -> int:
    """Return how many bytes of a log hold what came before the controller's step."""
    run, ends = _read(path)
    if run.configuration != controller.configuration:
        raise ValueError(
            f"{path} is the log of a run with other settings: "
            f"{controller.configuration.difference(run.configuration)}"
        )
    known = controller.step - run.start.step
    if not 0 <= known <= len(run.decisions):
        raise ValueError(
            f"{path} holds the decisions of steps {run.start.step} to "
            f"{run.start.step + len(run.decisions) - 1}, and the controller is at step "
            f"{controller.step}; write to a new file"
        )
    return ends[known]


# JSON has no infinities and no NaN; they are written as these words.
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0.0 else "-Infinity")


def _plain(values: tuple[float, ...] | None) -> Any:
    """Return one number as itself and several as a list."""
    if values is None:
        return None
    return _number(values[0]) if len(values) == 1 else [_number(value) for value in values]


def _float(value: Any) -> float:
    if isinstance(value, str):
        return _WORDS[value]
    if type(value) not in (int, float):
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
