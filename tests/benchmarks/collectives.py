"""How many collectives statistics add to a step over several devices, and of how many numbers.

    python tests/benchmarks/collectives.py [--json FILE]

Counts, not times: what PyTorch's profiler sees of four processes that train together by gloo, what
the program has that JAX compiles for four devices, and the graph that TensorFlow traces for two
replicas.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from rounds import describe, options, write

sys.path.append(str(Path(__file__).parents[2]))
# Read when the frameworks are loaded.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

RANKS = 4
Counts = dict[str, dict[str, int]]


def of_torch() -> Counts:
    """Count in processes, which are started before anything is computed in this one."""
    from tests.torch.collectives import STEPS, counted
    from tests.torch.gloo import Ranks

    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(RANKS, Path(folder))
        found = {}
        for label in STEPS:
            one, *others = ranks.all(counted, label)
            assert all(other == one for other in others), label
            found[f"PyTorch, {RANKS} ranks: {label}"] = one
        ranks.end()
    return found


def of_jax() -> Counts:
    """Count in what is compiled for a batch that lies on all devices."""
    from tests.jax.collectives import DEVICES, STEPS, counted

    return {f"JAX, {DEVICES} devices: {label}": counted(label) for label in STEPS}


def of_tensorflow() -> Counts:
    """Count in what a function traces for all replicas, for one of them."""
    import tensorflow as tf

    from tests.tensorflow.collectives import REPLICAS, STEPS, counted

    (processor,) = tf.config.list_physical_devices("CPU")
    devices = [tf.config.LogicalDeviceConfiguration()] * REPLICAS
    tf.config.set_logical_device_configuration(processor, devices)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(REPLICAS)])
    return {
        f"TensorFlow, {REPLICAS} replicas: {label}": counted(strategy, label) for label in STEPS
    }


def main() -> None:
    """Count, print, and write."""
    chosen = options(__doc__)
    steps = {**of_torch(), **of_jax(), **of_tensorflow()}
    for label, found in steps.items():
        print(label, found)
    write(chosen, {**describe(), "steps": steps})


if __name__ == "__main__":
    main()
