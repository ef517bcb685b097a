"""What statistics add to a training step in PyTorch, forward and backward, on two threads.

    python tests/benchmarks/steps_torch.py

Time is a ratio of neighbouring steps, on to off, with its quartiles; memory one of peaks, of
processes of their own, above what the import of PyTorch takes. Writes JSON with --json FILE.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from networks_torch import NETWORKS, Batch, batch
from rounds import THREADS, describe, measure, options, peak, quartiles, ratio, report_peak, write

import cabs_torch

# Microbatches in which a batch is taken for statistics from groups.
GROUPS = 4


def plain(data: Batch) -> None:
    """Take a step without statistics."""
    data.model.zero_grad()
    data.losses().mean().backward()


def full(data: Batch) -> None:
    """Take a step with exact statistics."""
    data.model.zero_grad()
    cabs_torch.backward(data.losses())


def sampled(data: Batch) -> None:
    """Take a step with norms over some of the examples."""
    data.model.zero_grad()
    cabs_torch.backward(data.losses(), sample=data.sample)


def parts(data: Batch) -> list[slice]:
    """Return the batch's microbatches."""
    size = len(data.inputs) // GROUPS
    return [slice(start, start + size) for start in range(0, len(data.inputs), size)]


def accumulated(data: Batch) -> None:
    """Accumulate gradients without statistics."""
    data.model.zero_grad()
    for part in parts(data):
        (data.losses(part).mean() * (1 / GROUPS)).backward()


def grouped(data: Batch) -> None:
    """Accumulate gradients with statistics from groups."""
    data.model.zero_grad()
    examples = len(data.inputs)
    accumulation = cabs_torch.Accumulation(data.model.parameters(), batch_size=examples)
    for part in parts(data):
        accumulation.backward(data.losses(part).mean(), examples=examples // GROUPS)
    accumulation.complete()


# What is measured, and against what.
STEPS: dict[str, tuple[Callable[[Batch], None], Callable[[Batch], None]]] = {
    "exact": (plain, full),
    "exact, over a sample": (plain, sampled),
    "groups, 4 microbatches": (accumulated, grouped),
}


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    torch.set_num_threads(THREADS)
    result: dict[str, object] = {}
    for name, network in NETWORKS.items():
        print(f"{name}, m = {network.examples}")
        data, rows = batch(name), {}
        for label, (off, on) in STEPS.items():
            seconds = measure(network.pairs, partial(off, data), partial(on, data))
            found = ratio(*seconds)
            peaks = [peak(__file__, name, step.__name__) for step in (off, on)]
            memory = peaks[1] / peaks[0]
            rows[label] = {
                "on : off": found,
                "milliseconds off": quartiles([1e3 * one for one in seconds[0]]),
                "memory, on : off": memory,
            }
            print(
                f"  {label}: on : off {found['median']:.3f} "
                f"({found['lower']:.3f} to {found['upper']:.3f}), memory {memory:.2f}"
            )
        result[name] = rows
    write(chosen, {**describe(), "networks": result})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        torch.set_num_threads(THREADS)
        name, step = sys.argv[2:]
        report_peak(lambda: partial(globals()[step], batch(name)))
    else:
        main()
