"""PyTorch's data loader, of which workers may die at any moment, and the loop too.

Guarantees: a worker that dies is an error where its examples are asked for, within about a second,
and nowhere else; no wait for a worker is for ever, and no lock that it held is waited for. Workers
end when the process of the loop is gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from cabs_torch.data import orphans, randomness

# How many requests each worker has to hand, so that it need not wait for the next.
_REQUESTS = 2
# After how many seconds of waiting for the workers they are looked at.
_LOOK = 1.0


def data_loader(reader: Any, seed: int | None, epoch: int, options: dict[str, Any]) -> Any:
    """Return PyTorch's own, for what is read in an epoch."""
    # Its own generator: the data loader would draw from training's.
    generator = torch.Generator()
    generator.manual_seed(randomness.seeds_of(seed or 0, epoch, [2**64 - 1])[0])
    return _DataLoader(
        reader,
        generator=generator,
        batch_size=None,
        collate_fn=_as_it_is,
        prefetch_factor=_REQUESTS if options["num_workers"] else None,
        **options,
    )


def begun(loader: Any) -> Iterator[Any]:
    """Return an iterator over a data loader, whose workers start."""
    # It draws a number by our generator, which is one of the CPU, on the default device. Workers
    # that start under a device of their own are slow at everything.
    if torch.get_default_device().type == "cpu":
        return iter(loader)
    with torch.device("cpu"):
        return iter(loader)


def ended(iterator: Any) -> None:
    """Let the workers of an iterator over a data loader end, now.

    They would when nobody holds the iterator any more; but an error that was caught can hold it, in
    a cycle, and workers that are ended while garbage is collected can wait for each other.
    """
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def _as_it_is(read: Any) -> Any:
    return read


class _DataLoader(DataLoader[Any]):
    def _get_iterator(self) -> Any:
        return _Iterator(self) if self.num_workers else super()._get_iterator()

    @DataLoader.multiprocessing_context.getter  # type: ignore[attr-defined, untyped-decorator]
    def multiprocessing_context(self) -> Any:
        # PyTorch's workers ask for their parent's number when they are at work, and by then it can
        # be that of the process that adopted them.
        own = DataLoader.multiprocessing_context.fget(self)  # type: ignore[attr-defined]
        return orphans.Context(torch.multiprocessing if own is None else own)


class _Iterator(_MultiProcessingDataLoaderIter):
    """Finds out by itself that a worker died.

    PyTorch's own has the signal of a child's death raise an error in the main thread, whatever that
    is at: in the middle of a step, or about to release a lock that the next call then waits for.
    """

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if first_iter:
            # Nothing was asked of the workers yet. From here on the signal finds no fault.
            _remove_worker_pids(id(self))
            self._worker_pids_set = False
        super()._reset(loader, first_iter)

    def _try_get_data(self, timeout: float = _LOOK) -> Any:
        end = time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            found = self._look(min(left, _LOOK) if left > 0.0 else 0.0)
            if found[0] or left <= _LOOK:
                return found

    def _look(self, timeout: float) -> Any:
        """Return whether something was sent, and what; raise if a worker has died."""
        if self._shutdown:
            raise RuntimeError("the data loader's workers were ended while this waited for them")
        try:
            return super()._try_get_data(timeout)  # type: ignore[no-untyped-call]
        except (OSError, EOFError) as error:
            # What was sent cannot be read from a process that has just been killed.
            for worker in self._workers:
                worker.join(_LOOK)
                if worker.exitcode is not None:
                    raise RuntimeError(
                        f"DataLoader worker (pid {worker.pid}) died with exit code "
                        f"{worker.exitcode}"
                    ) from error
            raise

    def _shutdown_workers(self) -> None:
        if self._shutdown or not any(worker.exitcode for worker in self._workers):
            super()._shutdown_workers()
            return
        # The dead may have held locks, on which the others, or this process, would wait for ever.
        self._shutdown = True
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        for queue in self._index_queues:
            queue.cancel_join_thread()
            queue.close()
