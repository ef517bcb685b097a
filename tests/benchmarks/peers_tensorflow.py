"""What TensorFlow itself offers for per-example statistics, beside this library, on two threads.

    python tests/benchmarks/peers_tensorflow.py

Each traced step returns the mean gradient and the sum of squared norms of the examples' gradients,
and is first held against this library's number. Time is a ratio to the neighbouring plain step.
What a peer refuses is printed. Writes JSON with --json FILE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from networks_tensorflow import NETWORKS, Batch, batch
from rounds import describe, measure, options, quartiles, write
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


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    tf.config.threading.set_intra_op_parallelism_threads(2)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    result: dict[str, object] = {**describe(), "tensorflow": tf.__version__, "threads": 2}
    for name, network in NETWORKS.items():
        print(f"{name}, m = {network.examples}")
        data, rows = batch(name), {}
        runs = {"plain": traced(plain, data), "cabs": traced(full, data)}
        expected = float(runs["cabs"]()[1][1].group_square_sum)
        for label, peer in PEERS.items():
            try:
                run = traced(peer, data)
            except Exception as error:
                rows[label] = {"refused": f"{type(error).__name__}: {str(error)[:100]}"}
                print(f"  {label}: {rows[label]['refused']}")
                continue
            found = float(run()[0])
            # Dropout draws other masks.
            if "no dropout" in name or "encoder" not in name:
                assert abs(found / expected - 1.0) < 1e-3, (name, label, found, expected)
            runs[label] = run
        plain_step = runs.pop("plain")
        for label, run in runs.items():
            # Each beside the plain step alone: what others leave in memory would count for it.
            base, taken = measure(PAIRS, plain_step, run)
            ratio = quartiles([b / a for a, b in zip(base, taken, strict=True)])
            rows[label] = {"on : off": ratio}
            print(
                f"  {label}: {ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})"
            )
        result[name] = rows
    write(chosen, result)


if __name__ == "__main__":
    main()
