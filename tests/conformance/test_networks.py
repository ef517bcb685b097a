"""Statistics and gradients of networks drawn block by block, against complex steps in NumPy."""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conformance import operations
from tests.conformance.networks import BLOCKS, LENGTH, Network
from tests.conformance.reference import assert_near, flat, gradients_one_by_one, statistics_of

# A network is compiled for each draw, so that to shrink one that fails would take minutes.
DRAWN = {
    "phases": [Phase.reuse, Phase.generate],
    "suppress_health_check": [HealthCheck.too_slow],
}


def assert_exact(adapter, network, examples, *, seed=0, dtype=np.float64, rtol=1e-9):
    """Assert that statistics are the reference's, and gradients those of the plain step."""
    rng = np.random.default_rng(seed)
    parameters, batch = network.parameters(rng, dtype), network.batch(rng, examples, dtype)
    found = adapter.measure(network.losses_of, parameters, batch)
    rows = gradients_one_by_one(network.losses_of, parameters, batch)
    assert_near(found.statistics, statistics_of(rows), rtol)
    loss = network.losses_of(operations, parameters, batch).mean()
    assert found.loss == pytest.approx(loss, rel=rtol)
    scale = np.abs(rows).max()
    gradients = flat(found.gradients, parameters)
    np.testing.assert_allclose(gradients, rows.mean(axis=0), rtol, atol=rtol * scale)
    plain = adapter.plain(network.losses_of, parameters, batch)
    for name, one in plain.items():
        assert found.gradients[name].dtype == one.dtype
        slack = adapter.ulps * np.finfo(dtype).eps
        np.testing.assert_allclose(
            found.gradients[name], one, slack, atol=slack * np.abs(one).max(), err_msg=name
        )


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_each_block_is_exact(adapter, name):
    assert_exact(adapter, Network([name]), 4)


def test_a_network_is_exact_in_each_way_that_it_is_called(any_adapter):
    assert_exact(any_adapter, Network(["attention", "convolution", "matrix"], again=[2]), 4)


@pytest.mark.slow
def test_drawn_networks_are_exact(adapter):
    @given(
        st.integers(0, 2**31),
        st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
        st.lists(st.integers(0, 3), max_size=2),
        st.booleans(),
        # As many positions as examples in many draws.
        st.sampled_from([2, LENGTH, LENGTH, 6]),
    )
    @settings(max_examples=adapter.draws, **DRAWN)
    def draw(seed, names, again, is_tied, examples):
        network = Network(names, again=again, is_tied=is_tied)
        assert_exact(adapter, network, examples, seed=seed)

    draw()


@pytest.mark.slow
def test_drawn_networks_in_single_precision_are_exact_to_rounding(adapter):
    @given(st.integers(0, 2**31), st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3))
    @settings(max_examples=adapter.draws // 2, **DRAWN)
    def draw(seed, names):
        assert_exact(adapter, Network(names), 4, seed=seed, dtype=np.float32, rtol=2e-3)

    draw()
