"""What statistics add to a traced step in TensorFlow, forward and backward, on two threads.

    python tests/benchmarks/steps_tensorflow.py

Time is a ratio of neighbouring steps, on to off, with its quartiles; beside it stands the time to
trace a step, to compile it where XLA does, and to take it for the first time; memory is a ratio of
peaks, of processes of their own, above what the import of TensorFlow takes. Steps are traced for
any number of examples. Statistics are held against a loop over a few examples. Writes JSON with
--json FILE.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf
from networks_tensorflow import NETWORKS, Batch, batch
from rounds import THREADS, describe, measure, options, peak, quartiles, ratio, report_peak, write

import cabs_tensorflow

# Relative error that single precision may have, over networks of millions of parameters.
TOLERANCE = 1e-4

# Microbatches in which a batch is taken for statistics from groups.
GROUPS = 4

Step = Callable[[Any, Any], Any]


def plain(data: Batch) -> Step:
    """Return a step without statistics."""

    def step(inputs: Any, targets: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(data.losses(inputs, targets))
        return loss, tape.gradient(loss, data.model.trainable_variables)

    return step


def full(data: Batch, sample: int | None = None) -> Step:
    """Return a step with exact statistics."""

    def step(inputs: Any, targets: Any) -> Any:
        with cabs_tensorflow.GradientTape() as tape:
            losses = data.losses(inputs, targets)
        variables = data.model.trainable_variables
        return tf.reduce_mean(losses), tape.gradient(losses, variables, sample=sample)

    return step


def sampled(data: Batch) -> Step:
    """Return a step with norms over some of the examples."""
    return full(data, sample=data.sample)


def in_groups(data: Batch, is_measured: bool) -> Step:
    """Return a step over microbatches."""
    gradient = plain(data)

    def step(inputs: Any, targets: Any) -> Any:
        size = tf.shape(inputs)[0] // GROUPS
        total: list[Any] = []
        statistics = cabs_tensorflow.PartialStatistics.zero()
        for start in range(GROUPS):
            part = slice(start * size, (start + 1) * size)
            # One after the other, as they are taken where memory is short.
            with tf.control_dependencies(total):
                loss, gradients = gradient(inputs[part], targets[part])
            if is_measured:
                statistics += cabs_tensorflow.PartialStatistics.of_group(size, gradients)
            shares = [one / GROUPS for one in (loss, *gradients)]
            total = [a + b for a, b in zip(total, shares, strict=True)] if total else shares
        loss, *gradients = total
        return loss, gradients, statistics.complete(gradients) if is_measured else ()

    return step


# What is measured, against what, and whether XLA compiles it.
STEPS: dict[str, tuple[Callable[[Batch], Step], Callable[[Batch], Step], bool]] = {
    "exact": (plain, full, False),
    "exact, over a sample": (plain, sampled, False),
    "exact, compiled by XLA": (plain, full, True),
    "groups, 4 microbatches": (
        partial(in_groups, is_measured=False),
        partial(in_groups, is_measured=True),
        False,
    ),
}


def traced(label: str, at: int, data: Batch) -> Callable[[], None]:
    """Return the step at a place of a row, which is traced when it is first taken."""
    signature = [
        tf.TensorSpec([None, *one.shape[1:]], one.dtype) for one in (data.inputs, data.targets)
    ]
    *makers, is_compiled = STEPS[label]
    step = tf.function(
        makers[at](data), input_signature=signature, jit_compile=is_compiled, autograph=False
    )

    def run() -> None:
        step(data.inputs, data.targets)
        tf.test.experimental.sync_devices()

    return run


def started(label: str, at: int, data: Batch) -> tuple[Callable[[], None], float]:
    """Return a step that has been taken, and the seconds that the first time took."""
    step = traced(label, at, data)
    start = time.perf_counter()
    step()
    return step, time.perf_counter() - start


def error(data: Batch) -> float:
    """Return the relative error of squared norms over a few examples."""
    few = (data.inputs[:4], data.targets[:4])
    variables = data.model.trainable_variables
    return cabs_tensorflow.verify(lambda some: data.losses(*some), few, variables).error


def limit_threads() -> None:
    """Use as many threads as a step may; to be called before TensorFlow does anything."""
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    tf.config.threading.set_inter_op_parallelism_threads(THREADS)


def main() -> int:
    """Check, measure, print, and write; return how much is wrong."""
    wrong = 0
    chosen = options(__doc__)
    limit_threads()
    # It warns of a function that is traced again and again, as each is here.
    tf.get_logger().setLevel("ERROR")
    result: dict[str, object] = {}
    for name, network in NETWORKS.items():
        data = batch(name)
        relative = error(data)
        print(f"{name}, m = {network.examples}: relative error {relative:.1e}")
        wrong += relative > TOLERANCE
        rows: dict[str, object] = {"relative error": relative}
        for label in STEPS:
            steps, starts = [], []
            for at in (0, 1):
                step, taken = started(label, at, data)
                starts.append(min(taken, started(label, at, data)[1]))
                steps.append(step)
            seconds = measure(network.pairs, *steps)
            found = ratio(*seconds)
            peaks = [peak(__file__, name, label, str(at)) for at in (0, 1)]
            memory = peaks[1] / peaks[0]
            rows[label] = {
                "on : off": found,
                "milliseconds off": quartiles([1e3 * one for one in seconds[0]]),
                "tracing and first step, on : off": starts[1] / starts[0],
                "memory, on : off": memory,
            }
            print(
                f"  {label}: on : off {found['median']:.3f} "
                f"({found['lower']:.3f} to {found['upper']:.3f}), tracing and first step "
                f"{starts[0]:.2f} to {starts[1]:.2f} s, memory {memory:.2f}"
            )
        result[name] = rows
    write(chosen, {**describe(), "networks": result})
    return wrong


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        limit_threads()
        name, label, at = sys.argv[2:]
        report_peak(lambda: traced(label, int(at), batch(name)))
    else:
        sys.exit(min(main(), 1))
