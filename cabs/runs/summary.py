"""What a run log holds, in a table of one screen.

Guarantees: reads the log once, from beginning to end, and keeps no decision; of the batch sizes it
keeps how often each was chosen.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from cabs.control.decision import Decision
from cabs.control.sizes import BatchSizes
from cabs.runs.replay import Replay, counted_examples

# More sizes than these are summed up.
_SIZES_SHOWN = 12


class Summary:
    """What is worth knowing of a run at a glance.

    Args:
        replay: The log, of which no decision has been read yet; all of them are.

    Raises:
        NotDecidedError: At the first line that is not what was decided.

    Example:
        >>> import tempfile, pathlib
        >>> from cabs import Controller, RunLog
        >>> path, controller = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl", Controller(16)
        >>> with RunLog(path, controller) as log:
        ...     log.write(controller.update(learning_rate=0.1, variance_trace=300.0, loss=1.0))
        >>> with Replay(path) as replay:
        ...     summary = Summary(replay)
        >>> dict(summary.rows())["batch size"]
        'smallest 30, median 30, largest 30, last 30'
    """

    def __init__(self, replay: Replay) -> None:
        self._sizes: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()
        self._names: set[str] = set()
        self._examples: int | float = 0
        self._counted = 0
        self._lowered = 0
        self._last: Decision | None = None
        self._loss = _Ends()
        self._trace = _Ends()
        for decision, measurements in replay:
            self._sizes[decision.batch_size] += 1
            self._reasons[decision.reason.value] += 1
            self._loss.add(decision.average_loss)
            self._trace.add(decision.average_variance_trace)
            self._lowered += decision.learning_rate_factor < 1.0
            self._names.update(measurements)
            count = counted_examples(measurements)
            if count is not None:
                self._examples += count
                self._counted += 1
            self._last = decision
        self._replay = replay

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the table: what each number is, and the number."""
        replay, configuration = self._replay, self._replay.configuration
        for field in dataclasses.fields(configuration):
            value = getattr(configuration, field.name)
            name = "first batch size" if field.name == "batch_size" else field.name
            yield name, _sizes_in_words(value) if isinstance(value, BatchSizes) else str(value)
        decisions = sum(self._sizes.values())
        yield "decisions", str(decisions)
        if self._last is not None:
            yield from self._rows_of_decisions(decisions, self._last)
        yield "last line", "cut off, and left out" if replay.cut_off else "whole"

    def _rows_of_decisions(self, decisions: int, last: Decision) -> Iterator[tuple[str, str]]:
        yield "steps", f"{self._replay.start.step} to {last.step}"
        if self._counted:
            of_them = "" if self._counted == decisions else f", in {self._counted} of the steps"
            yield "examples seen", f"{self._examples:.16g}{of_them}"
        sizes = sorted(self._sizes)
        yield (
            "batch size",
            f"smallest {sizes[0]}, median {_median(self._sizes):g}, largest {sizes[-1]}, "
            f"last {last.batch_size}",
        )
        for reason, count in self._reasons.most_common():
            yield f"reason: {reason}", f"{count} ({count / decisions:.1%})"
        yield "held", f"{self._replay.state.held - self._replay.start.held} of the steps"
        yield "averaged loss", str(self._loss)
        yield "averaged variance", str(self._trace)
        yield "learning rate lowered", f"{self._lowered / decisions:.1%} of the steps"
        others = sorted(self._names - {"examples"})
        if others:
            yield "other measurements", ", ".join(map(_name_in_words, others))

    def __str__(self) -> str:
        rows = list(self.rows())
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


class _Ends:
    """The first and the last of the numbers that there are."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._last: float | None = None

    def add(self, value: float | None) -> None:
        if value is not None:
            self._last = value
            if self._first is None:
                self._first = value

    def __str__(self) -> str:
        if self._first is None:
            return "none"
        return f"first {self._first:.6g}, last {self._last:.6g}"


def _median(counts: Counter[int]) -> float:
    """Return the median of numbers that are counted: of an even number of them, the middle."""
    lower, upper = (sum(counts.values()) - 1) // 2, sum(counts.values()) // 2
    seen, low = 0, None
    for size in sorted(counts):
        seen += counts[size]
        if low is None and seen > lower:
            low = size
        if low is not None and seen > upper:
            return (low + size) / 2
    raise ValueError("there is no median of no numbers")


def _sizes_in_words(sizes: BatchSizes) -> str:
    described = sizes.to_json()
    if isinstance(described, list) or len(sizes) <= 2:
        few = len(sizes) <= _SIZES_SHOWN
        ends = f"{len(sizes)} from {sizes.minimum} to {sizes.maximum}"
        return ", ".join(map(str, sizes)) if few else ends
    steps = "" if described["step"] == 1 else f" in steps of {described['step']}"
    return f"{sizes.minimum} to {sizes.maximum}{steps}"


def _name_in_words(name: str) -> str:
    """Return a name as it is, or with escapes where it would break the table."""
    return name if name.isprintable() and name.strip() else repr(name)
