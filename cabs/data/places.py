"""How far a loop has come, which of that was trained on, and what a state needs of both.

Guarantees: a place is a value, so that whatever interrupts a loop finds it whole. The place of a
few batches ago can be restored; it keeps the sizes of the batches after it, which the uninterrupted
run has too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cabs.data.fetch import DrawnBatch

# How many of the last batches can be asked for by name; what takes ahead takes fewer.
_KEPT = 64


class Pace(NamedTuple):
    """How the controller's steps of a loop went with its batches."""

    first: int
    """The steps when the first batch was handed out."""
    last: int
    """When the last one was."""
    batches: int = 1
    """How many batches were handed out."""
    idle: int = 0
    """How many of them, after the first, before there was any step."""
    is_even: bool = True
    """Whether there was just one step between any two of the others."""

    def then(self, step: int) -> Pace:
        """Return the pace with one more batch, handed out at a step."""
        is_idle = step == self.last == self.first
        is_even = self.is_even and (is_idle or step == self.last + 1)
        return Pace(self.first, step, self.batches + 1, self.idle + is_idle, is_even)

    def ahead(self, step: int) -> int | None:
        """Return how many batches are taken ahead, seen at a step; None where nobody can tell."""
        steps = step - self.first
        if steps < 2 or not self.is_even or self.batches - steps != self.idle:
            return None
        return self.idle


class Place(NamedTuple):
    """How far a loop has come. All that a loader must not lose, replaced as a whole."""

    epoch: int
    position: int
    """How many examples of the epoch were handed out, over all ranks."""
    handed_out: int = 0
    """How many batches, since the loader was made or restored."""
    asked: tuple[tuple[int, int], ...] = ()
    """The sizes of the batches to come, with ``handed_out`` at the moment they were asked for."""
    is_drawn: bool = False
    """Whether these are all of the epoch."""
    last: tuple[DrawnBatch, ...] = ()
    """The last of the batches; the older, the less of what was drawn is kept."""
    of_loop: int = 0
    """How many batches this loop was given."""
    one_ahead: bool = False
    """Whether the last of them waits to be trained on."""
    pace: Pace | None = None

    @property
    def batch(self) -> DrawnBatch | None:
        """The batch handed out last."""
        return self.last[-1] if self.last else None

    def begun(self, *, one_ahead: bool) -> Place:
        """Return this place, at the beginning of a loop."""
        return self._replace(of_loop=0, one_ahead=one_ahead, pace=None)

    def given(self, batch: DrawnBatch, step: Any) -> Place:
        """Return the place after one more batch, handed out at a step of the controller."""
        kept = self.last[1 - _KEPT :]
        older, newer = kept[:-2], kept[-2:]
        # Examples of a stream can be large: only those are kept that somebody can ask for.
        whole = len(newer) - (1 if self.one_ahead and newer else 0)
        stripped = (one._replace(drawn=None) for one in newer[:whole])
        last = (*older, *stripped, *newer[whole:], batch)
        pace = None
        if type(step) is int:
            pace = Pace(step, step) if self.pace is None else self.pace.then(step)
        return self._replace(
            position=batch.start + batch.examples,
            handed_out=self.handed_out + 1,
            asked=self.asked[1:],
            last=last,
            of_loop=self.of_loop + 1,
            pace=pace,
        )

    def trained(self) -> Place:
        """Return the place after the last batch that was trained on."""
        # When the epoch has ended, all have been taken, and the last is at work.
        if self.one_ahead and self.of_loop and self.last[-1].epoch == self.epoch:
            return self._before(len(self.last) - 1)
        return self

    def after(self, batch: Any) -> Place:
        """Return the place after one of the last batches.

        Raises:
            TypeError: If it is no batch.
            ValueError: If it is none of the last ones.
        """
        if not isinstance(batch, DrawnBatch):
            raise TypeError(
                "after must be a cabs.data.DrawnBatch, what loader.batch was, got after = "
                f"{batch!r}"
            )
        places = [one[:3] for one in self.last]
        if batch[:3] not in places:
            raise ValueError(
                f"after must be one of the last {_KEPT} batches that this loader handed out, since "
                f"it was made or restored, got the one from position {batch.start} of epoch "
                f"{batch.epoch}; keep loader.batch when a batch is handed out"
            )
        index = places.index(batch[:3]) + 1
        return self if index == len(self.last) else self._before(index)

    def _before(self, index: int) -> Place:
        """Return the place before one of the last batches was handed out.

        The sizes of that one and of those after it are known, as far as they are of its epoch.
        """
        first, later = self.last[index], self.last[index:]
        handed_out = self.handed_out - len(later)
        is_running = first.epoch == self.epoch
        asked = [
            (one.asked, handed_out + number - one.lag)
            for number, one in enumerate(later)
            if one.epoch == first.epoch
        ]
        return self._replace(
            epoch=first.epoch,
            position=first.start,
            handed_out=handed_out,
            asked=(*asked, *(self.asked if is_running else ())),
            is_drawn=self.is_drawn or not is_running,
            last=self.last[:index],
        )

    def check_pace(self, step: Any) -> None:
        """Raise ValueError if the controller's steps deny what is known of batches taken ahead."""
        ahead = self.pace.ahead(step) if self.pace is not None and type(step) is int else None
        if ahead is None or bool(ahead) is self.one_ahead:
            return
        if self.one_ahead:
            raise ValueError(
                "one_ahead=True says that a batch is taken ahead, and each batch was handed out "
                "after the update of the one before it; leave one_ahead out"
            )
        raise ValueError(
            f"a state counts what was handed out, and {1 + ahead} batches were before this loop's "
            "first controller.update, and one more with each update since, as if whoever iterates "
            f"took {ahead} ahead, which nobody has trained on yet; make the loader with "
            "one_ahead=True if it takes one, with one_ahead=False if none is taken ahead, or save "
            "state_dict(after=batch), of the batch that was trained on"
        )


def are_sizes(value: Any) -> bool:
    """Return whether this is what a state holds of the sizes that were asked for."""
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and [type(number) for number in pair] == [int, int]
        and pair[0] >= 1
        # Asked for so many batches before the first of them; or later, and before its own.
        and pair[1] >= -number
        for number, pair in enumerate(value)
    )
