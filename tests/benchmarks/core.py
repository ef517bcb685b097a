"""What a decision, a batch of indices, a state and a log cost.

    python tests/benchmarks/core.py

Writes JSON with --json FILE.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rounds import describe, measure, options, quartiles, write

import cabs

ROUNDS = 31


def decisions(count: int = 2000) -> Callable[[], None]:
    """Return a round of decisions, with numbers that move."""
    controller = cabs.Controller(32)
    traces = np.random.default_rng(0).lognormal(7.0, 0.5, count).tolist()

    def run() -> None:
        for trace in traces:
            controller.update(learning_rate=0.1, variance_trace=trace, loss=1.5)

    return run


def batches(examples: int, size: int) -> Callable[[], None]:
    """Return an epoch of this library's sampler."""
    sampler = cabs.BatchSampler(examples, size)

    def run() -> None:
        for indices in sampler:
            assert len(indices)

    return run


def torch_batches(examples: int, size: int) -> Callable[[], None]:
    """Return an epoch of PyTorch's own."""
    order = torch.utils.data.RandomSampler(range(examples))
    sampler = torch.utils.data.BatchSampler(order, size, drop_last=False)

    def run() -> None:
        for indices in sampler:
            assert len(indices)

    return run


def round_trips(count: int) -> tuple[int, Callable[[], None]]:
    """Return the bytes of a state, and a round of saving it and loading it again."""
    controller = cabs.Controller(32)
    controller.update(learning_rate=0.1, variance_trace=1e3, loss=1.5)
    sampler = cabs.BatchSampler(60_000, controller)
    loader = cabs.data.Loader(np.arange(60_000).take, sampler)
    next(iter(loader))

    def run() -> None:
        for _ in range(count):
            loader.load_state_dict(json.loads(json.dumps(loader.state_dict())))

    return len(json.dumps(loader.state_dict())), run


def replay(path: Path, count: int) -> Callable[[], None]:
    """Write a log of so many decisions; return a round of making them all again."""
    controller = cabs.Controller(32)
    traces = np.random.default_rng(0).lognormal(7.0, 0.5, count).tolist()
    with cabs.RunLog(path, controller) as log:
        for trace in traces:
            log.write(controller.update(learning_rate=0.1, variance_trace=trace, loss=1.5))

    def run() -> None:
        with cabs.runs.Replay(path) as decisions:
            assert sum(1 for _ in decisions) == count

    return run


def report(name: str, unit: str, values: list[float]) -> dict[str, object]:
    """Print a measurement, and return it as it is written."""
    found = quartiles(values)
    print(f"{name}: {found['median']:.3g} {unit} ({found['lower']:.3g} to {found['upper']:.3g})")
    return {"unit": unit, **found}


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    rows: dict[str, object] = {}
    (taken,) = measure(ROUNDS, decisions(2000))
    name = "a decision"
    rows[name] = report(name, "microseconds", [one / 2000 * 1e6 for one in taken])
    for examples, size in ((60_000, 16), (60_000, 256), (60_000, 2048)):
        ours, theirs = measure(ROUNDS, batches(examples, size), torch_batches(examples, size))
        name = f"drawing batches of {size}"
        rows[name] = report(name, "million indices a second", [examples / 1e6 / t for t in ours])
        name += ", PyTorch's time to ours"
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        rows[name] = report(name, "times", ratios)
    size, run = round_trips(200)
    (taken,) = measure(ROUNDS, run)
    name = f"a state of {size} bytes of JSON, saved and loaded again"
    rows[name] = report(name, "microseconds", [one / 200 * 1e6 for one in taken])
    with tempfile.TemporaryDirectory() as folder:
        (taken,) = measure(ROUNDS, replay(Path(folder, "run.jsonl"), 5000))
    name = "a logged decision, read and made again"
    rows[name] = report(name, "microseconds", [one / 5000 * 1e6 for one in taken])
    write(chosen, {**describe(threads=1), "rows": rows})


if __name__ == "__main__":
    main()
