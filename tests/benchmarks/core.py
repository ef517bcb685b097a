"""What a decision and a batch of indices cost.

    python tests/benchmarks/core.py

Writes JSON with --json FILE.
"""

from __future__ import annotations

from collections.abc import Callable

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


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    result: dict[str, object] = {**describe(), "numpy": np.__version__, "torch": torch.__version__}

    (taken,) = measure(ROUNDS, decisions(2000))
    microseconds = quartiles([seconds / 2000 * 1e6 for seconds in taken])
    result["microseconds a decision"] = microseconds
    print(
        "microseconds a decision: {median:.1f} ({lower:.1f} to {upper:.1f})".format(**microseconds)
    )

    for examples, size in ((60_000, 16), (60_000, 256), (60_000, 2048)):
        ours, theirs = measure(ROUNDS, batches(examples, size), torch_batches(examples, size))
        rates = {
            "cabs": quartiles([examples / seconds for seconds in ours]),
            "torch": quartiles([examples / seconds for seconds in theirs]),
            "ratio of pairs": quartiles([b / a for a, b in zip(ours, theirs, strict=True)]),
        }
        result[f"indices a second, batches of {size}"] = rates
        print(
            f"batches of {size}: {rates['cabs']['median']:.3g} indices a second, torch "
            f"{rates['torch']['median']:.3g}, ratio {rates['ratio of pairs']['median']:.1f} "
            f"({rates['ratio of pairs']['lower']:.1f} to {rates['ratio of pairs']['upper']:.1f})"
        )
    write(chosen, result)


if __name__ == "__main__":
    main()
