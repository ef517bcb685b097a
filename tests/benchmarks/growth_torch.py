"""How the cost of statistics grows in PyTorch: with the batch, the sequence, the width, the size.

    python tests/benchmarks/growth_torch.py

Along each axis a step is measured without and with exact statistics, in turns, on two threads. The
exponent is the slope of a line through the logarithms of the median times of the larger half of the
sizes, where what does not grow no longer counts. Writes JSON with --json FILE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from networks_torch import GPT, Batch, text
from rounds import THREADS, describe, measure, options, quartiles, ratio, write
from steps_torch import full, plain
from torch import nn

# Seconds that the plain steps of a size may take in all, and the bounds on their number.
BUDGET, FEWEST, MOST = 3.0, 5, 101


def matrices(*widths: int, examples: int) -> Batch:
    """Return a network of matrices, of these widths, and a batch."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    inputs = torch.randn(examples, widths[0])
    return Batch(model, inputs, torch.randint(widths[-1], (examples,)), examples)


def sequences(length: int) -> Batch:
    """Return a transformer of two layers, and 4 sequences."""
    return Batch(GPT(2, 128, 4, length, 65), *text(4, length, 65), 4)


def of_size(parameters: int) -> Batch:
    """Return three matrices between equal widths with so many parameters, about, and a batch."""
    width = round(math.sqrt(parameters / 3))
    return matrices(width, width, width, width, examples=64)


class Axis(NamedTuple):
    """What grows."""

    sizes: list[int]
    build: Callable[[int], Batch]


AXES = {
    "batch size, MLP 256-256-256-10": Axis(
        [16, 64, 256, 1024, 4096], lambda m: matrices(256, 256, 256, 10, examples=m)
    ),
    "sequence length, 2 layers of a GPT, d = 128, m = 4": Axis(
        [32, 64, 128, 256, 512, 1024, 2048], sequences
    ),
    "width, MLP of 2 square matrices, m = 64": Axis(
        [128, 256, 512, 1024, 2048, 4096], lambda d: matrices(d, d, d, examples=64)
    ),
    "parameters, MLP of 3 square matrices, m = 64": Axis(
        [100_000, 1_000_000, 10_000_000, 100_000_000], of_size
    ),
}


def pairs_for(step: Callable[[], object]) -> int:
    """Return how often a step can be measured."""
    (taken,) = measure(2, step)
    return min(MOST, max(FEWEST, round(BUDGET / min(taken))))


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Return how the larger half of the times grows."""
    first = (len(sizes) - 1) // 2
    slope, _ = np.polyfit(np.log(sizes[first:]), np.log(seconds[first:]), 1)
    return float(slope)


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    torch.set_num_threads(THREADS)
    result: dict[str, object] = {}
    for name, axis in AXES.items():
        print(name)
        times: dict[str, list[float]] = {"off": [], "on": []}
        rows = []
        for size in axis.sizes:
            torch.manual_seed(0)
            data = axis.build(size)
            steps = partial(plain, data), partial(full, data)
            off, on = measure(pairs_for(steps[0]), *steps)
            found = ratio(off, on)
            for label, taken in (("off", off), ("on", on)):
                times[label].append(quartiles(taken)["median"])
            row = {"size": size, "on : off": found, "milliseconds off": 1e3 * times["off"][-1]}
            rows.append(row)
            print(f"  {size}: {row['milliseconds off']:.2f} ms, on : off {found['median']:.3f}")
        exponents = {label: exponent(axis.sizes, taken) for label, taken in times.items()}
        print(f"  exponents: {exponents['off']:.2f} off, {exponents['on']:.2f} on")
        result[name] = {"sizes": rows, "exponents": exponents}
    write(chosen, {**describe(), "axes": result})


if __name__ == "__main__":
    main()
