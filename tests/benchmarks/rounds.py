"""How this project measures: rounds taken in turns in one process, medians and quartiles.

Single times mean nothing on a machine that does other things too; ratios of neighbours do. Peaks of
memory are those of processes of their own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def options(description: str | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="where the result is written")
    return parser.parse_args()


def describe() -> dict[str, object]:
    """Return what the numbers depend on."""
    return {"python": platform.python_version(), "machine": platform.machine()}


def measure(count: int, *rounds: Callable[[], Any]) -> list[list[float]]:
    """Return the seconds of ``count`` repetitions of each round, taken in turns after one each."""
    for run in rounds:
        run()
    seconds: list[list[float]] = [[] for _ in rounds]
    for _ in range(count):
        for run, taken in zip(rounds, seconds, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return seconds


def compare(count: int, plain: Callable[[], Any], other: Callable[[], Any]) -> dict[str, float]:
    """Return the quartiles of the time of one round as a ratio to that of a plain one."""
    base, taken = measure(count, plain, other)
    return quartiles([b / a for a, b in zip(base, taken, strict=True)])


def in_words(ratio: dict[str, float]) -> str:
    """Return a ratio's median, and its quartiles."""
    return f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})"


def peak(script: str, *arguments: str) -> int:
    """Return the KiB that a script prints when it is run with ``--peak`` and arguments."""
    command = [sys.executable, script, "--peak", *arguments]
    folder = Path(script).parent
    run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return int(run.stdout)


def high_water_mark() -> int:
    """Return the most memory that this process has had so far, in KiB; on Linux."""
    # Not getrusage(), which starts from what the parent process had.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def quartiles(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    lower, median, upper = statistics.quantiles(values, n=4)
    return {"median": median, "lower": lower, "upper": upper}


def write(chosen: argparse.Namespace, result: dict[str, object]) -> None:
    """Write the result if a file was asked for."""
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
