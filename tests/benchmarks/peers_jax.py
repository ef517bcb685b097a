"""What others take for per-example statistics in JAX, beside this library, on two threads.

    python tests/benchmarks/peers_jax.py

Each jitted step returns the mean gradient and the sum of squared norms of the examples' gradients,
and is first held against this library's number. Time is a ratio to the neighbouring plain step;
memory is what the compiled step says of its temporaries, as a ratio to that of the plain one. What
a peer refuses is printed. Needs jax-privacy. Writes JSON with --json FILE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from networks_jax import NETWORKS, Network
from rounds import compare, describe, in_words, options, write
from steps_jax import Step, compiled, full, plain, run

PAIRS = 7
# How many examples' gradients are formed at once, where not all are.
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


def clipped_grad(network: Network, microbatch_size: int | None = None) -> Step:
    """Let jax-privacy take norms of gradients, of which it clips none."""
    from jax_privacy import clipped_grad

    gradient = clipped_grad(
        network.loss,
        l2_clip_norm=jnp.inf,
        normalize_by=network.examples,
        keep_batch_dim=False,
        return_values=True,
        return_grad_norms=True,
        microbatch_size=microbatch_size,
    )

    def step(parameters: Any, batch: Any) -> Any:
        mean, each = gradient(parameters, batch)
        return (jnp.mean(each.values), jnp.sum(jnp.square(each.grad_norms))), mean

    return step


PEERS: dict[str, Callable[[Network], Step]] = {
    "vmap of grad": vmap_of_grad,
    f"vmap of grad, {CHUNK} at a time": vmap_in_chunks,
    "jax-privacy, clipped_grad": clipped_grad,
    f"jax-privacy, clipped_grad, {CHUNK} at a time": partial(clipped_grad, microbatch_size=CHUNK),
}


def refusal(step: Any, parameters: Any, batch: Any, expected: float) -> str:
    """Return why a compiled step does not give the number, or nothing."""
    try:
        found = float(step(parameters, batch)[0][1])
    except jax.errors.JaxRuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return "" if abs(found / expected - 1.0) < 1e-3 else f"gives {found}, expected {expected}"


def temporaries(step: Any) -> int:
    """Return how many bytes of them a compiled step says that it takes."""
    return step.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    result: dict[str, object] = {}
    for name, network in NETWORKS.items():
        print(f"{name}, m = {network.examples}")
        data = network.parameters(), network.batch(network.examples)
        off, own = (compiled(maker(network), *data)[0] for maker in (plain, full))
        expected = float(own(*data)[0][1].group_square_sum)
        rows: dict[str, object] = {}
        for label in ("cabs", *PEERS):
            step = compiled(PEERS[label](network), *data)[0] if label in PEERS else own
            why = refusal(step, *data, expected) if label in PEERS else ""
            if why:
                rows[label] = {"refused": why}
                print(f"  {label}: {why}")
                continue
            # Each beside the plain step alone: what others leave in memory would count for it.
            ratio = compare(PAIRS, partial(run, off, *data), partial(run, step, *data))
            memory = temporaries(step) / temporaries(off)
            rows[label] = {"on : off": ratio, "memory, on : off": memory}
            print(f"  {label}: {in_words(ratio)}, memory {memory:.2f}")
        result[name] = rows
    write(chosen, {**describe(), "networks": result})


if __name__ == "__main__":
    main()
