"""Whatever is trained on several replicas, in whatever shares, is what one process trains."""

from functools import partial

import pytest
import tensorflow as tf
from hypothesis import given, settings

import cabs_tensorflow
from tests.one_process import (
    RATE,
    SPED_UP,
    STEPS,
    assert_as_one_process,
    cases,
)
from tests.tensorflow.test_strategies import spec_of


@pytest.fixture(scope="module")
def reduced():
    """Four replicas that add up on one device, so that no collectives meet those of others."""
    return tf.distribute.MirroredStrategy(
        [f"CPU:{number}" for number in range(4)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def losses_of(parameters, x, y):
    *layers, last = parameters
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        x = tf.tanh(x @ weight + bias)
    scores = tf.reduce_mean(x, axis=1) @ last
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, scores)


def group_of(parameters, x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(losses_of(parameters, x, y))
    gradients = tape.gradient(loss, parameters)
    part = cabs_tensorflow.PartialStatistics.of_group(tf.shape(x)[0], gradients)
    return part, gradients, loss


def microbatch_of(parameters, x, y):
    with cabs_tensorflow.GradientTape() as tape:
        losses = losses_of(parameters, x, y)
    gradients, statistics = tape.gradient(losses, parameters, all_reduce=True)
    return statistics.partial, gradients, statistics.loss


def summed(case, found):
    """Return parts, gradients and losses of microbatches as those of a batch, on all replicas."""
    parts, gradients, losses = zip(*found, strict=True)
    shares = [tf.cast(one.examples, case.dtype) for one in parts]
    total = [
        tf.add_n([share * one for share, one in zip(shares, of, strict=True)])
        for of in (*zip(*gradients, strict=True), losses)
    ]
    part = sum(parts[1:], start=parts[0])
    if case.way == "added":
        return part, total
    # Of one type, since TensorFlow keeps integers on the host.
    numbers = [part.examples, part.groups, part.group_square_sum]
    numbers = tf.stack([tf.cast(one, case.dtype) for one in numbers])
    numbers, *total = tf.distribute.get_replica_context().all_reduce("SUM", [numbers, *total])
    counts, square_sum = tf.cast(numbers[:2], tf.int32), numbers[2]
    return cabs_tensorflow.PartialStatistics(*tf.unstack(counts), square_sum), total


def replica(case, parameters, *microbatches):
    """Do a step on a replica, and return the statistics of all."""
    pairs = list(zip(microbatches[::2], microbatches[1::2], strict=True))
    if case.way == "exact":
        ((x, y),) = pairs
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of(parameters, x, y)
        gradients, statistics = tape.gradient(losses, parameters, all_reduce=True)
    else:
        of = group_of if case.way == "groups" else microbatch_of
        part, total = summed(case, [of(parameters, x, y) for x, y in pairs])
        *gradients, loss = [one / tf.cast(part.examples, one.dtype) for one in total]
        statistics = part.complete(gradients, loss=loss)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.assign_sub(RATE * gradient)
    return statistics


def train(strategy, case):
    with strategy.scope():
        first = tf.VariableAggregation.ONLY_FIRST_REPLICA
        parameters = [tf.Variable(one, aggregation=first) for one in case.parameters()]

    def share_of(pieces, array, context):
        return tf.constant(array[pieces[context.replica_id_in_sync_group]])

    def dealt(step, count):
        return [
            strategy.experimental_distribute_values_from_function(partial(share_of, pieces, array))
            for pieces in case.dealt(step, count)
            for array in case.data(step, count)
        ]

    controller, found = case.controller(), []
    batch = dealt(0, controller.batch_size)

    @tf.function(input_signature=spec_of(batch))
    def step(*microbatches):
        statistics = strategy.run(partial(replica, case, parameters), microbatches)
        return strategy.experimental_local_results(statistics)

    for number in range(STEPS):
        first, *others = (one.read() for one in step(*dealt(number, controller.batch_size)))
        # To the bit, since decisions hang on them.
        assert all(one == first for one in others)
        decided = controller.update(first, learning_rate=SPED_UP * RATE)
        found.append((first, decided.batch_size))
    return found, [one.numpy() for one in parameters]


@pytest.mark.parametrize("way", ["exact", "added", "groups"])
@pytest.mark.parametrize(("name", "devices"), [("mirrored", 2), ("reduced", 4)])
def test_replicas_are_one_process(request, name, devices, way):
    @given(case=cases(devices, name, [way]))
    @settings(max_examples=2)
    def check(case):
        assert_as_one_process(case, *train(request.getfixturevalue(name), case))

    check()
