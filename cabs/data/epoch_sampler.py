"""Epochs that are cut into batches, one at a time, at the size asked for at that moment.

Guarantees: in every epoch each example is in exactly one batch, whatever the sizes do, except for
those left out by ``drop_last``; a sampler that goes on from a saved state draws what the first one
would have drawn. Knows nothing of what an example is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from cabs.values.formats import check_mark, check_whole
from cabs.values.scalars import as_bool, as_integer

Drawn = TypeVar("Drawn")

_VERSION = 1
# More than anybody counts, and little enough for every seed that is made of it.
_MOST = 2**53


class HasBatchSize(Protocol):
    """Anything that says the size of the next batch, as a controller does."""

    @property
    def batch_size(self) -> int:
        """Size of the next batch, in examples."""
        ...


class EpochSampler(ABC, Generic[Drawn]):
    """What samplers of indices and of streams share: where an epoch stands, and how it is cut."""

    _NAME: str

    def __init__(
        self,
        batch_size: HasBatchSize | int,
        *,
        drop_last: bool,
        rank: int,
        world_size: int,
    ) -> None:
        self.drop_last = as_bool(drop_last, "drop_last")
        self.world_size = as_integer(world_size, "world_size", 1)
        self.rank = as_integer(rank, "rank", 0)
        if self.rank >= self.world_size:
            raise ValueError(
                f"rank must be below world_size, got rank = {rank}, world_size = {world_size}"
            )
        if isinstance(batch_size, (int, np.integer)):
            self.controller: HasBatchSize = _Constant(as_integer(batch_size, "batch_size", 1))
        elif any(hasattr(one, "batch_size") for one in (type(batch_size), batch_size)):
            # The class first: what is asked before the first batch would be asked too early.
            self.controller = batch_size
        else:
            raise TypeError(
                f"batch_size must be a controller, or an integer, got batch_size = {batch_size!r}"
            )
        self._epoch = 0
        self._position = 0

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 0; the next one once the loop over it has ended."""
        return self._epoch

    @property
    def position(self) -> int:
        """How many examples of the epoch have been drawn, by all ranks together."""
        return self._position

    @property
    def batch_size(self) -> int:
        """The size that the controller asks for at this moment, in examples."""
        return as_integer(self.controller.batch_size, "batch_size", 1)

    def __iter__(self) -> Iterator[Drawn]:
        """Yield the rest of the epoch, batch by batch: this rank's share of each."""
        epoch = self._epoch
        self.begin()
        while self._epoch == epoch:
            drawn = self.draw(self.batch_size)
            if drawn is None:
                self.go_to(epoch + 1, 0)
            else:
                yield drawn

    def begin(self) -> bool:
        """Have the epoch, if nothing of it was drawn, as long as it is now.

        Return whether it was known with another length.
        """
        return False

    def upcoming(self) -> npt.NDArray[np.int64] | None:
        """Return the indices that this rank will draw in the rest of the epoch, if known."""
        return None

    def draw(self, size: int) -> Drawn | None:
        """Draw the next batch of the epoch, of a size that was asked for; None at its end.

        Raises:
            ValueError: If the size leaves a rank without an example, or is larger than the whole
                epoch with ``drop_last``.
        """
        left = self._left(size)
        length = self._length(size, left)
        if length == 0:
            return None
        start = self._position
        taken = self._take(start, start + length)
        # Moved on before the batch is handed out: a state saved in the loop's body counts it.
        self._position = start + length
        return taken

    def _length(self, size: int, left: int) -> int:
        """Return how many examples the next batch has; 0 at the end of the epoch.

        ``left`` may be less than there are, but not less than ``size`` and a smallest batch.
        """
        if self.world_size <= size <= left - 2 * self.world_size:
            return size
        if size < min(self.world_size, left):
            raise ValueError(
                f"a batch of {size} leaves some of {self.world_size} ranks without an example; "
                "raise the smallest size allowed"
            )
        if size > left and self.drop_last:
            if self._position == 0:
                raise ValueError(
                    f"a batch of {size} cannot be drawn from {left} examples with "
                    "drop_last; lower the largest size or set drop_last=False"
                )
            return 0
        smallest = self._smallest(size)
        size = min(size, left)
        rest = left - size
        # A constant size of 1 is somebody's wish.
        if self.drop_last or size == 1 or not 0 < rest < smallest:
            return size
        shorter = size - (smallest - rest)
        return shorter if shorter >= smallest else left

    def _smallest(self, size: int) -> int:
        """Return the fewest examples of a batch that shows a variance on each rank.

        One for each rank, where the size that was asked for does not allow for two.
        """
        return max(2, 2 * self.world_size if size >= 2 * self.world_size else self.world_size)

    @abstractmethod
    def _left(self, wanted: int) -> int:
        """Return how many examples the epoch has left; or ``wanted`` and a smallest batch."""

    @abstractmethod
    def _take(self, start: int, end: int) -> Drawn:
        """Return this rank's share of the examples from position ``start`` to ``end``."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Return what decides which examples come at which position."""

    def _identity_for(self, state_dict: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return what a state's identity has to be, for it to be loaded."""
        return self._identity()

    def _restore(self, epoch: int, position: int, examples: int) -> None:  # noqa: ARG002
        """Go on from the position of a state, whose epoch had so many examples, if known."""
        self.go_to(epoch, position)

    def go_to(self, epoch: int, position: int) -> None:
        """Go on from a position of an epoch, in examples of all ranks together."""
        self._epoch, self._position = epoch, position

    def bookmark(self) -> Any:
        """Return what :meth:`go_back` needs to undo the loading of a state."""
        return self._epoch, self._position

    def go_back(self, bookmark: Any) -> None:
        """Be where :meth:`bookmark` was called."""
        self.go_to(*bookmark)

    def state_at(self, epoch: int, position: int) -> dict[str, Any]:
        """Return the state of a sampler that has come to this position, as plain values."""
        return {
            "format": self._format(),
            "version": _VERSION,
            **self._identity(),
            "epoch": epoch,
            "position": position,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values; it counts the batches handed out.

        Example:
            >>> import cabs
            >>> sampler = cabs.BatchSampler(10, 4)
            >>> first = next(iter(sampler))
            >>> resumed = cabs.BatchSampler(10, 4)
            >>> resumed.load_state_dict(sampler.state_dict())
            >>> rest = [index for batch in resumed for index in batch.tolist()]
            >>> sorted([*first.tolist(), *rest]) == list(range(10))
            True
        """
        return self.state_at(self._epoch, self._position)

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a state that :meth:`state_dict` returned, on any rank of any world size.

        Raises:
            ValueError: If it is no such state, is of another version, or belongs to another
                sequence of batches; the message says how. Nothing has changed then.
        """
        check_mark(state_dict, "this", f"state of a {self._NAME}", self._format(), _VERSION)
        check_whole(state_dict, self.state_dict())
        epoch, position = state_dict["epoch"], state_dict["position"]
        if not all(type(one) is int and 0 <= one < _MOST for one in (epoch, position)):
            raise ValueError(f"this state is damaged: epoch = {epoch!r}, position = {position!r}")
        identity = self._identity_for(state_dict)
        different = [
            f"{name} = {state_dict[name]!r} there and {value!r} here"
            for name, value in identity.items()
            if type(state_dict[name]) is not type(value) or state_dict[name] != value
        ]
        if different:
            raise ValueError(f"this state belongs to other batches: {', '.join(different)}")
        examples = identity.get("examples", position)
        if position > examples:
            raise ValueError(f"this state is damaged: position = {position} of {examples} examples")
        self._restore(epoch, position, examples)

    def _format(self) -> str:
        return f"cabs.{self._NAME.replace(' ', '_')}"


class _Constant:
    """A batch size that never changes."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
