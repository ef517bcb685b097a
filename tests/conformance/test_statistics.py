"""What a call may be asked for, and how what it returns adds up, whatever the framework."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cabs
from tests.conformance.networks import Network
from tests.conformance.reference import (
    assert_near,
    flat,
    gradients_one_by_one,
    statistics_of,
)
from tests.conformance.test_networks import DRAWN, assert_exact

NETWORK = Network(["matrix", "layer norm"])


def drawn(examples, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return NETWORK.parameters(rng, dtype), NETWORK.batch(rng, examples, dtype)


def weighted(gradients, sizes):
    """Return the mean over all examples of gradients that are means over some."""
    shares = [size / sum(sizes) for size in sizes]
    return {
        name: sum(share * one[name] for share, one in zip(shares, gradients, strict=True))
        for name in gradients[0]
    }


def test_mean_against_sum_the_gradient_of_an_example_is_m_times_its_share(adapter):
    parameters, batch = {"w": np.ones(1)}, {"x": np.array([1.0, 2.0, 3.0])}
    found = adapter.measure(lambda _, p, b: p["w"] * b["x"], parameters, batch)
    numbers = found.statistics.read()
    assert numbers.group_square_sum == pytest.approx(14.0)
    assert numbers.gradient_norm_squared == pytest.approx(4.0)
    assert found.loss == numbers.loss == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("inputs", "expected"), [([1.0, 2.0, 3.0], 1.0 / (4.0 - 1.0 / 3.0)), ([1.0, -1.0], np.inf)]
)
def test_the_noise_scale_can_be_asked_for_before_the_numbers_are_read(adapter, inputs, expected):
    parameters = {"w": np.ones(1, np.float32)}
    batch = {"x": np.array(inputs, np.float32)}
    found = adapter.measure(lambda _, p, b: p["w"] * b["x"], parameters, batch)
    assert float(found.statistics.noise_scale) == pytest.approx(expected)
    assert found.statistics.read().noise_scale == pytest.approx(expected)


def test_parameters_that_are_not_used_count_nothing(adapter):
    parameters, batch = drawn(4)
    with_more = {**parameters, "unused": np.ones((2, 3))}
    found = adapter.measure(NETWORK.losses_of, with_more, batch)
    rows = gradients_one_by_one(NETWORK.losses_of, parameters, batch)
    assert_near(found.statistics, statistics_of(rows), 1e-9)
    assert not found.gradients["unused"].any()


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 2), (2, 6), (1, 3)])
def test_convolutions_in_the_plane_are_exact(adapter, stride, groups):
    rng = np.random.default_rng(groups)
    parameters = {"kernel": rng.normal(size=(3, 2, 6 // groups, 6)), "bias": rng.normal(size=6)}
    batch = {"x": rng.normal(size=(4, 7, 6, 6))}

    def losses_of(ops, p, b):
        found = ops.convolve(b["x"], p["kernel"], stride=stride, groups=groups) + p["bias"]
        return ops.mean(ops.sin(found), (1, 2, 3))

    found = adapter.measure(losses_of, parameters, batch)
    rows = gradients_one_by_one(losses_of, parameters, batch)
    assert_near(found.statistics, statistics_of(rows), 1e-9)


@pytest.mark.parametrize("words", [9, 300])
def test_tied_weights_count_the_cross_terms(adapter, words):
    # A small table is materialized, a large one is not.
    rng = np.random.default_rng(0)
    parameters = {"table": 0.3 * rng.normal(size=(words, 8)), "m": rng.normal(size=(8, 8))}
    batch = {"words": rng.integers(0, 9, (3, 5)), "labels": rng.integers(0, 9, (3, 5))}

    def losses_of(ops, p, b):
        hidden = ops.tanh(ops.take(p["table"], b["words"]) @ p["m"])
        scores = hidden @ ops.transpose(p["table"], (1, 0))
        return ops.mean(ops.cross_entropy(scores, b["labels"]), (1,))

    found = adapter.measure(losses_of, parameters, batch)
    rows = gradients_one_by_one(losses_of, parameters, batch)
    assert_near(found.statistics, statistics_of(rows), 1e-9)


def test_cotangents_that_cancel_within_an_example_keep_their_digits(adapter):
    # Behind a softmax over positions they add up to zero, and the inputs are nearly the same.
    rng = np.random.default_rng(0)
    parameters = {"m": rng.normal(size=(64, 64)).astype(np.float32)}
    # Of four positions, pairs are fewer products than the gradient.
    batch = {"x": (100.0 + rng.normal(size=(4, 4, 64))).astype(np.float32)}

    def losses_of(ops, p, b):
        scores = ops.softmax(ops.total(b["x"] @ p["m"], (2,)) * 1e-4)
        return ops.total(scores * scores, (1,))

    found = adapter.measure(losses_of, parameters, batch)
    rows = gradients_one_by_one(losses_of, parameters, batch)
    assert found.statistics.read().group_square_sum == pytest.approx(np.sum(rows**2), rel=1e-2)


@pytest.mark.parametrize("length", [1, 2, 6, 70])
def test_a_wide_matrix_is_exact_at_few_positions_and_at_many(adapter, length):
    # By norms, by Gram matrices, and materialized.
    rng = np.random.default_rng(length)
    parameters = {"m": rng.normal(size=(40, 30))}
    batch = {"x": rng.normal(size=(3, length, 40))}

    def losses_of(ops, p, b):
        return ops.mean(ops.sin(b["x"] @ p["m"]), (1, 2))

    found = adapter.measure(losses_of, parameters, batch)
    rows = gradients_one_by_one(losses_of, parameters, batch)
    assert_near(found.statistics, statistics_of(rows), 1e-9)


@pytest.mark.parametrize("sample", [1, 3, 6, 50])
def test_a_sample_takes_the_norms_of_the_first_examples(adapter, sample):
    parameters, batch = drawn(6)
    found = adapter.measure(NETWORK.losses_of, parameters, batch, sample=sample)
    rows = gradients_one_by_one(NETWORK.losses_of, parameters, batch)
    kept = rows[:sample]
    numbers = found.statistics.read()
    expected = np.sum(kept**2) * len(rows) / len(kept)
    assert numbers.group_square_sum == pytest.approx(expected, rel=1e-9)
    norm_squared = np.sum(rows.mean(axis=0) ** 2)
    assert numbers.gradient_norm_squared == pytest.approx(norm_squared, rel=1e-9)
    assert (numbers.examples, numbers.groups, numbers.estimated) == (6, 6, 6 - len(kept))


def test_a_sample_is_unbiased_over_all_samples(adapter):
    parameters, batch = drawn(3)
    whole = statistics_of(gradients_one_by_one(NETWORK.losses_of, parameters, batch))
    traces = []
    for shift in range(3):
        turned = {name: np.roll(one, shift, axis=0) for name, one in batch.items()}
        found = adapter.measure(NETWORK.losses_of, parameters, turned, sample=1)
        traces.append(found.statistics.read().variance_trace)
    assert np.mean(traces) == pytest.approx(whole.variance_trace, rel=1e-9)


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (0, ValueError, "sample must be at least 1, got sample = 0"),
        (1.5, TypeError, r"sample must be an integer, got sample = 1\.5"),
    ],
)
def test_a_sample_that_makes_no_sense_is_refused(adapter, sample, error, message):
    with pytest.raises(error, match=message):
        adapter.measure(NETWORK.losses_of, *drawn(4), sample=sample)


@pytest.mark.slow
def test_exact_statistics_of_pieces_are_those_of_the_batch(adapter):
    # The limit is three at least, so that every piece has two examples, which show a variance.
    @given(st.integers(0, 2**31), st.integers(2, 11), st.integers(3, 6), st.booleans())
    @settings(max_examples=max(2, adapter.draws // 4), **DRAWN)
    def draw(seed, examples, most, is_double):
        parameters, batch = drawn(examples, seed, np.float64 if is_double else np.float32)
        pieces = cabs.split(batch, max_microbatch=most)
        sizes = [len(piece["weights"]) for piece in pieces]
        assert max(sizes) <= most
        found = [adapter.measure(NETWORK.losses_of, parameters, piece) for piece in pieces]
        gradients = weighted([one.gradients for one in found], sizes)
        part = found[0].statistics.partial
        for one in found[1:]:
            part = part + one.statistics.partial
        rows = gradients_one_by_one(NETWORK.losses_of, parameters, batch)
        rtol = 1e-9 if is_double else 1e-3
        assert_near(adapter.complete(part, gradients), statistics_of(rows), rtol)

    draw()


@pytest.mark.parametrize("sizes", [(2, 3, 2), (1, 1, 5), (4, 3)])
def test_groups_of_microbatches_are_an_analysis_of_variance(adapter, sizes):
    parameters, batch = drawn(7)
    ends = np.cumsum(sizes)
    pieces = [
        {name: one[end - size : end] for name, one in batch.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]
    gradients = [adapter.plain(NETWORK.losses_of, parameters, piece) for piece in pieces]
    parts = [adapter.of_group(size, one) for size, one in zip(sizes, gradients, strict=True)]
    mean = weighted(gradients, sizes)
    rows = gradients_one_by_one(NETWORK.losses_of, parameters, batch)
    scale = 1e-9 * np.abs(rows).max()
    np.testing.assert_allclose(flat(mean, parameters), rows.mean(axis=0), atol=scale)
    part = parts[0]
    for other in parts[1:]:
        part = part + other
    assert_near(adapter.complete(part, mean), statistics_of(rows, sizes), 1e-9)


def test_one_group_shows_no_variance(adapter):
    gradients = {"w": np.array([1.0, 2.0])}
    statistics = adapter.complete(adapter.of_group(4, gradients), gradients)
    assert np.isnan(statistics.read().variance_trace)


def test_statistics_of_two_batches_cannot_be_added(adapter):
    statistics = adapter.measure(NETWORK.losses_of, *drawn(4)).statistics
    with pytest.raises(TypeError, match=r"cannot be added|unsupported operand"):
        statistics + statistics


def test_a_controller_takes_statistics_as_they_are(adapter):
    found = adapter.measure(NETWORK.losses_of, *drawn(6))
    parts = adapter.of_group(2, found.gradients) + adapter.of_group(4, found.gradients)
    grouped = adapter.complete(parts, found.gradients, loss=found.loss)
    for statistics in (found.statistics, grouped):
        given, alone = cabs.Controller(16), cabs.Controller(16)
        decision = given.update(statistics, learning_rate=0.1)
        numbers = statistics.read()
        assert decision == alone.update(
            learning_rate=0.1, variance_trace=numbers.variance_trace, loss=numbers.loss
        )
    with pytest.raises(ValueError, match="loss must be given"):
        given.update(adapter.complete(parts, found.gradients), learning_rate=0.1)


def test_a_deep_network_is_exact(adapter):
    assert_exact(adapter, Network(["matrix"] * 12, is_tied=False), 3)
