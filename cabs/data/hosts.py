"""Training loops of others that take batches ahead of the one that they train on.

Guarantees: they are known by the code that asks for the first batch of a loop, and not by what is
installed; nothing of theirs is imported.
"""

from __future__ import annotations

import sys
from types import FrameType

# Where each asks for the first batch. Lightning has two names.
_LIGHTNING = {
    (f"{package}.loops.fetchers", "_PrefetchDataFetcher.__iter__")
    for package in ("pytorch_lightning", "lightning.pytorch")
}
_ACCELERATE = {
    ("accelerate.data_loader", f"{name}.__iter__")
    for name in ("DataLoaderShard", "DataLoaderDispatcher")
}


def batches_ahead() -> int:
    """Return how many batches whoever calls has in hand when it trains on one; 0 for a loop."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_globals.get("__name__"), frame.f_code.co_qualname
        if code in _LIGHTNING:
            return int(getattr(frame.f_locals.get("self"), "prefetch_batches", 1))
        if code in _ACCELERATE:
            return _of_accelerate(frame.f_locals.get("self"))
        frame = frame.f_back
    return 0


def _of_accelerate(wrapper: object) -> int:
    # One process may read for all, a batch for each.
    if type(wrapper).__name__ != "DataLoaderDispatcher" or getattr(wrapper, "split_batches", False):
        return 1
    return int(getattr(getattr(wrapper, "state", None), "num_processes", 1))
