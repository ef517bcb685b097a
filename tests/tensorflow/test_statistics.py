"""Statistics say how they were had, and nothing that was not measured is a number."""

import pytest
import tensorflow as tf

import cabs_tensorflow
from cabs_tensorflow import BatchStatistics, PartialStatistics
from tests.tensorflow.reference import draw, measured, variable


def losses_and_weight():
    weight = variable(0, 4, 3, name="weight")
    return lambda x: tf.reduce_sum(tf.tanh(x @ weight), axis=1), weight


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize(("sample", "estimated"), [(None, 0), (2, 4), (6, 0), (50, 0)])
def test_a_sample_says_how_many_examples_it_stands_for(sample, estimated, is_dynamic):
    losses_of, weight = losses_and_weight()
    batch = tf.constant(draw(1, 6, 4))
    _, found = measured(losses_of, [weight], batch, sample=sample, is_dynamic=is_dynamic)
    assert found.estimated.dtype == tf.int32
    assert found.read().estimated == estimated


def test_what_is_estimated_adds_up_over_parts():
    whole = BatchStatistics(6, 6, 9.0, 1.0, 4).partial + BatchStatistics(5, 5, 8.0, 1.0, 3).partial
    assert int(whole.estimated) == 7
    assert whole.complete([tf.constant([1.0])]).read().estimated == 7
    assert whole.complete([tf.constant([1.0])]).read().partial.estimated == 7


def test_what_is_left_out_is_not_estimated():
    part = PartialStatistics(6, 3, 9.0)
    assert int(part.estimated) == 0
    assert int((part + PartialStatistics.zero()).estimated) == 0
    assert PartialStatistics.of_group(4, [tf.constant([1.0])]).estimated.dtype == tf.int32


def test_a_sample_whose_variance_is_negative_is_read_and_measured_numbers_are_not():
    assert BatchStatistics(4, 4, 4.0, 2.0, 2).read().variance_trace < 0.0
    with pytest.raises(ValueError, match="variance would be negative"):
        BatchStatistics(4, 4, 4.0, 2.0).read()


def test_what_is_estimated_is_carried_through_a_loop():
    @tf.function
    def run():
        parts = PartialStatistics.zero()
        for _ in tf.range(3):
            parts += BatchStatistics(6, 6, 9.0, 1.0, 4).partial
        return parts

    assert (int(run().estimated), int(run().examples)) == (12, 18)


@pytest.mark.parametrize("gradients", [[], [None, None], {"weight": None}])
def test_a_group_in_which_nothing_was_measured_is_no_zero(gradients):
    with pytest.raises(ValueError, match="nothing is measured"):
        cabs_tensorflow.PartialStatistics.of_group(4, gradients)
    part = cabs_tensorflow.PartialStatistics.of_group(4, [tf.constant([1.0])])
    with pytest.raises(ValueError, match="nothing is measured"):
        part.complete(gradients)
