"""Batches whose size follows a controller, made ready while the step before them runs.

Guarantees: the size of a batch is asked for at a moment that does not depend on how fast anything
is, ``lag`` batches before it is handed out, so that a run can be repeated and resumed to the bit; a
state counts the batches that the loop has been given, and not those that were made ready, nor one
that a host has taken to see whether it is the last; whatever fails while a batch is made, the batch
stays the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, NamedTuple, Self

from cabs.data import hosts
from cabs.data.epoch_sampler import EpochSampler
from cabs.data.fetch import Batch, DrawnBatch, Fetch, Function
from cabs.data.places import Place, are_sizes
from cabs.values.formats import check_mark, check_whole
from cabs.values.scalars import as_bool, as_integer

_FORMAT = "cabs.data.loader"
_VERSION = 1


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
            :class:`cabs.data.Fetch`.
        sampler: Says which examples come, and asks for their number. It belongs to this loader, and
            runs ahead of it.
        lag: How many batches to make ready in advance.
        one_ahead: Whether who iterates takes each batch while the one before it is still to be
            trained on, as a host does that wants to know which one is the last. States,
            :attr:`epoch`, :attr:`position` and :attr:`batch` are then those of the one before, and
            a loop that was left goes on with what nobody has trained on. If left out, it is so in
            the hosts that are known to, Lightning and what accelerate wraps.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``lag`` is negative; when a loop begins, if a known host takes more than one
            batch ahead.

    Example:
        >>> import cabs, numpy as np
        >>> inputs, labels = np.arange(20.0).reshape(10, 2), np.arange(10)
        >>> controller = cabs.Controller(2, sizes=cabs.BatchSizes.range(2, 8))
        >>> sampler = cabs.BatchSampler(10, controller, shuffle=False)
        >>> fetch = lambda indices: (inputs[indices], labels[indices])
        >>> loader = cabs.data.Loader(fetch, sampler, lag=1)
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
        one_ahead: bool | None = None,
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
        self._fetch = fetch if isinstance(fetch, Fetch) else Function(fetch)
        self._sampler = sampler
        self.lag = as_integer(lag, "lag", 0)
        self._one_ahead = one_ahead if one_ahead is None else as_bool(one_ahead, "one_ahead")
        self._place = Place(sampler.epoch, sampler.position)
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
        return self._place.trained().epoch

    @property
    def position(self) -> int:
        """How many examples of the epoch the loop has been given, over all ranks."""
        return self._place.trained().position

    @property
    def batch(self) -> DrawnBatch:
        """What there is to tell of the batch that the loop has come to: the one handed out last.

        Where one is taken ahead, the one before it.

        Raises:
            ValueError: If there was none since the loader was made or restored.
        """
        batch = self._place.trained().batch
        if batch is None:
            raise ValueError("no batch has been handed out yet; read it in the loop's body")
        return batch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch, batch by batch."""
        self._begin_loop()
        epoch = self._place.epoch
        while self._place.epoch == epoch:
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

    def _begin_loop(self) -> None:
        """Have the next batch be the first that nobody has trained on."""
        ahead = hosts.batches_ahead() if self._one_ahead is None else int(self._one_ahead)
        if ahead > 1:
            raise ValueError(
                f"whoever iterates takes {ahead} batches ahead, and a state would not know which "
                "of them were trained on; let it take one, or give one_ahead=False, keep "
                "loader.batch beside each batch, and save loader.state_dict(after=batch)"
            )
        place = self._place.trained()
        if place is not self._place:
            self._abandon()
        self._place = place.begun(one_ahead=ahead == 1)

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
            epoch, _, handed_out, asked, is_drawn, *_ = self._place
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

    def _after(self) -> Place:
        """Return where the loop is when it has been given the next batch."""
        return self._place.given(self._ready[0].batch, getattr(self.controller, "step", None))

    def _end_epoch(self) -> None:
        self._place = self._place._replace(
            epoch=self._place.epoch + 1, position=0, asked=(), is_drawn=False
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

    def state_dict(self, *, after: DrawnBatch | None = None) -> dict[str, Any]:
        """Return position, sizes asked for, and the controller's state, as plain values.

        Args:
            after: The batch whose step was the last to be done: what :attr:`batch` was when it was
                handed out. Needed where batches are taken ahead by something of your own. If left
                out, it is what :attr:`batch` is.

        Raises:
            TypeError: If ``after`` is no :class:`cabs.data.DrawnBatch`.
            ValueError: If ``after`` is none of the last batches that were handed out; or, without
                it, if the controller's steps show that batches are taken ahead, and ``one_ahead``
                does not say so.

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
        if after is not None:
            return self._state_of(self._place.after(after))
        if self._one_ahead is not False:
            self._place.check_pace(getattr(self.controller, "step", None))
        return self._state_of(self._place.trained())

    def _state_of(self, place: Place) -> dict[str, Any]:
        state_of_controller = getattr(self.controller, "state_dict", None)
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "sampler": self._sampler.state_at(place.epoch, place.position),
            "world_size": self._sampler.world_size,
            "controller": None if state_of_controller is None else state_of_controller(),
            "sizes": [[size, place.handed_out - asked_at] for size, asked_at in place.asked],
            "is_drawn": place.is_drawn,
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
        here = self._state_of(self._place)
        check_whole(state_dict, here)
        sizes, is_drawn, world_size = (
            state_dict[name] for name in ("sizes", "is_drawn", "world_size")
        )
        if type(is_drawn) is not bool or type(world_size) is not int or not are_sizes(sizes):
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
        before_it = self._sampler.bookmark()
        self._sampler.load_state_dict(state_dict["sampler"])
        loaded = self._sampler.epoch, self._sampler.position
        try:
            if controller is not None:
                options = {"changed_settings": True} if changed_settings else {}
                self.controller.load_state_dict(controller, **options)
        except BaseException:
            self._sampler.go_back(before_it)
            raise
        place = Place(*loaded)
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
