"""Two workers train as one process does, or see an error, each of them and in the same step."""

from itertools import chain

import numpy as np
import pytest
import tensorflow as tf

from tests.tensorflow.compared import CASES
from tests.tensorflow.test_distributed_datasets import assert_lags
from tests.tensorflow.test_fitting_on_replicas import INPUTS, LABELS, fit
from tests.tensorflow.test_strategies import train
from tests.tensorflow.workers import run

pytestmark = pytest.mark.slow

ALONE = tf.distribute.get_strategy()


@pytest.fixture(scope="module")
def found():
    """Return what each worker found."""
    places = (
        "compared:compared",
        "compared:timed",
        "test_distributed_datasets:drawn_by_workers",
        "test_strategies:of_workers",
    )
    return run(*(f"tests.tensorflow.{one}" for one in places))


def test_workers_train_as_one(found):
    first, second = (one["of_workers"] for one in found)
    # The same numbers on each, to the bit.
    assert first == second
    alone, _ = train(ALONE, (12,), "float64", "adam")
    for step, ((statistics, gradients),) in zip(first["steps"], alone, strict=True):
        expected = statistics.variance_trace, statistics.loss, *gradients
        np.testing.assert_allclose(step, expected, rtol=1e-8, atol=1e-10)
    _, history, _, controller = fit(ALONE, (INPUTS, LABELS), validate=False)
    expected = controller.step, *history["loss"], *history["noise_scale"]
    np.testing.assert_allclose(first["fit"], expected, rtol=1e-3)


@pytest.mark.parametrize("name", [one for one in CASES if one.endswith("alike")])
def test_workers_that_are_alike_take_the_steps_of_one_process(found, name):
    (sizes, error), other = (one["compared"][name] for one in found)
    assert [sizes, error] == other
    assert error is None
    # In single precision a size may be rounded to its neighbour.
    np.testing.assert_allclose(sizes, CASES[name](ALONE, 0)[0], rtol=0, atol=1)
    assert max(sizes) > 8


@pytest.mark.parametrize("name", [one for one in CASES if not one.endswith("alike")])
def test_a_difference_is_an_error_on_every_worker_in_the_same_step(found, name):
    (sizes, error), (others, other) = (one["compared"][name] for one in found)
    # Where rates differ, the controllers do so after the first update.
    assert len(sizes) == len(others) == ("rates" in name)
    for one in (error, other):
        assert one.startswith("the workers do not train alike: their controllers differ")
    assert error != other


@pytest.mark.skipif(not tf.__version__.startswith("2.21"), reason="the lag is that of 2.21")
@pytest.mark.parametrize("name", ["shared", "of_their_own"])
def test_datasets_of_workers_have_the_lag_of_replicas(found, name):
    (steps, told, numbers), other = (one["drawn_by_workers"][name] for one in found)
    assert [told, numbers] == other[1:]
    steps = [list(chain(*both)) for both in zip(steps, other[0], strict=True)]
    assert_lags(name, steps, told, numbers)


@pytest.mark.parametrize("name", ["loop", "fit", "fit in groups"])
def test_workers_whose_clocks_differ_take_the_mean_of_the_step_before(found, name):
    (sizes, error, seen, cost), other = (one["timed"][name] for one in found)
    assert [sizes, error, seen, cost] == other
    assert error is None
    # A watch shows nothing at its first lap, which in fit is before the first step.
    first = 2 if name == "loop" else 1
    laps = 2e-3 * (1 + np.arange(len(sizes) - first))
    assert seen[:first] == [None] * first
    np.testing.assert_allclose(seen[first:], laps, rtol=1e-6)
    assert max(sizes) > 8
    assert cost is not None
