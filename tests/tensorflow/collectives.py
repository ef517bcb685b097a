"""What the graph of a step has for one of two replicas, and what statistics add to that."""

import tensorflow as tf

import cabs_tensorflow
from tests.collectives import difference

REPLICAS = 2
# By what a step is called: whether controllers are compared.
STEPS = {
    "``GradientTape``, ``all_reduce=True``": False,
    "``GradientTape``, ``all_reduce=True``, ``fingerprint``": True,
}


def counted(strategy, label):
    """Return how many collectives a plain step has, and what statistics add to them."""
    with strategy.scope():
        only = tf.VariableAggregation.ONLY_FIRST_REPLICA
        weights = [tf.Variable(tf.ones(shape), aggregation=only) for shape in ((5, 7), (7, 3))]

    def losses_of(x):
        return tf.reduce_sum((tf.tanh(x @ weights[0]) @ weights[1]) ** 2, axis=1)

    def plain(x, _):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(losses_of(x))
        context = tf.distribute.get_replica_context()
        return context.all_reduce("MEAN", tape.gradient(loss, weights))

    def measured(x, fingerprint):
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of(x)
        given = {"fingerprint": fingerprint} if STEPS[label] else {}
        return tape.gradient(losses, weights, all_reduce=True, **given)

    def collectives(replica):
        spec = [tf.TensorSpec([8, 5]), tf.TensorSpec([], tf.int32)]
        function = tf.function(lambda *args: strategy.run(replica, args), input_signature=spec)
        found = {}
        for one in function.get_concrete_function().graph.get_operations():
            if one.type.startswith("Collective"):
                found.setdefault(one.type, []).append(one.inputs[0].shape.num_elements())
        return {kind: sizes[::REPLICAS] for kind, sizes in found.items()}

    return difference(collectives(plain), collectives(measured))
