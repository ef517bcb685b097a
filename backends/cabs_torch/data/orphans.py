"""Worker processes that have no life without the process that started them.

Guarantees: a worker ends when the process that started it is gone, however that ended and whenever:
also between the fork and the worker's first line, and while an example is being read. It knows who
started it from what was noted before it was started; it does not ask who its parent is, since that
may be another one by then. The thread that started it may end.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any

# After how many seconds it is looked again, where nothing tells that a process has ended.
_LOOK = 1.0


class Context:
    """A multiprocessing context, or the module, whose processes end when this one is gone."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def Process(self, *, target: Callable[..., None], args: tuple[Any, ...]) -> Any:  # noqa: N802
        """Return a process that is not started yet."""
        # A fork server is the parent of all that it forks.
        is_child = os.name == "posix" and self._context.get_start_method() != "forkserver"
        return self._context.Process(target=_watched, args=(is_child, target, *args))


def _watched(is_child: bool, target: Callable[..., None], *args: Any) -> None:
    """Run in a new process: call the target, and end as soon as nobody is left who waits for it."""
    # Its number was noted when this process was made, before it was started.
    starter = multiprocessing.parent_process()
    assert starter is not None
    watch = threading.Thread(
        target=_end_with, args=(starter, is_child), name="cabs-watch", daemon=True
    )
    watch.start()
    target(*args)


def _end_with(starter: Any, is_child: bool) -> None:
    """Wait until a process is gone, and end this one."""
    try:
        handle = os.pidfd_open(starter.pid)
    except ProcessLookupError:
        os._exit(1)
    except (AttributeError, OSError):
        handle = None
    # Looked at with the handle open: if it is there now, it is what the handle is of.
    while not _is_gone(starter, is_child):
        if handle is None:
            time.sleep(_LOOK)
        else:
            waiting = select.poll()
            waiting.register(handle, select.POLLIN)
            waiting.poll()
            break
    # Not by an exception: the reading thread may wait for something that never comes, and what it
    # would send can block for ever in a pipe that nobody reads.
    os._exit(1)


def _is_gone(starter: Any, is_child: bool) -> bool:
    if is_child:
        return bool(os.getppid() != starter.pid)
    # By a pipe, which is closed when a process ends, unless another one has inherited it.
    return not starter.is_alive()
