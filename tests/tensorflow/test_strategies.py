"""Replicas train as one replica does on the examples of all."""

from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.distribute.values import PerReplica, PerReplicaSpec

import cabs_tensorflow
from tests.tensorflow.reference import draw, flat, gradients_one_by_one
from tests.tensorflow.test_fitting_on_replicas import INPUTS, LABELS, fit

STEPS = 3
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def examples(dtype):
    inputs = draw(1, STEPS, 12, 5, dtype=dtype)
    return inputs, np.abs(inputs[..., :3]).argmax(axis=2), draw(2, STEPS, 12, 4) > 0


class Net(tf.Module):
    """A table, which has sparse gradients, a matrix that is used twice, and a bias."""

    def __init__(self, dtype):
        super().__init__()
        first = tf.VariableAggregation.ONLY_FIRST_REPLICA

        def make(seed, *shape):
            return tf.Variable(0.5 * draw(seed, *shape, dtype=dtype), aggregation=first)

        self.variables_of_all = [make(3, 4, 5), make(4, 5, 5), make(5, 5), make(6, 5, 3)]

    def losses(self, x, y, words):
        table, matrix, bias, out = self.variables_of_all
        # Each row of words picks rows of the table, some of them twice.
        inner = x + tf.reduce_sum(tf.gather(table, tf.cast(words, tf.int32)), axis=1)
        inner = tf.tanh(tf.tanh(inner @ matrix) @ matrix + bias)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(y, inner @ out)


def in_shares(strategy, arrays, sizes):
    """Return arrays as values of replicas that have so many examples each."""
    ends = np.cumsum((0, *sizes))

    def share_of(array, context):
        number = context.replica_id_in_sync_group
        return tf.constant(array[ends[number] : ends[number + 1]])

    distribute = strategy.experimental_distribute_values_from_function
    return [distribute(partial(share_of, array)) for array in arrays]


def spec_of(values):
    """Return what such values are, with sizes that are not known while tracing."""

    def of(one):
        if isinstance(one, PerReplica):
            return PerReplicaSpec(*map(of, one.values))
        return tf.TensorSpec([None, *one.shape[1:]], one.dtype)

    return [of(one) for one in values]


def train(strategy, sizes, dtype, update, **options):
    """Return what each replica finds in three steps, and the weights after them."""
    with strategy.scope():
        net = Net(dtype)
        if update == "adam":
            optimizer = keras.optimizers.Adam(0.1, global_clipnorm=0.1, weight_decay=0.1)
            optimizer.build(net.variables_of_all)
    batches = [in_shares(strategy, one, sizes) for one in zip(*examples(dtype), strict=True)]

    @tf.function(input_signature=spec_of(batches[0]))
    def step(*batch):
        def replica(*batch):
            with cabs_tensorflow.GradientTape() as tape:
                losses = net.losses(*batch)
            gradients, statistics = tape.gradient(
                losses, net.variables_of_all, all_reduce=True, **options
            )
            if update == "adam":
                cabs_tensorflow.apply(optimizer, gradients, net.variables_of_all)
            elif update == "assign":
                for variable, gradient in zip(net.variables_of_all, gradients, strict=True):
                    variable.assign_sub(0.5 * tf.convert_to_tensor(gradient))
            return statistics, [tf.convert_to_tensor(one) for one in gradients]

        return strategy.run(replica, batch)

    found = []
    for batch in batches:
        statistics, gradients = step(*batch)
        statistics = strategy.experimental_local_results(statistics)
        gradients = [strategy.experimental_local_results(one) for one in gradients]
        found.append([(s.read(), flat(g)) for s, *g in zip(statistics, *gradients, strict=True)])
    return found, [strategy.experimental_local_results(one) for one in net.variables_of_all]


def assert_alike(found, expected, dtype):
    steps, weights = found
    for replicas, ((statistics, gradients),) in zip(steps, expected[0], strict=True):
        for other, others in replicas:
            # The same on each replica, to the bit.
            assert other == replicas[0][0]
            np.testing.assert_array_equal(others, replicas[0][1])
        mine, gradient = replicas[0]
        assert (mine.examples, mine.groups, mine.estimated) == (12, 12, statistics.estimated)
        for name in ("group_square_sum", "gradient_norm_squared", "variance_trace", "loss"):
            np.testing.assert_allclose(
                getattr(mine, name), getattr(statistics, name), rtol=TOLERANCE[dtype]
            )
        atol = TOLERANCE[dtype] * abs(gradients).max()
        np.testing.assert_allclose(gradient, gradients, rtol=TOLERANCE[dtype], atol=atol)
    for copies, (weight,) in zip(weights, expected[1], strict=True):
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])
        np.testing.assert_allclose(copies[0], weight, rtol=10 * TOLERANCE[dtype], atol=1e-5)


@pytest.mark.parametrize(
    ("shares", "dtype", "update"),
    [
        ((6, 6), "float64", "adam"),
        ((9, 3), "float64", "adam"),
        ((9, 3), "float32", "assign"),
        ((1, 11), "float64", "assign"),
        ((12, 0), "float32", "adam"),
    ],
)
def test_replicas_train_as_one(mirrored, shares, dtype, update):
    alone = train(tf.distribute.get_strategy(), (12,), dtype, update)
    assert_alike(train(mirrored, shares, dtype, update), alone, dtype)


def of_workers(strategy, _):
    """Return what ``train`` and ``fit`` find on two workers, as ``workers.run`` takes it."""
    found, _ = train(strategy, (9, 3), "float64", "adam")
    steps = [(one.variance_trace, one.loss, *gradients) for ((one, gradients),) in found]
    _, history, _, controller = fit(strategy, (INPUTS, LABELS), validate=False)
    return {"steps": steps, "fit": [controller.step, *history["loss"], *history["noise_scale"]]}


def test_statistics_cost_no_collective_of_their_own(mirrored):
    with mirrored.scope():
        net = Net("float64")
        weights = net.variables_of_all[1:]
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(weights)

    def plain(*batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(net.losses(*batch)) / 2
        optimizer.apply(tape.gradient(loss, weights), weights)

    def measured(*batch):
        with cabs_tensorflow.GradientTape() as tape:
            losses = net.losses(*batch)
        gradients, statistics = tape.gradient(losses, weights, all_reduce=True)
        cabs_tensorflow.apply(optimizer, gradients, weights)
        return statistics

    batch = [tf.constant(one[0]) for one in examples("float64")]

    def collectives(replica):
        function = tf.function(lambda: mirrored.run(replica, batch))
        operations = function.get_concrete_function().graph.get_operations()
        return sum(one.type.startswith("Collective") for one in operations)

    # One on each replica.
    assert collectives(plain) == collectives(measured) == 2


def test_a_size_that_is_known_while_tracing_is_that_of_two_examples_at_least(mirrored):
    weight = Net("float64").variables_of_all[2]

    @tf.function
    def step():
        def replica():
            with cabs_tensorflow.GradientTape() as tape:
                losses = tf.ones([1, 5], tf.float64) @ weight[:, None]
            return tape.gradient(losses[:, 0], [weight], all_reduce=True)

        return mirrored.run(replica)

    with pytest.raises(ValueError, match="got 1; where that is a replica's share"):
        step()


def test_what_sums_gradients_otherwise_is_refused(mirrored):
    with pytest.raises(TypeError, match="divided by the number of replicas"):
        mirrored.run(lambda: cabs_tensorflow.apply(object(), [], []))


def test_what_is_scaled_or_sampled_is_so_over_all_replicas(mirrored):
    exact, _ = train(mirrored, (9, 3), "float64", "assign")
    scaled, _ = train(mirrored, (9, 3), "float64", "none", loss_scale=4.0)
    sampled, _ = train(mirrored, (9, 3), "float64", "none", sample=2)
    (mine, gradients), (other, times_four) = exact[0][0], scaled[0][0]
    np.testing.assert_allclose(times_four, 4 * gradients)
    np.testing.assert_allclose(other.variance_trace, mine.variance_trace)
    assert (sampled[0][0][0].examples, sampled[0][0][0].estimated) == (12, 8)
    # Each replica estimates the sum over its own share.
    first, last = (own_sums(slice(start, start + 2)) for start in (0, 9))
    np.testing.assert_allclose(sampled[0][0][0].group_square_sum, 9 / 2 * first + 3 / 2 * last)


def own_sums(part):
    """Return the sum of squares of the gradients of some examples of the first batch."""
    net, batch = Net("float64"), [tf.constant(one[0][part]) for one in examples("float64")]
    rows = gradients_one_by_one(lambda b: net.losses(*b), net.variables_of_all, batch)
    return np.sum(rows**2)


def make_network():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 6)),
            layers.Conv1D(6, 3, padding="same", activation="relu"),
            layers.LayerNormalization(),
            layers.AveragePooling1D(2),
            layers.Reshape((2, 12)),
            layers.Dense(5),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("count", [1, 2, 13])
def test_a_batch_is_cut_into_shares(mirrored, count):
    inputs, labels = draw(1, count, 8, 6, dtype="float32"), np.arange(count) % 3

    def run(strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = make_network()

        @tf.function(
            input_signature=[
                tf.TensorSpec([None, 8, 6], tf.float32),
                tf.TensorSpec([None], tf.int64),
            ]
        )
        def step(*batch):
            def replica(*batch):
                x, y = cabs_tensorflow.share_of(batch)
                with cabs_tensorflow.GradientTape() as tape:
                    scores = model(x, training=True)
                    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, scores)
                weights = model.trainable_variables
                gradients, statistics = tape.gradient(losses, weights, all_reduce=True)
                return statistics, gradients, tf.shape(x)[0]

            return strategy.experimental_local_results(strategy.run(replica, batch))

        return step(inputs, labels)

    ((alone, expected, _),) = run(tf.distribute.get_strategy())
    first, last = run(mirrored)
    assert [int(one[2]) for one in (first, last)] == [count // 2, count - count // 2]
    assert first[0].read() == last[0].read()
    for one, other in zip(first[1], expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for name in ("group_square_sum", "gradient_norm_squared", "loss"):
        np.testing.assert_allclose(getattr(first[0], name), getattr(alone, name), rtol=1e-5)
