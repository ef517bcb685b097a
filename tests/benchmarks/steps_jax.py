"""What statistics add to a jitted training step in JAX, forward and backward, on two threads.

    python tests/benchmarks/steps_jax.py

Time is a ratio of neighbouring steps, on to off, with its quartiles; so is the time to trace and
compile a step; memory is what the compiled step says of its temporaries. Statistics are held
against a loop over a few examples, and a step that waits for a device is an error, on a GPU too.
Writes JSON with --json FILE.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from networks_jax import NETWORKS, Network
from rounds import describe, measure, options, quartiles, ratio, write

import cabs_jax

# Relative error that single precision may have, over networks of millions of parameters.
TOLERANCE = 1e-4

# Microbatches in which a batch is taken for statistics from groups.
GROUPS = 4

Step = Callable[[Any, Any], Any]


def mean_loss(network: Network, parameters: Any, batch: Any) -> Any:
    """Return the mean loss of a batch."""
    return jnp.mean(jax.vmap(network.loss, in_axes=(None, 0))(parameters, batch))


def plain(network: Network) -> Step:
    """Return a step without statistics."""
    return jax.value_and_grad(partial(mean_loss, network))


def full(network: Network) -> Step:
    """Return a step with exact statistics."""
    return cabs_jax.value_and_grad(network.loss)


def sampled(network: Network) -> Step:
    """Return a step with norms over some of the examples."""
    return cabs_jax.value_and_grad(network.loss, sample=network.sample)


def in_groups(network: Network, is_measured: bool) -> Step:
    """Return a step over microbatches."""
    gradient = plain(network)
    size = network.examples // GROUPS

    def step(parameters: Any, batch: Any) -> Any:
        parts = jax.tree.map(lambda array: array.reshape(GROUPS, size, *array.shape[1:]), batch)

        def add(total: Any, part: Any) -> Any:
            loss, gradients = gradient(parameters, part)
            summed = jax.tree.map(lambda a, b: a + b / GROUPS, total[0], gradients)
            if is_measured:
                group = cabs_jax.PartialStatistics.of_group(size, gradients)
                return (summed, total[1] + group), loss
            return (summed, total[1]), loss

        zeros = jax.tree.map(jnp.zeros_like, parameters)
        start = (zeros, cabs_jax.PartialStatistics.zero())
        (gradients, parts), losses = jax.lax.scan(add, start, parts)
        return (jnp.mean(losses), parts.complete(gradients) if is_measured else ()), gradients

    return step


# What is measured, and against what.
STEPS: dict[str, tuple[Callable[[Network], Step], Callable[[Network], Step]]] = {
    "exact": (plain, full),
    "exact, over a sample": (plain, sampled),
    "groups, 4 microbatches": (
        partial(in_groups, is_measured=False),
        partial(in_groups, is_measured=True),
    ),
}


def compiled(step: Step, parameters: Any, batch: Any) -> tuple[Any, float]:
    """Return a compiled step, and the seconds that it took to trace and to compile it."""
    jax.clear_caches()
    start = time.perf_counter()
    found = jax.jit(step).lower(parameters, batch).compile()
    return found, time.perf_counter() - start


def error(network: Network, parameters: Any) -> float:
    """Return the relative error of squared norms over a few examples."""
    with jax.default_matmul_precision("highest"):
        return cabs_jax.verify(network.loss, parameters, network.batch(4)).error


def run(step: Any, parameters: Any, batch: Any) -> None:
    """Take a compiled step, and wait for it."""
    jax.block_until_ready(step(parameters, batch))


def main() -> int:
    """Check, measure, print, and write; return how much is wrong."""
    wrong = 0
    chosen = options(__doc__)
    errors: dict[str, float] = {}
    result: dict[str, object] = {}
    for name, network in NETWORKS.items():
        parameters, batch = network.parameters(), network.batch(network.examples)
        errors[name] = error(network, parameters)
        print(f"{name}, m = {network.examples}: relative error {errors[name]:.1e}")
        wrong += errors[name] > TOLERANCE
        rows: dict[str, object] = {}
        for label, makers in STEPS.items():
            runs, compiling, memory = [], [], []
            for maker in makers:
                step, seconds = compiled(maker(network), parameters, batch)
                compiling.append(min(seconds, compiled(maker(network), parameters, batch)[1]))
                memory.append(step.memory_analysis().temp_size_in_bytes)
                run(step, parameters, batch)
                with jax.transfer_guard("disallow"):
                    step(parameters, batch)
                runs.append(partial(run, step, parameters, batch))
            seconds = measure(network.pairs, *runs)
            found = ratio(*seconds)
            rows[label] = {
                "on : off": found,
                "milliseconds off": quartiles([1e3 * one for one in seconds[0]]),
                "compilation, on : off": compiling[1] / compiling[0],
                "memory, on : off": memory[1] / memory[0],
            }
            print(
                f"  {label}: on : off {found['median']:.3f} "
                f"({found['lower']:.3f} to {found['upper']:.3f}), compilation "
                f"{compiling[0]:.2f} to {compiling[1]:.2f} s, temporaries {memory[0] / 2**20:.0f} "
                f"to {memory[1] / 2**20:.0f} MiB"
            )
        result[name] = rows
    device = jax.devices()[0].device_kind
    write(chosen, {**describe(), "device": device, "relative errors": errors, "networks": result})
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
