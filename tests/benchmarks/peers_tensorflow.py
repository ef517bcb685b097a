"""What TensorFlow itself offers for per-example statistics, beside this library, on two threads.

    python tests/benchmarks/peers_tensorflow.py

Each traced step returns the mean gradient and the sum of squared norms of the examples' gradients,
and is first held against this library's number, where no dropout draws other masks. Time is a ratio
to the neighbouring plain step. What a peer refuses, or crashes at, is printed. Writes JSON with
--json FILE.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from networks_tensorflow import NETWORKS, Batch, batch
from rounds import compare, describe, options, write
from steps_tensorflow import Step, full, plain

PAIRS = 5
# How many examples' gradients are formed at once; all of them would not fit everywhere.
CHUNK = 16


def summed(gradients: list[Any]) -> Any:
    """Return the sum of squares of all gradients."""
    return tf.add_n([tf.reduce_sum(tf.square(one)) for one in gradients])


def in_chunks(gradients_of: Callable[[Any, Any], list[Any]]) -> Step:
    """Return a step that forms the gradients of some examples at a time."""

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
    """Return a step that was traced for its batch, and taken once."""
    step = tf.function(maker(data), autograph=False)

    def run() -> Any:
        found = step(data.inputs, data.targets)
        tf.test.experimental.sync_devices()
        return found

    run()
    return run


def row(name: str, label: str) -> dict[str, float]:
    """Return the time of one peer on one network, as a ratio to the plain step."""
    data = batch(name)
    taker = {"cabs": full, **PEERS}[label]
    steps = traced(plain, data), traced(taker, data)
    if label != "cabs" and "dropout" not in name.replace("no dropout", ""):
        expected = float(traced(full, data)()[1][1].group_square_sum)
        found = float(steps[1]()[0])
        if abs(found / expected - 1.0) > 1e-3:
            raise ValueError(f"it gives {found}, expected {expected}")
    return compare(PAIRS, *steps)


def in_a_process(name: str, label: str) -> dict[str, object]:
    """Return a row from a process of its own, which may crash."""
    command = [sys.executable, __file__, "--row", name, label]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if run.returncode:
        last = [line for line in run.stderr.splitlines() if "Error" in line][-1:]
        return {"refused": f"ends with status {run.returncode} {' '.join(last)[:100]}".strip()}
    return {"on : off": json.loads(run.stdout.splitlines()[-1])}


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    result: dict[str, object] = {**describe(), "tensorflow": tf.__version__, "threads": 2}
    for name, network in NETWORKS.items():
        print(f"{name}, m = {network.examples}")
        rows = {label: in_a_process(name, label) for label in ("cabs", *PEERS)}
        for label, found in rows.items():
            print(f"  {label}: {found}")
        result[name] = rows
    write(chosen, result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        tf.config.threading.set_intra_op_parallelism_threads(2)
        tf.config.threading.set_inter_op_parallelism_threads(2)
        print(json.dumps(row(*sys.argv[2:])))
    else:
        main()
