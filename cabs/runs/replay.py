"""Reading a run log: every decision in it is made again, and compared with what it says.

Guarantees: a decision that is handed out is the one that follows from the log's settings and its
observations, to the bit; however long a log is, no more than one line of it is kept. Refuses a
file that is no log, and a log that is damaged anywhere but in a last line that lacks its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cabs.control.configuration import Configuration
from cabs.control.deciding import decide
from cabs.control.decision import Decision, State
from cabs.runs.records import read_header, read_record


class NotDecidedError(ValueError):
    """A line of a run log holds something else than what was decided.

    Example:
        >>> raise NotDecidedError("run.jsonl", 9, 7, differences={"batch_size": (90, 16)})
        Traceback (most recent call last):
        cabs.runs.replay.NotDecidedError: run.jsonl, line 9, is not what was decided: step 7
        is logged with batch_size = 90, recomputed 16
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        line: int,
        step: int,
        *,
        damage: str = "",
        differences: dict[str, tuple[Any, Any]] | None = None,
    ) -> None:
        self.path = path
        self.line = line
        """Counted from 1; the header is the first."""
        self.step = step
        """The step whose decision belongs there."""
        self.damage = damage
        """Why the line holds no decision; empty if it holds another one."""
        self.differences = differences or {}
        """What the log says and what follows, by the name of each field that differs."""
        words = ", ".join(
            f"{name} = {says}, recomputed {follows}"
            for name, (says, follows) in self.differences.items()
        )
        super().__init__(
            f"{path}, line {line}, is not what was decided: "
            + (damage or f"step {step} is logged with {words}")
        )


class Replay:
    """Reads a run log decision by decision, and makes each of them again.

    Iterating yields the rest of the decisions, each with the loop's own numbers by name.

    Args:
        path: The log.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no run log, or one of another version.
        NotDecidedError: While iterating, at the first line that is not what was decided.

    Example:
        >>> import tempfile, pathlib
        >>> from cabs import Controller, RunLog
        >>> path, controller = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl", Controller(16)
        >>> with RunLog(path, controller) as log:
        ...     for trace in (300.0, 500.0):
        ...         made = controller.update(learning_rate=0.1, variance_trace=trace, loss=1.0)
        ...         log.write(made, examples=16)
        >>> with Replay(path) as replay:
        ...     [decision.batch_size for decision, measurements in replay]
        [30, 40]
        >>> replay.state.step, replay.cut_off
        (2, False)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.fsdecode(path))
        # From large blocks a line takes two thirds of the time.
        self._file = open(self.path, "rb", buffering=1 << 16)  # noqa: SIM115
        try:
            header = self._file.readline()
            if not header.endswith(b"\n"):
                raise ValueError(f"{self.path} is no run log: it has no whole line")
            self.configuration, self.start = read_header(header, self.path)
        except BaseException:
            self.close()
            raise
        self.state = self.start
        """The controller's state after the last decision handed out."""
        self.left_out = 0
        """How many bytes of a last line there were that was cut off; known at the end."""

    @property
    def cut_off(self) -> bool:
        """Whether the last line was cut off, as when the run was killed; known at the end."""
        return self.left_out > 0

    @property
    def lines(self) -> int:
        """How many whole lines have been read."""
        return 1 + self.state.step - self.start.step

    @property
    def end(self) -> int:
        """The offset, in bytes, at which the last of them ends; only while the file is open."""
        return self._file.tell() - self.left_out

    def __iter__(self) -> Iterator[tuple[Decision, dict[str, int | float]]]:
        configuration, state = self.configuration, self.state
        # After a line that is not whole there is nothing, though the run may be writing it now.
        for line in () if self.cut_off else self._file:
            if not line.endswith(b"\n"):
                self.left_out = len(line)
                return
            try:
                decision, measurements = read_record(line)
                state, again = decide(configuration, state, decision.observation)
            except ValueError as error:
                raise NotDecidedError(
                    self.path, self.lines + 1, self.state.step, damage=str(error)
                ) from error
            if again != decision:
                raise NotDecidedError(
                    self.path,
                    self.lines + 1,
                    self.state.step,
                    differences=_differences(decision, again),
                )
            self.state = state
            yield again, measurements

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _differences(decision: Decision, again: Decision) -> dict[str, tuple[Any, Any]]:
    pairs = zip(Decision._fields, decision, again, strict=True)
    return {name: (says, follows) for name, says, follows in pairs if says != follows}


@dataclass(frozen=True, slots=True)
class Run:
    """What a run log holds.

    Example:
        >>> from cabs.control.decision import initial_state
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
        >>> from cabs import Controller, RunLog
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> RunLog(path, Controller(16)).close()
        >>> read_run(path).decisions
        []
    """
    decisions, measurements = [], []
    with Replay(path) as replay:
        for decision, numbers in replay:
            decisions.append(decision)
            measurements.append(numbers)
    return Run(replay.configuration, replay.start, decisions, measurements, replay.cut_off)


def counted_examples(measurements: dict[str, int | float]) -> int | float | None:
    """Return how many examples a batch had, as the loop wrote it; None for no count of any batch.

    Example:
        >>> counted_examples({"examples": 16}), counted_examples({"examples": float("nan")})
        (16, None)
    """
    count = measurements.get("examples")
    return count if count is not None and 0 <= count <= 2**53 else None
