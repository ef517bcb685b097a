"""Batches whose size follows a controller, made ready while the step before them runs.

Guarantees: the size of a batch is asked for at a moment that does not depend on how fast anything
is, ``lag`` batches before it is handed out, so that a run can be repeated and resumed to the bit; a
state counts the batches that the loop has been given, and not those that were made ready; whatever
fails while a batch is made, the batch stays the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import numpy.typing as npt

from cabs.epochs import EpochSampler
from cabs.formats import check_mark, check_whole
from cabs.scalars import as_integer

_FORMAT = "cabs.loader"
_VERSION = 1

Batch = TypeVar("Batch", covariant=True)


class DrawnBatch(NamedTuple):
    """What a loader tells of the batch that it handed out last.

    Example:
        >>> import cabs, numpy as np
        >>> loader = Loader(np.arange(10.0).take, cabs.BatchSampler(10, 4, shuffle=False))
        >>> for batch in loader:
        ...     print(loader.batch.start, loader.batch.examples, loader.batch.lag)
        0 4 0
        4 4 0
        8 2 0
    """

    epoch: int
    """Counted from 0."""
    start: int
    """Position in the epoch of its first example, over all ranks."""
    examples: int
    """How many examples it has, over all ranks."""
    asked: int
    """The size that was asked for; it differs at the end of an epoch."""
    lag: int
    """How many batches were handed out after the size was asked for, and before this one."""
    drawn: Any
    """What the sampler drew: this rank's indices, or its examples of a stream."""


@runtime_checkable
class Fetch(Protocol[Batch]):
    """What makes batches for a loader, where a function would not do.

    It is told what will be asked for, and is asked for all of it, in order. Derived from, it does
    nothing but what is written anew.

    Example:
        >>> import cabs
        >>> class Squares(Fetch[list[int]]):
        ...     def begin(self, epoch, upcoming, size):
        ...         self.squares = iter([index**2 for index in upcoming.tolist()])
        ...     def fetch(self, batch):
        ...         return [next(self.squares) for _ in batch.drawn]
        >>> list(Loader(Squares(), cabs.BatchSampler(6, 4, shuffle=False)))
        [[0, 1, 4, 9], [16, 25]]
    """

    def begin(
        self,
        epoch: int,  # noqa: ARG002
        upcoming: npt.NDArray[Any] | None,  # noqa: ARG002
        size: int,  # noqa: ARG002
    ) -> None:
        """Prepare for these indices, in this order; None for what a stream holds.

        ``size`` is what the first batch was asked to have, over all ranks. Whatever was prepared
        before is not asked for any more.
        """
        return

    def fetch(self, batch: DrawnBatch) -> Batch:
        """Return a batch that was drawn; in a thread, if the loader has a lag."""
        ...

    def end(self) -> None:
        """Let go of what the next epoch does not need."""
        return

    def close(self) -> None:
        """Let go of everything, since something failed, or nobody goes on."""
        return


class _Function(Fetch[Batch]):
    """A plain function that makes batches, which needs no preparation."""

    def __init__(self, function: Callable[[Any], Batch]) -> None:
        self._function = function

    def fetch(self, batch: DrawnBatch) -> Batch:
        return self._function(batch.drawn)


class _Place(NamedTuple):
    """How far a loop has come. All that a loader must not lose, replaced as a whole."""

    epoch: int
    position: int
    """How many examples of the epoch the loop was given, over all ranks."""
    handed_out: int = 0
    """How many batches, since the loader was made or restored."""
    batch: DrawnBatch | None = None
    """The last of them."""
    asked: tuple[tuple[int, int], ...] = ()
    """The sizes of the batches to come, with ``handed_out`` at the moment they were asked for."""
    is_drawn: bool = False
    """Whether these are all of the epoch."""


class _Ready(NamedTuple):
    """A batch that was drawn and has not been handed out."""

    batch: DrawnBatch
    made: Callable[[], Any]
    """Returns it; may wait."""


class Loader(Generic[Batch]):
    """Iterates over batches, each of the size that the controller asks for.

    Iterating yields the rest of the current epoch. With ``lag=0`` a batch is drawn and fetched when
    the loop asks for it. With ``lag=k``, it is drawn when the loop asks for the one k before it,
    and fetched by a thread meanwhile: the decision of a step is obeyed by the batch after the k
    that are ready. At the beginning of an epoch the lag grows from 0 to k. :attr:`batch` tells the
    lag of each.

    One object holds what a checkpoint needs: the position in the epoch, the sizes of the batches
    that are ready and, where the sampler asks a controller, its state too. Save it when the step of
    the last batch has ended, ``controller.update`` included.

    Args:
        fetch: Returns the batch for what the sampler has drawn: a function of the indices of a
            :class:`cabs.BatchSampler`, or of the examples of a :class:`cabs.StreamSampler`; or a
            :class:`cabs.Fetch`.
        sampler: Says which examples come, and asks for their number. It belongs to this loader, and
            runs ahead of it.
        lag: How many batches to make ready in advance.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``lag`` is negative.

    Example:
        >>> import cabs, numpy as np
        >>> inputs, labels = np.arange(20.0).reshape(10, 2), np.arange(10)
        >>> controller = cabs.Controller(2, sizes=cabs.BatchSizes.range(2, 8))
        >>> sampler = cabs.BatchSampler(10, controller, shuffle=False)
        >>> loader = cabs.Loader(lambda indices: (inputs[indices], labels[indices]), sampler, lag=1)
        >>> for x, y in loader:
        ...     print(y, loader.batch.lag)
        ...     _ = controller.update(learning_rate=0.1, variance_trace=40.0, loss=1.0)
        [0 1] 0
        [2 3] 1
        [4 5 6 7] 1
        [8 9] 1
    """

    def __init__(
        self,
        fetch: Callable[[Any], Batch] | Fetch[Batch],
        sampler: EpochSampler[Any],
        *,
        lag: int = 0,
    ) -> None:
        if not callable(fetch) and not isinstance(fetch, Fetch):
            raise TypeError(
                f"fetch must be a function of what the sampler draws, got fetch = {fetch!r}"
            )
        if not isinstance(sampler, EpochSampler):
            raise TypeError(
                "sampler must be a cabs.BatchSampler or a cabs.StreamSampler, got sampler = "
                f"{sampler!r}"
            )
        self._fetch = fetch if isinstance(fetch, Fetch) else _Function(fetch)
        self._sampler = sampler
        self.lag = as_integer(lag, "lag", 0)
        self._place = _Place(sampler.epoch, sampler.position)
        # What follows can be lost at any time, and is then made again.
        self._ready: deque[_Ready] = deque()
        self._thread: ThreadPoolExecutor | None = None
        self._begun: int | None = None

    @property
    def controller(self) -> Any:
        """What says the size of the next batch."""
        return self._sampler.controller

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 0; the next one once the loop over it has ended."""
        return self._place.epoch

    @property
    def position(self) -> int:
        """How many examples of the epoch the loop has been given, over all ranks."""
        return self._place.position

    @property
    def batch(self) -> DrawnBatch:
        """What there is to tell of the batch handed out last.

        Raises:
            ValueError: If there was none since the loader was made or restored.
        """
        if self._place.batch is None:
            raise ValueError("no batch has been handed out yet; read it in the loop's body")
        return self._place.batch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch, batch by batch."""
        epoch = self.epoch
        while self.epoch == epoch:
            try:
                self._draw_ahead()
                if not self._ready:
                    self._end_epoch()
                    return
                made: Batch = self._made()
                after = self._after()
            except BaseException:
                self._abandon()
                raise
            # Nothing can interrupt between these two: from here on the loop has this batch.
            self._place = after
            yield made

    def _draw_ahead(self) -> None:
        """Draw until there is the next batch, and ``lag`` more."""
        if self._ready and self._ready[0].batch is self._place.batch:
            self._ready.popleft()
        if not self._is_in_step():
            if self._begun is not None:
                self._abandon()
            self._sampler.go_to(self._place.epoch, self._place.position)
            if self._sampler.begin():
                # What was known of the epoch's end was of another one.
                self._place = self._place._replace(is_drawn=False)
        while len(self._ready) <= self.lag:
            epoch, _, handed_out, _, asked, is_drawn = self._place
            number = len(self._ready)
            if number == len(asked):
                if is_drawn:
                    break
                asked = (*asked, (self._sampler.batch_size, handed_out))
            size, asked_at = asked[number]
            if self._begun is None:
                self._fetch.begin(epoch, self._sampler.upcoming(), size)
                self._begun = epoch
            start = self._sampler.position
            drawn = self._sampler.draw(size)
            if drawn is None:
                self._place = self._place._replace(asked=asked[:number], is_drawn=True)
                break
            examples = self._sampler.position - start
            lag = handed_out + number - asked_at
            batch = DrawnBatch(epoch, start, examples, size, lag, drawn)
            self._ready.append(_Ready(batch, self._making(batch)))
            self._place = self._place._replace(asked=asked)

    def _is_in_step(self) -> bool:
        """Return whether what is ready is what comes next, and the sampler is where it ends."""
        batches = [ready.batch for ready in self._ready]
        first, *others = (*(batch.start for batch in batches), self._sampler.position)
        ends = [batch.start + batch.examples for batch in batches]
        return (
            self._begun == self._sampler.epoch == self._place.epoch
            and first == self._place.position
            and others == ends
            and len(batches) <= len(self._place.asked)
        )

    def _making(self, batch: DrawnBatch) -> Callable[[], Any]:
        """Return a function that returns the batch; with a lag, a thread begins to make it."""
        if self.lag == 0:
            return partial(self._fetch.fetch, batch)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="cabs-loader")
        future: Future[Any] = self._thread.submit(self._fetch.fetch, batch)
        return future.result

    def _made(self) -> Any:
        """Return the next batch, made."""
        try:
            return self._ready[0].made()
        except BaseException as error:
            batch = self._ready[0].batch
            error.add_note(
                f"cabs: the batch of {batch.examples} examples from position {batch.start} of "
                f"epoch {batch.epoch} could not be made; it is still the next one"
            )
            raise

    def _after(self) -> _Place:
        """Return where the loop is when it has been given the next batch."""
        epoch, _, handed_out, _, asked, is_drawn = self._place
        batch = self._ready[0].batch
        end = batch.start + batch.examples
        return _Place(epoch, end, handed_out + 1, batch, asked[1:], is_drawn)

    def _end_epoch(self) -> None:
        self._place = self._place._replace(
            epoch=self.epoch + 1, position=0, asked=(), is_drawn=False
        )
        self._begun = None
        self._stop_thread()
        self._fetch.end()

    def _stop_thread(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=True, cancel_futures=True)

    def _abandon(self) -> None:
        """Forget all that can be made again."""
        self._ready = deque()
        self._begun = None
        self._stop_thread()
        self._fetch.close()

    def close(self) -> None:
        """Let go of threads, workers and streams; the next loop goes on where the last one was."""
        self._abandon()
        self._sampler.go_to(self._place.epoch, self._place.position)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return position, sizes asked for, and the controller's state, as plain values.

        Example:
            >>> import cabs, numpy as np
            >>> sampler = cabs.BatchSampler(10, 4, shuffle=False)
            >>> loader = Loader(np.arange(10).take, sampler, lag=1)
            >>> next(iter(loader)).tolist()
            [0, 1, 2, 3]
            >>> resumed = Loader(np.arange(10).take, cabs.BatchSampler(10, 4, shuffle=False))
            >>> resumed.load_state_dict(loader.state_dict())
            >>> [batch.tolist() for batch in resumed]
            [[4, 5, 6, 7], [8, 9]]
        """
        epoch, position, handed_out, _, asked, is_drawn = self._place
        state_of_controller = getattr(self.controller, "state_dict", None)
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "sampler": self._sampler.state_at(epoch, position),
            "world_size": self._sampler.world_size,
            "controller": None if state_of_controller is None else state_of_controller(),
            "sizes": [[size, handed_out - asked_at] for size, asked_at in asked],
            "is_drawn": is_drawn,
        }

    def load_state_dict(self, state_dict: Any, *, changed_settings: bool = False) -> None:
        """Go on from a state that :meth:`state_dict` returned, the controller included.

        Lag, workers, ranks and what limits memory may be others than before. With another number of
        ranks the sizes that were asked for ahead are asked for anew.

        Args:
            state_dict: The state.
            changed_settings: Whether the controller may have other settings than the one that was
                saved, as :meth:`cabs.Controller.load_state_dict` describes. If it has, the sizes
                that were asked for ahead are asked for anew.

        Raises:
            ValueError: If it is no such state, is of another version, or belongs to other batches
                or a controller with other settings. Nothing has changed then.
        """
        check_mark(state_dict, "this", "state of a loader", _FORMAT, _VERSION)
        here = self.state_dict()
        check_whole(state_dict, here)
        sizes, is_drawn, world_size = (
            state_dict[name] for name in ("sizes", "is_drawn", "world_size")
        )
        if type(is_drawn) is not bool or type(world_size) is not int or not _are_sizes(sizes):
            raise ValueError(
                f"this state is damaged: sizes = {sizes!r}, is_drawn = {is_drawn!r}, "
                f"world_size = {world_size!r}"
            )
        controller, before = state_dict["controller"], here["controller"]
        if (controller is None) != (before is None):
            raise ValueError(
                "this state was saved "
                f"{'without' if controller is None else 'with'} a controller, and this loader has "
                f"{'none' if before is None else 'one'}; build it as it was"
            )
        at = self._sampler.epoch, self._sampler.position
        self._sampler.load_state_dict(state_dict["sampler"])
        loaded = self._sampler.epoch, self._sampler.position
        try:
            if controller is not None:
                options = {"changed_settings": True} if changed_settings else {}
                self.controller.load_state_dict(controller, **options)
        finally:
            self._sampler.go_to(*at)
        place = _Place(*loaded)
        is_same = loaded == (state_dict["sampler"]["epoch"], state_dict["sampler"]["position"])
        # Elsewhere these sizes may leave a rank without an example, or end the epoch otherwise.
        settings = [one and one.get("configuration") for one in (controller, before)]
        if is_same and settings[0] == settings[1] and world_size == self._sampler.world_size:
            asked = tuple((size, -waited) for size, waited in sizes)
            place = place._replace(asked=asked, is_drawn=is_drawn)
        self._place = place
        self.close()

    def __repr__(self) -> str:
        return f"Loader({self._sampler!r}, lag={self.lag})"


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and [type(number) for number in pair] == [int, int]
        and pair[0] >= 1
        and pair[1] >= 0
        for pair in value
    )
