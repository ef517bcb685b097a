"""Fingerprints are compared in the sum that replicas take anyway, and nothing else is."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import cabs
import cabs_tensorflow
from cabs_tensorflow.alike import BITS, bits_of, told
from tests.tensorflow.reference import draw, variable

FINGERPRINT = tf.TensorSpec([], tf.int32)
NUMBERS = st.integers(0, 2**BITS - 1)


@given(numbers=st.lists(NUMBERS, min_size=2, max_size=4), is_same=st.booleans())
@settings(max_examples=40)
def test_all_are_told_a_difference_and_none_is_told_one_that_is_not(numbers, is_same):
    if is_same:
        numbers = [numbers[0]] * len(numbers)
    sums = tf.add_n([bits_of(tf.constant(one), tf.float32) for one in numbers])
    is_alike = len(set(numbers)) == 1
    for one in numbers:
        assert int(told(tf.constant(one), sums, len(numbers))) == (one if is_alike else -1 - one)


def test_a_fingerprint_of_the_controller_has_no_more_bits_than_are_compared():
    for size in range(16, 2000):
        assert cabs.Controller(size, sizes=cabs.BatchSizes.range(16, 2048)).fingerprint < 2**BITS


@pytest.mark.parametrize("is_one_different", [False, True])
def test_one_of_as_many_replicas_as_a_sum_counts_exactly_is_seen(is_one_different):
    replicas, number = 2**24, tf.constant(2**BITS - 1)
    sums = replicas * bits_of(number, tf.float32) - tf.constant(
        [1.0 * is_one_different, *[0.0] * 19]
    )
    assert (int(told(number, sums, replicas)) < 0) == is_one_different


def step_of(strategy, dtype="float64"):
    """Return a step that measures on each replica, with a fingerprint of its own."""
    with strategy.scope():
        weight = variable(0, 4, 3, dtype=dtype)

    def replica(x, fingerprint):
        x = cabs_tensorflow.share_of(x)
        with cabs_tensorflow.GradientTape() as tape:
            losses = tf.reduce_sum(tf.tanh(x @ weight), axis=1)
        gradients, statistics = tape.gradient(
            losses, [weight], all_reduce=True, fingerprint=fingerprint
        )
        part = statistics.partial
        return statistics, (part + part).complete(gradients)

    @tf.function(input_signature=[tf.TensorSpec([None, 4], dtype), FINGERPRINT])
    def step(x, fingerprint):
        return tf.nest.map_structure(
            strategy.experimental_local_results, strategy.run(replica, (x, fingerprint))
        )

    return step, replica


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_replicas_of_one_process_are_alike(mirrored, dtype):
    step, _ = step_of(mirrored, dtype)
    for number in (0, 12345, 2**BITS - 1):
        for found in step(draw(1, 9, 4, dtype=dtype), number):
            for one in found:
                assert int(one.fingerprint) == number
                assert one.read().examples in (9, 18)
    assert step.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_statistics_of_replicas_that_differ_are_not_read(mirrored, dtype):
    _, replica = step_of(mirrored, dtype)
    numbers = 12345, 12345 ^ 2**7
    each = mirrored.experimental_distribute_values_from_function(
        lambda here: tf.constant(numbers[here.replica_id_in_sync_group])
    )

    @tf.function
    def step(x, fingerprint):
        return tf.nest.map_structure(
            mirrored.experimental_local_results, mirrored.run(replica, (x, fingerprint))
        )

    for found in step(tf.constant(draw(1, 9, 4, dtype=dtype)), each):
        for number, one in zip(numbers, found, strict=True):
            controller = cabs.Controller(16)
            with pytest.raises(RuntimeError, match=f"do not train alike.* fingerprint is {number}"):
                controller.update(one, learning_rate=0.1)
            assert controller.step == 0


def test_parts_with_a_fingerprint_and_without_add_up():
    zero = cabs_tensorflow.PartialStatistics.zero()
    alike = cabs_tensorflow.PartialStatistics(6, 6, 9.0, fingerprint=5)
    unlike = cabs_tensorflow.PartialStatistics(6, 6, 9.0, fingerprint=-6)
    gradients = [tf.constant([1.0])]
    assert (zero + zero).fingerprint is None
    assert (zero + alike + alike).complete(gradients).read().examples == 12
    for part in (zero + unlike, unlike + zero, alike + unlike, unlike + alike):
        with pytest.raises(RuntimeError, match="this one's fingerprint is 5"):
            part.complete(gradients).read()


def test_one_replica_compares_nothing():
    step, _ = step_of(tf.distribute.get_strategy())
    ((statistics,), _) = step(draw(1, 9, 4), 12345)
    assert statistics.fingerprint is None
    assert statistics.read().examples == 9


@pytest.mark.parametrize("strategy", ["one", "mirrored"])
def test_a_fingerprint_that_would_stay_as_it_was_traced_is_refused(request, strategy):
    alone = tf.distribute.get_strategy()
    used = alone if strategy == "one" else request.getfixturevalue(strategy)
    _, replica = step_of(used)
    x = tf.constant(draw(1, 8, 4))

    def step(fingerprint):
        return tf.function(lambda: used.run(replica, (x, fingerprint)))()

    with pytest.raises(TypeError, match=r"an argument, got 5; pass controller\.fingerprint"):
        step(5)
    with pytest.raises(TypeError, match="must be a tensor, integer,"):
        step(tf.constant(5.0))
    for constant in (tf.constant(5), np.array([5, 6])):
        with pytest.raises((ValueError, TypeError), match=r"takes as an argument"):
            step(constant)


@pytest.mark.parametrize(("own", "mean"), [((1.0, 4.0), 2.5), ((1.0, np.nan), None)])
def test_seconds_are_the_mean_of_all_replicas_and_unknown_if_one_is(mirrored, own, mean):
    with mirrored.scope():
        weight = variable(0, 4, 3)

    @tf.function
    def step(x, seconds):
        def replica(x, seconds):
            with cabs_tensorflow.GradientTape() as tape:
                losses = tf.reduce_sum(tf.tanh(x @ weight), axis=1)
            return tape.gradient(losses, [weight], all_reduce=True, seconds=seconds)[1]

        return mirrored.experimental_local_results(mirrored.run(replica, (x, seconds)))

    controllers = [cabs.Controller(rule=cabs.Progress()) for _ in range(2)]
    for said, expected in (((np.nan, np.nan), None), (own, mean)):
        each = mirrored.experimental_distribute_values_from_function(
            lambda here, said=said: tf.constant(said[here.replica_id_in_sync_group])
        )
        for controller, one in zip(controllers, step(draw(1, 8, 4), each), strict=True):
            assert one.seconds_before == expected
            decision = controller.update(one, learning_rate=0.1, seconds=0.5)
            assert decision.observation.seconds == expected
    with pytest.raises(TypeError, match=r"seconds must be a tensor, float,.* got 0\.5"):
        tf.function(step.python_function)(draw(1, 8, 4), 0.5)


def test_a_variable_that_the_host_sets_is_compared(mirrored):
    _, replica = step_of(mirrored)
    with mirrored.scope():
        fingerprint = tf.Variable(0, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
    x = tf.constant(draw(1, 8, 4))
    step = tf.function(lambda: mirrored.run(replica, (x, fingerprint)))
    for number in (3, 4):
        fingerprint.assign(number)
        (found, *_), _ = map(mirrored.experimental_local_results, step())
        assert int(found.fingerprint) == number
