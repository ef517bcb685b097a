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

RANKS, DEVICES, REPLICAS = 4, 4, 2
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
    from tests.jax.collectives import STEPS, counted

    return {f"JAX, {DEVICES} devices: {label}": counted(label) for label in STEPS}


def of_tensorflow() -> Counts:
    """Count in what a function traces for all replicas, for one of them."""
    import tensorflow as tf

    import cabs_tensorflow
    from tests.collectives import difference

    (processor,) = tf.config.list_physical_devices("CPU")
    devices = [tf.config.LogicalDeviceConfiguration()] * REPLICAS
    tf.config.set_logical_device_configuration(processor, devices)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(REPLICAS)])
    with strategy.scope():
        only = tf.VariableAggregation.ONLY_FIRST_REPLICA
        weights = [tf.Variable(tf.ones(shape), aggregation=only) for shape in ((5, 7), (7, 3))]

    def losses_of(x):
        return tf.reduce_sum((tf.tanh(x @ weights[0]) @ weights[1]) ** 2, axis=1)

    def plain(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(losses_of(x))
        context = tf.distribute.get_replica_context()
        return context.all_reduce("MEAN", tape.gradient(loss, weights))

    def measured(x):
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of(x)
        return tape.gradient(losses, weights, all_reduce=True)

    def collectives(replica):
        function = tf.function(lambda: strategy.run(replica, (tf.ones((8, 5)),)))
        found: dict[str, list[int]] = {}
        for one in function.get_concrete_function().graph.get_operations():
            if one.type.startswith("CollectiveReduce"):
                found.setdefault(one.type, []).append(one.inputs[0].shape.num_elements())
        return {kind: sizes[::REPLICAS] for kind, sizes in found.items()}

    label = f"TensorFlow, {REPLICAS} replicas: ``GradientTape``, ``all_reduce=True``"
    return {label: difference(collectives(plain), collectives(measured))}


def main() -> None:
    """Count, print, and write."""
    chosen = options(__doc__)
    steps = {**of_torch(), **of_jax(), **of_tensorflow()}
    for label, found in steps.items():
        print(label, found)
    write(chosen, {**describe(), "steps": steps})


if __name__ == "__main__":
    main()
