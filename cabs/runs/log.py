"""Writing a run log: one JSON line a decision, after a header with the settings.

Guarantees: every line is handed to the operating system before ``write`` returns, so a killed run
loses at most the line being written; a log is one unbroken sequence of decisions, also after the
run was resumed from a checkpoint. Refuses to write what does not follow from what the log holds.
"""

from __future__ import annotations

import os
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Literal, Self

from cabs.control.controller import Controller
from cabs.control.deciding import decide
from cabs.control.decision import Decision, State
from cabs.control.state import read_state
from cabs.runs.records import is_begun_header, write_header, write_record
from cabs.runs.replay import Replay
from cabs.values.scalars import Scalar


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
        >>> from cabs import read_run
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
        # How many decisions the log holds, until the first one says where it goes on.
        self._known: int | None = None
        if mode == "a" and not _is_only_begun(self.path):
            with Replay(self.path) as replay:
                self._known = sum(1 for _ in replay)
                self._end = replay.end + replay.left_out
            if replay.configuration != self._configuration:
                raise ValueError(
                    f"{self.path} is the log of a run with other settings: "
                    f"{self._configuration.difference(replay.configuration)}"
                )
            # Unbuffered: one write a line reaches the operating system whole or is the last.
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        else:
            self._file = open(self.path, "xb" if mode == "x" else "wb", buffering=0)  # noqa: SIM115
            try:
                self._end = _append(self._file, write_header(start))
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
        line = write_record(decision, measurements)
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

    def _go_on(self, known: int, decision: Decision) -> None:
        """Set aside what the log holds from a decision on, which must follow from the rest."""
        # Read again up to there, since the states in between would take more than the log itself.
        with Replay(self.path) as replay:
            before = decision.step - replay.start.step
            if not 0 <= before <= known:
                raise ValueError(
                    f"{self.path} holds {known} decisions from step {replay.start.step} on, and "
                    f"cannot go on with step {decision.step}; write to a new file"
                )
            for _ in islice(replay, before):
                pass
            state, end = replay.state, replay.end
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

    def __exit__(self, *_: object) -> None:
        self.close()


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


def _is_only_begun(path: Path) -> bool:
    """Return whether a file is missing, empty, or holds nothing but the beginning of a header."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return True
    return not line or is_begun_header(line)
