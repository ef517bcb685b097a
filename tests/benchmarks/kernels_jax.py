"""How many kernels statistics add to a jitted step in JAX, and whether any asks the host.

    python tests/benchmarks/kernels_jax.py [--json FILE]

A count, not a time: the operations of the program that XLA made of the step, a fusion being one of
them. Those in a loop are counted once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from networks_jax import NETWORKS
from rounds import describe, kernels_added, options, write
from steps_jax import STEPS

sys.path.append(str(Path(__file__).parents[2]))

from tests.jax.compiled import kernels


def main() -> None:
    """Count, print, and write."""
    chosen = options(__doc__)
    result = {}
    for name, network in NETWORKS.items():
        given = network.parameters(), network.batch(network.examples)
        parameters = len(jax.tree.leaves(given[0]))
        plain, full = (kernels(make(network), *given) for make in STEPS["exact"])
        result[name] = kernels_added(name, parameters, plain, full)
    write(chosen, {**describe(), "networks": result})


if __name__ == "__main__":
    main()
