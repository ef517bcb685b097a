"""Datasets that a strategy distributes give each replica its share, with the lag that is stated."""

from functools import partial
from itertools import chain

import numpy as np
import pytest
import tensorflow as tf

import cabs
import cabs_tensorflow
from tests.tensorflow.reference import draw

INPUTS, REPLICAS = draw(1, 300), 2
# Batches that the strategy holds, which docs/tensorflow.rst states; of two for a step, one less.
LAGS = {"shared": 3, "of_their_own": 2}


def shared(strategy, dataset):
    return strategy.experimental_distribute_dataset(dataset(slice(None)))


def of_their_own(strategy, dataset):
    # Each worker has its own part of the examples.
    return strategy.distribute_datasets_from_function(
        lambda here: dataset(slice(here.input_pipeline_id, None, here.num_input_pipelines))
    )


def drawn(strategy, distribute):
    """Return which examples the replicas here had in each step, the sizes told, and statistics."""
    controller = cabs.Controller(4, sizes=cabs.BatchSizes.range(4, 100))
    arrays = np.arange(len(INPUTS)), INPUTS

    def dataset(mine):
        return cabs_tensorflow.dataset(controller, tuple(one[mine] for one in arrays), seed=0)

    batches = distribute(strategy, dataset)
    with strategy.scope():
        weight = tf.Variable([2.0], dtype="float64")

    @tf.function(input_signature=batches.element_spec)
    def step(index, x):
        def replica(index, x):
            with cabs_tensorflow.GradientTape() as tape:
                losses = weight[0] * x
            _, statistics = tape.gradient(losses, [weight], all_reduce=True)
            return index, statistics

        return strategy.run(replica, (index, x))

    update = partial(controller.update, learning_rate=1.0, loss=1.0)
    steps, told, found = [], [controller.batch_size], []
    for batch in batches:
        indices, statistics = map(strategy.experimental_local_results, step(*batch))
        numbers, *others = (one.read() for one in statistics)
        assert all(one == numbers for one in others)
        steps.append(np.concatenate(indices).tolist())
        found.append((numbers.variance_trace, numbers.loss))
        # In place of what was found, so that sizes grow and tell steps apart.
        told.append(update(variance_trace=6.0 + 0.7 * len(told)).batch_size)
    return steps, told, found


def drawn_by_workers(strategy, _):
    """Return what two workers draw, as ``workers.run`` takes it."""
    return {one.__name__: drawn(strategy, one) for one in (shared, of_their_own)}


def assert_lags(name, steps, told, found):
    """Assert that each example came once, was measured, and in batches of the sizes stated."""
    assert sorted(chain(*steps)) == list(range(len(INPUTS)))
    for indices, numbers in zip(steps, found, strict=True):
        rows = INPUTS[indices]
        np.testing.assert_allclose(numbers, (rows.var(ddof=1), 2.0 * rows.mean()), rtol=1e-10)
    assert len(set(told)) > 5
    times = REPLICAS if name == "of_their_own" else 1
    told = [told[0]] * LAGS[name] + told
    # But for the end of the epoch. A thread that draws ahead may also be late.
    for place, indices in enumerate(steps[:-times]):
        assert len(indices) in [times * one for one in told[place : place + 1 + LAGS[name]]], place


@pytest.mark.skipif(not tf.__version__.startswith("2.21"), reason="the lag is that of 2.21")
@pytest.mark.parametrize("distribute", [shared, of_their_own])
def test_sizes_are_those_of_so_many_steps_before_at_most_and_each_example_comes_once(
    mirrored, distribute
):
    assert_lags(distribute.__name__, *drawn(mirrored, distribute))
