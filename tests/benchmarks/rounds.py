"""How this project measures: rounds taken in turns in one process, medians and quartiles.

Single times mean nothing on a machine that does other things too; ratios of neighbours do. Peaks of
memory are those of processes of their own. What is written says on what machine, with what versions
and when it was measured.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# How many threads a step may use.
THREADS = 2

# Seconds that all rounds of a comparison may take, about, if they are more than three.
_PATIENCE = 100.0

# What the numbers can depend on; each is named if it is installed.
_DISTRIBUTIONS = (
    *("cabs-batch-size", "numpy", "torch", "jax", "jaxlib", "tensorflow", "keras"),
    *("backpack-for-pytorch", "opacus", "cockpit-for-pytorch", "jax-privacy"),
)


def options(description: str | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="where the result is written")
    return parser.parse_args()


def describe(threads: int = THREADS) -> dict[str, object]:
    """Return what the numbers depend on: the machine, the versions, and the day."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "processor": _first("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory in GiB": round(
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
            ),
            "system": platform.platform(),
        },
        "threads": threads,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _first(path: str, key: str) -> str:
    """Return what the first line that starts with a key says, in a file of the kernel."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return ""


def measure(count: int, *rounds: Callable[[], Any]) -> list[list[float]]:
    """Return the seconds of ``count`` repetitions of each round, taken in turns after one each.

    Fewer are taken, but three at least, where that would take minutes.
    """
    start = time.perf_counter()
    for run in rounds:
        run()
    count = min(count, max(3, round(_PATIENCE / (time.perf_counter() - start))))
    seconds: list[list[float]] = [[] for _ in rounds]
    for _ in range(count):
        for run, taken in zip(rounds, seconds, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return seconds


def compare(count: int, plain: Callable[[], Any], other: Callable[[], Any]) -> dict[str, float]:
    """Return the quartiles of the time of one round as a ratio to that of a plain one."""
    return ratio(*measure(count, plain, other))


def ratio(base: list[float], taken: list[float]) -> dict[str, float]:
    """Return the quartiles of the ratios of neighbours, of what was taken to the base."""
    return quartiles([b / a for a, b in zip(base, taken, strict=True)])


def kernels_added(
    name: str, parameters: int, plain: tuple[int, int], full: tuple[int, int]
) -> dict[str, float]:
    """Print and return what statistics add to a network's step, of kernels and those that wait."""
    added = (full[0] - plain[0]) / parameters
    print(f"{name}: {plain[0]} kernels, {added:.1f} more for each of {parameters} parameters")
    return {
        "parameters": parameters,
        "plain": plain[0],
        "added a parameter": added,
        "that wait": full[1],
    }


def in_words(ratio: dict[str, float]) -> str:
    """Return a ratio's median, and its quartiles."""
    return f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})"


def peak(script: str, *arguments: str) -> int:
    """Return the KiB that a script prints last when it is run with ``--peak`` and arguments."""
    command = [sys.executable, script, "--peak", *arguments]
    folder = Path(script).parent
    run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return int(run.stdout.splitlines()[-1])


def report_peak(start: Callable[[], Callable[[], Any]]) -> None:
    """Take some steps of what is started in this process, and print the peak, for :func:`peak`."""
    before = _high_water_mark()
    step = start()
    for _ in range(3):
        step()
    print(_high_water_mark() - before)


def _high_water_mark() -> int:
    """Return the most memory that this process has had so far, in KiB; on Linux."""
    # Not getrusage(), which starts from what the parent process had.
    return int(_first("/proc/self/status", "VmHWM").split()[0])


def quartiles(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    lower, median, upper = statistics.quantiles(values, n=4)
    return {"median": median, "lower": lower, "upper": upper}


def write(chosen: argparse.Namespace, result: dict[str, object]) -> None:
    """Write the result if a file was asked for."""
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
