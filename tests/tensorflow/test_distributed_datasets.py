"""Datasets that a strategy distributes give each replica its share, with the lag that is stated."""

from functools import partial

import numpy as np
import pytest
import tensorflow as tf

import cabs
import cabs_tensorflow
from tests.tensorflow.reference import draw

INPUTS, REPLICAS = draw(1, 300), 2
# Batches that the strategy holds, which docs/tensorflow.rst states; of two for a step, one less.
LAGS = {"shared": 3, "of_their_own": 2}


def shared(strategy, batches):
    return strategy.experimental_distribute_dataset(batches)


def of_their_own(strategy, batches):
    return strategy.distribute_datasets_from_function(lambda _: batches)


@pytest.mark.skipif(not tf.__version__.startswith("2.21"), reason="the lag is that of 2.21")
@pytest.mark.parametrize(("distribute", "times"), [(shared, 1), (of_their_own, REPLICAS)])
def test_sizes_are_those_of_so_many_steps_before_at_most_and_each_example_comes_once(
    mirrored, distribute, times
):
    controller = cabs.Controller(4, sizes=cabs.BatchSizes.range(4, 100))
    arrays = np.arange(len(INPUTS)), INPUTS
    batches = distribute(mirrored, cabs_tensorflow.dataset(controller, arrays, seed=0))
    with mirrored.scope():
        weight = tf.Variable([2.0], dtype="float64")

    @tf.function(input_signature=batches.element_spec)
    def step(index, x):
        def replica(index, x):
            with cabs_tensorflow.GradientTape() as tape:
                losses = weight[0] * x
            _, statistics = tape.gradient(losses, [weight], all_reduce=True)
            return index, statistics

        return mirrored.run(replica, (index, x))

    update = partial(controller.update, learning_rate=1.0, loss=1.0)
    seen, sizes, told = [], [], [controller.batch_size] * (1 + LAGS[distribute.__name__])
    for batch in batches:
        found = map(mirrored.experimental_local_results, step(*batch))
        indices, (statistics, other) = np.concatenate(next(found)), next(found)
        assert statistics.read() == other.read()
        rows = INPUTS[indices]
        np.testing.assert_allclose(statistics.variance_trace, rows.var(ddof=1), rtol=1e-10)
        np.testing.assert_allclose(statistics.loss, 2.0 * rows.mean(), rtol=1e-10)
        # In place of what was found, so that sizes grow and tell steps apart.
        trace = 6.0 + 0.7 * len(sizes)
        told.append(update(variance_trace=trace).batch_size)
        seen.extend(indices)
        sizes.append(len(indices))
    assert sorted(seen) == list(range(len(INPUTS)))
    assert len(set(told)) > 5
    # But for the end of the epoch. A thread that draws ahead may also be late.
    most = LAGS[distribute.__name__]
    for place, size in enumerate(sizes[:-times]):
        assert size in [times * one for one in told[place : place + 1 + most]], place
