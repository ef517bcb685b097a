"""On several replicas a number is that of the batch, or there is an error."""

import numpy as np
import pytest
import tensorflow as tf

import cabs_tensorflow
from tests.tensorflow.reference import draw, flat, gradients_one_by_one, variable

REPLICAS = 2
# Of 5 and 9 examples: a mean of means is not the mean.
BATCH = draw(1, 14, 4)
SHARES = [BATCH[:5], BATCH[5:]]


@pytest.fixture(scope="module")
def weight(mirrored):
    with mirrored.scope():
        return variable(0, 4, 3, name="weight")


def losses_of(x, weight):
    return tf.reduce_sum(tf.tanh(x @ weight), axis=1)


def run(strategy, replica):
    """Return what a function returns on each replica, from that replica's share."""
    shares = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(SHARES[context.replica_id_in_sync_group])
    )

    @tf.function
    def step(x):
        return strategy.run(replica, (x,))

    return tf.nest.map_structure(strategy.experimental_local_results, step(shares))


def own_group(x, weight):
    """Return a replica's part, and the mean gradient of its share."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(losses_of(x, weight))
    gradients = tape.gradient(loss, [weight])
    return cabs_tensorflow.PartialStatistics.of_group(tf.shape(x)[0], gradients), gradients


def expected_trace():
    """Return the variance between the two shares, in float64."""
    single = variable(0, 4, 3)
    rows = gradients_one_by_one(lambda x: losses_of(x, single), [single], tf.constant(BATCH))
    spread = [
        len(rows[part]) * np.sum((rows[part].mean(axis=0) - rows.mean(axis=0)) ** 2)
        for part in (slice(5), slice(5, 14))
    ]
    return sum(spread) / (REPLICAS - 1), rows.mean(axis=0)


def test_replicas_as_groups_give_the_variance_of_the_batch_with_one_all_reduce(mirrored, weight):
    def replica(x):
        part, gradients = own_group(x, weight)
        context = tf.distribute.get_replica_context()
        share = tf.cast(part.examples, tf.float64)
        numbers = [share, tf.cast(part.groups, tf.float64), part.group_square_sum]
        *sums, total = context.all_reduce("SUM", [tf.stack(numbers), share * gradients[0]])
        examples, groups, square_sum = tf.unstack(sums[0])
        mean = [total / examples]
        whole = cabs_tensorflow.PartialStatistics(
            tf.cast(examples, tf.int32), tf.cast(groups, tf.int32), square_sum
        )
        return whole.complete(mean).variance_trace, mean[0]

    traces, means = run(mirrored, replica)
    trace, mean = expected_trace()
    for found, gradient in zip(traces, means, strict=True):
        np.testing.assert_allclose(found, trace, rtol=1e-10)
        np.testing.assert_allclose(flat([gradient]), mean, rtol=1e-10)


def test_parts_of_all_replicas_add_up_outside_of_them(mirrored, weight):
    @tf.function
    def step(x):
        return mirrored.run(own_group, (x, weight))

    shares = mirrored.experimental_distribute_values_from_function(
        lambda context: tf.constant(SHARES[context.replica_id_in_sync_group])
    )
    parts, gradients = step(shares)
    parts = mirrored.experimental_local_results(parts)
    gradients = mirrored.experimental_local_results(gradients[0])
    mean = sum(len(share) / 14 * one for share, one in zip(SHARES, gradients, strict=True))
    found = (parts[0] + parts[1]).complete([mean]).read()
    assert (found.examples, found.groups) == (14, 2)
    np.testing.assert_allclose(found.variance_trace, expected_trace()[0], rtol=1e-10)
    with pytest.raises(ValueError, match="groups of 1 of 2 replicas"):
        parts[0].complete([mean])


def test_exact_statistics_of_one_replica_out_of_several_are_refused(mirrored, weight):
    def replica(x):
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of(x, weight)
        return tape.gradient(losses, [weight])[1].variance_trace

    with pytest.raises(ValueError, match=r"one of 2 replicas.*all_reduce=True"):
        run(mirrored, replica)


@pytest.mark.parametrize("is_added", [False, True])
def test_a_replicas_own_groups_are_not_completed(mirrored, weight, is_added):
    def replica(x):
        part, gradients = own_group(x, weight)
        if is_added:
            part += cabs_tensorflow.PartialStatistics.zero(tf.float64) + part
        return part.complete(gradients).variance_trace

    with pytest.raises(ValueError, match=r"groups of 1 of 2 replicas.*one all_reduce"):
        run(mirrored, replica)


def test_sums_over_replicas_are_not_completed_with_a_replicas_own_gradient(mirrored, weight):
    def replica(x):
        part, gradients = own_group(x, weight)
        numbers = [tf.cast(part.examples, tf.float64), part.group_square_sum]
        context = tf.distribute.get_replica_context()
        examples, square_sum = tf.unstack(context.all_reduce("SUM", tf.stack(numbers)))
        whole = cabs_tensorflow.PartialStatistics(tf.cast(examples, tf.int32), REPLICAS, square_sum)
        return whole.complete(gradients).variance_trace

    with pytest.raises(ValueError, match="must be those of the batch, got those of one of 2"):
        run(mirrored, replica)


def test_variables_of_a_strategy_outside_of_its_replicas_are_refused(mirrored, weight):
    @tf.function
    def step(x):
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of(x, weight)
        return tape.gradient(losses, [weight])

    with mirrored.scope(), pytest.raises(ValueError, match=r"outside of strategy\.run"):
        step(tf.constant(BATCH))


def test_gradients_that_are_not_reduced_are_refused(mirrored, weight):
    @tf.function
    def step(x):
        return mirrored.run(lambda x: own_group(x, weight)[1], (x,))

    shares = mirrored.experimental_distribute_values_from_function(
        lambda context: tf.constant(SHARES[context.replica_id_in_sync_group])
    )
    with pytest.raises(ValueError, match="values of several replicas"):
        cabs_tensorflow.PartialStatistics.of_group(14, step(shares))


def test_a_strategy_of_one_replica_is_measured_as_ever():
    alone = tf.distribute.MirroredStrategy(["CPU:0"])
    with alone.scope():
        weight = variable(0, 4, 3)

    @tf.function
    def step(x):
        def replica(x):
            with cabs_tensorflow.GradientTape() as tape:
                losses = losses_of(x, weight)
            return tape.gradient(losses, [weight])[1]

        return alone.run(replica, (x,))

    single = variable(0, 4, 3)
    rows = gradients_one_by_one(lambda x: losses_of(x, single), [single], tf.constant(BATCH))
    found = step(tf.constant(BATCH))
    np.testing.assert_allclose(found.variance_trace, rows.var(axis=0, ddof=1).sum(), rtol=1e-10)
