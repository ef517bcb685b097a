"""Kills processes at the moments after they have started a worker, and looks for what is left.

    python tests/torch/orphans.py fork --kills 100

Each process iterates over a loader with workers, and kills itself by SIGKILL so many microseconds
after it has started one of them: at once, and up to when its workers are at work. Whatever outlives
it becomes a child of this process, which waits for all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch

import cabs_torch

WORKERS = 2
PR_SET_CHILD_SUBREAPER = 36
# How many seconds whatever is left has to end, on a machine that is busy.
PATIENCE = 60.0


class Endless(torch.utils.data.Dataset):
    """Examples of which one is never read to its end."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if index == 9:
            time.sleep(10_000.0)
        return index


def die_after(started: int, seconds: float) -> None:
    """Let this process kill itself so long after it has started so many others by a fork."""
    left = started

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass
            os.kill(os.getpid(), signal.SIGKILL)

    os.register_at_fork(after_in_parent=count)


def iterate(method: str, started: int, seconds: float) -> None:
    """Read with workers, and die meanwhile."""
    if method == "fork":
        die_after(started, seconds)
    else:
        # What starts the process is not Python's fork: by a clock.
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, 0.001 + seconds)
    loader = cabs_torch.loader(
        Endless(), 10, num_workers=WORKERS, shuffle=False, multiprocessing_context=method
    )
    for _ in loader:
        pass


def killed(method: str, started: int, seconds: float) -> int:
    """Return the number of a process that reads with workers, and dies."""
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        try:
            iterate(method, started, seconds)
        finally:
            os._exit(1)
    return number


def ended() -> dict[int, int]:
    """Return the children of this process that have ended, with their statuses."""
    found = {}
    while True:
        try:
            number, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if number == 0:
            return found
        found[number] = os.waitstatus_to_exitcode(status)


def children() -> list[int]:
    """Return the numbers of this process's children."""
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return [int(number) for number in path.read_text().split()]


def main() -> None:
    """Start, kill, look; an assertion fails where anything is left."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=("fork", "spawn", "forkserver"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--longest", type=float, default=0.05, help="in seconds")
    parser.add_argument("--without-handles", action="store_true", help="as older systems are")
    options = parser.parse_args()
    if options.without_handles:
        del os.pidfd_open
    torch.set_num_threads(1)
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    statuses: dict[int, int] = {}
    parents = []
    for kill in range(options.kills):
        seconds = options.longest * (kill // WORKERS) / max(options.kills // WORKERS, 1)
        parents.append(killed(options.method, 1 + kill % WORKERS, seconds))
        # A few at a time.
        while len(set(parents) - set(statuses)) >= 4:
            statuses |= ended()
            time.sleep(0.0005)
    deadline = time.monotonic() + PATIENCE
    while children() and time.monotonic() < deadline:
        statuses |= ended()
        time.sleep(0.01)
    left = children()
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert not left, f"{len(left)} processes have outlived the one that started them"
    assert [statuses[number] for number in parents] == [-signal.SIGKILL] * options.kills
    print(f"{options.kills} kills, {len(statuses) - options.kills} others, none of which is left")


if __name__ == "__main__":
    main()
