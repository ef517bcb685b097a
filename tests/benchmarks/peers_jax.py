"""What JAX itself offers for per-example statistics, beside this library, on two threads.

    python tests/benchmarks/peers_jax.py

Each jitted step returns the mean gradient and the sum of squared norms of the examples' gradients,
and is first held against this library's number. Time is a ratio to the neighbouring plain step.
Writes JSON with --json FILE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from networks_jax import NETWORKS, Network
from rounds import compare, describe, in_words, options, write
from steps_jax import Step, full, plain, run

PAIRS = 7
# How many examples' gradients are formed at once by the second peer.
CHUNK = 16


def square(gradients: Any) -> Any:
    """Return the sum of squares of all leaves."""
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients))


def vmap_of_grad(network: Network) -> Step:
    """Form the gradients of all examples at once."""
    each = jax.vmap(jax.value_and_grad(network.loss), in_axes=(None, 0))

    def step(parameters: Any, batch: Any) -> Any:
        losses, gradients = each(parameters, batch)
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), gradients)
        return (jnp.mean(losses), square(gradients)), mean

    return step


def vmap_in_chunks(network: Network) -> Step:
    """Form the gradients of some examples at a time, as memory has it."""
    each = jax.vmap(jax.value_and_grad(network.loss), in_axes=(None, 0))

    def step(parameters: Any, batch: Any) -> Any:
        count = network.examples // CHUNK
        chunks = jax.tree.map(lambda one: one.reshape(count, CHUNK, *one.shape[1:]), batch)

        def add(total: Any, chunk: Any) -> Any:
            losses, gradients = each(parameters, chunk)
            mean = jax.tree.map(
                lambda sum_, leaf: sum_ + jnp.sum(leaf, axis=0) / network.examples,
                total[0],
                gradients,
            )
            return (mean, total[1] + square(gradients)), jnp.mean(losses)

        start = (jax.tree.map(jnp.zeros_like, parameters), 0.0)
        (mean, squares), losses = jax.lax.scan(add, start, chunks)
        return (jnp.mean(losses), squares), mean

    return step


PEERS: dict[str, Callable[[Network], Step]] = {
    "vmap of grad": vmap_of_grad,
    f"vmap of grad, {CHUNK} at a time": vmap_in_chunks,
}


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    result: dict[str, object] = {
        **describe(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "threads": 2,
    }
    for name, network in NETWORKS.items():
        print(f"{name}, m = {network.examples}")
        parameters, batch = network.parameters(), network.batch(network.examples)
        steps = {"plain": plain, "cabs": full, **PEERS}
        jitted = {label: jax.jit(maker(network)) for label, maker in steps.items()}
        expected = float(jitted["cabs"](parameters, batch)[0][1].group_square_sum)
        for label in PEERS:
            found = float(jitted[label](parameters, batch)[0][1])
            assert abs(found / expected - 1.0) < 1e-3, (name, label, found, expected)
        rows = {}
        plain_step = jitted.pop("plain")
        for label, step in jitted.items():
            # Each beside the plain step alone: what others leave in memory would count for it.
            pair = (partial(run, one, parameters, batch) for one in (plain_step, step))
            ratio = compare(PAIRS, *pair)
            rows[label] = {"on : off": ratio}
            print(f"  {label}: {in_words(ratio)}")
        result[name] = rows
    write(chosen, result)


if __name__ == "__main__":
    main()
