"""What TensorFlow itself offers for per-example statistics, beside this library, on two threads.

    python tests/benchmarks/peers_tensorflow.py

Each traced step returns the mean gradient and the sum of squared norms of the examples' gradients,
and is first held against this library's number. Time is a ratio to the neighbouring plain step;
memory one of peaks, of processes of their own, above what the import of TensorFlow takes. What a
peer refuses, crashes at, or is not done with in time, is printed. Writes JSON with --json FILE.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from networks_tensorflow import NETWORKS, Batch, batch
from rounds import compare, describe, in_words, options, peak, report_peak, write
from steps_tensorflow import Step, full, limit_threads, plain

PAIRS = 5
# How many examples' gradients are formed at once; all of them would not fit everywhere.
CHUNK = 16
# How long one row may take.
MINUTES = 10


def summed(gradients: list[Any]) -> Any:
    """Return the sum of squares of all gradients."""
    return tf.add_n([tf.reduce_sum(tf.square(one)) for one in gradients])


def in_chunks(gradients_of: Callable[[Any, Any], list[Any]]) -> Step:
    """Return a step that forms the gradients of some examples at a time."""
    # Traced once: a deep network takes long to trace, and there are many chunks.
    gradients_of = tf.function(gradients_of, autograph=False)

    def step(inputs: Any, targets: Any) -> Any:
        examples = inputs.shape[0]
        mean: list[Any] = []
        squares = tf.constant(0.0)
        for start in range(0, examples, CHUNK):
            part = slice(start, start + CHUNK)
            with tf.control_dependencies([squares]):
                gradients = gradients_of(inputs[part], targets[part])
            squares += summed(gradients)
            shares = [tf.reduce_sum(one, axis=0) / examples for one in gradients]
            mean = [a + b for a, b in zip(mean, shares, strict=True)] if mean else shares
        return squares, mean

    return step


def jacobian(data: Batch) -> Step:
    """Take the tape's jacobian of the losses."""

    def gradients_of(inputs: Any, targets: Any) -> list[Any]:
        variables = data.model.trainable_variables
        with tf.GradientTape() as tape:
            losses = data.losses(inputs, targets)
        found: list[Any] = tape.jacobian(losses, variables)
        return found

    return in_chunks(gradients_of)


def vectorized_map(data: Batch) -> Step:
    """Map a gradient over the examples."""

    def of_one(one: Any) -> Any:
        with tf.GradientTape() as tape:
            (loss,) = tf.unstack(data.losses(one[0][None], one[1][None]))
        return tape.gradient(loss, data.model.trainable_variables)

    def gradients_of(inputs: Any, targets: Any) -> list[Any]:
        found: list[Any] = tf.vectorized_map(of_one, (inputs, targets))
        return found

    return in_chunks(gradients_of)


PEERS: dict[str, Callable[[Batch], Step]] = {
    f"jacobian, {CHUNK} at a time": jacobian,
    f"vectorized_map, {CHUNK} at a time": vectorized_map,
}


def traced(maker: Callable[[Batch], Step], data: Batch) -> Callable[[], Any]:
    """Return a step that is traced for its batch, when it is first taken."""
    step = tf.function(maker(data), autograph=False)

    def run() -> Any:
        found = step(data.inputs, data.targets)
        tf.test.experimental.sync_devices()
        return found

    return run


def taker(label: str, data: Batch) -> Callable[[], Any]:
    """Return a step by the name of who takes it."""
    return traced({"plain": plain, "cabs": full, **PEERS}[label], data)


def report_ratio(name: str, label: str) -> None:
    """Print the time of one peer on one network, as a ratio to the plain step."""
    limit_threads()
    data = batch(name)
    step = taker(label, data)
    if label in PEERS:
        expected = float(taker("cabs", data)()[1][1].group_square_sum)
        found = float(step()[0])
        if abs(found / expected - 1.0) > 1e-3:
            raise ValueError(f"gives {found}, expected {expected}")
    print(json.dumps(compare(PAIRS, taker("plain", data), step)))


def in_a_process(*arguments: str) -> str:
    """Return what this script prints last in a process of its own; RuntimeError if it fails."""
    command = [sys.executable, __file__, *arguments]
    try:
        run = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=60 * MINUTES
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"takes more than {MINUTES} minutes") from None
    if run.returncode:
        last = [line for line in run.stderr.splitlines() if "Error" in line][-1:]
        raise RuntimeError(f"ends with status {run.returncode} {' '.join(last)[:100]}".strip())
    return run.stdout.splitlines()[-1]


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    result: dict[str, object] = {}
    for name, network in NETWORKS.items():
        print(f"{name}, m = {network.examples}")
        rows: dict[str, object] = {}
        off = peak(__file__, name, "plain")
        for label in ("cabs", *PEERS):
            try:
                ratio = json.loads(in_a_process("--ratio", name, label))
                memory = int(in_a_process("--peak", name, label)) / off
            except RuntimeError as why:
                rows[label] = {"refused": str(why)}
                print(f"  {label}: {why}")
                continue
            rows[label] = {"on : off": ratio, "memory, on : off": memory}
            print(f"  {label}: {in_words(ratio)}, memory {memory:.2f}")
        result[name] = rows
    write(chosen, {**describe(), "networks": result})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ratio"]:
        report_ratio(*sys.argv[2:])
    elif sys.argv[1:2] == ["--peak"]:
        limit_threads()
        name, label = sys.argv[2:]
        report_peak(lambda: taker(label, batch(name)))
    else:
        main()
