"""The group estimate of the variance, against NumPy, and its merging."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cabs import GradientStatistics
from cabs.gradients import PartialStatistics

seeds = st.integers(0, 2**32 - 1)
partitions = st.lists(st.integers(1, 7), min_size=2, max_size=8)


def gradients_of(seed, examples, dimension=5, offset=1.0):
    random = np.random.default_rng(seed)
    return random.normal(offset, random.uniform(0.5, 2.0, dimension), (examples, dimension))


def statistics_of(gradients, sizes):
    """Compute the statistics of groups that follow one another, from their definition."""
    parts = PartialStatistics()
    for rows in np.split(gradients, np.cumsum(sizes)[:-1]):
        parts += PartialStatistics.of_group(len(rows), float(np.sum(rows.mean(axis=0) ** 2)))
    return parts.complete(gradient_norm_squared=float(np.sum(gradients.mean(axis=0) ** 2)))


def assert_close(one, two):
    assert (one.examples, one.groups) == (two.examples, two.groups)
    assert one.group_square_sum == pytest.approx(two.group_square_sum, rel=1e-12)
    assert one.gradient_norm_squared == pytest.approx(two.gradient_norm_squared, rel=1e-12)


@given(seeds, st.integers(2, 50))
def test_groups_of_one_give_the_sample_variance(seed, examples):
    gradients = gradients_of(seed, examples)
    statistics = statistics_of(gradients, [1] * examples)
    trace = gradients.var(axis=0, ddof=1).sum()
    assert statistics.variance_trace == pytest.approx(trace, rel=1e-9)
    assert statistics.biased_variance_trace == pytest.approx(gradients.var(axis=0).sum(), rel=1e-9)
    square = np.sum(gradients.mean(axis=0) ** 2) - trace / examples
    assert statistics.expected_gradient_norm_squared == pytest.approx(square, rel=1e-9, abs=1e-9)


@given(seeds, partitions)
def test_groups_give_the_between_group_mean_square(seed, sizes):
    gradients = gradients_of(seed, sum(sizes))
    means = [rows.mean(axis=0) for rows in np.split(gradients, np.cumsum(sizes)[:-1])]
    deviations = np.array(means) - gradients.mean(axis=0)
    expected = np.sum(np.array(sizes)[:, None] * deviations**2) / (len(sizes) - 1)
    assert statistics_of(gradients, sizes).variance_trace == pytest.approx(expected, rel=1e-9)


@pytest.mark.once
@pytest.mark.parametrize("sizes", [[1] * 6, [3, 3], [1, 2, 3], [5, 1], [2, 2, 1, 1]])
def test_every_estimate_is_unbiased_for_any_group_sizes(sizes):
    gradients = gradients_of(0, 20_000 * sum(sizes), dimension=3)
    truth = gradients.var(axis=0).sum()
    squared_mean = np.sum(gradients.mean(axis=0) ** 2)
    batches = [statistics_of(rows, sizes) for rows in np.split(gradients, 20_000)]
    traces = np.array([batch.variance_trace for batch in batches])
    squares = np.array([batch.expected_gradient_norm_squared for batch in batches])
    assert abs(traces.mean() - truth) < 4.0 * traces.std() / math.sqrt(len(traces))
    assert abs(squares.mean() - squared_mean) < 4.0 * squares.std() / math.sqrt(len(squares))
    assert squares.min() < 0.0


@given(seeds, st.lists(partitions, min_size=3, max_size=3))
def test_merge_is_associative_and_equals_the_statistics_of_all(seed, batches):
    a, b, c = batches
    gradients = gradients_of(seed, sum(map(sum, batches)))
    whole = statistics_of(gradients, a + b + c)
    parts = [
        statistics_of(rows, sizes).partial
        for rows, sizes in zip(
            np.split(gradients, np.cumsum([sum(a), sum(b)])), batches, strict=True
        )
    ]
    left = (parts[0] + parts[1]) + parts[2]
    right = parts[0] + (parts[1] + parts[2])
    swapped = sum(reversed(parts), PartialStatistics())
    for merged in (left, right, swapped, sum(parts)):
        assert_close(merged.complete(gradient_norm_squared=whole.gradient_norm_squared), whole)


def test_statistics_cannot_be_added_without_the_square_of_the_mean_of_all():
    statistics = GradientStatistics(4, 4, 50.0, 9.0)
    for add in (lambda: statistics + statistics, lambda: sum([statistics, statistics])):
        with pytest.raises(TypeError, match="cannot be added"):
            add()
    with pytest.raises(TypeError):
        statistics.partial + statistics


def test_a_gradient_that_was_summed_and_not_averaged_is_noticed():
    gradients = gradients_of(3, 8)
    parts = statistics_of(gradients, [1] * 8).partial
    for number in (float, np.float32):
        with pytest.raises(ValueError, match="average the gradients over all examples"):
            parts.complete(gradient_norm_squared=number(np.sum(gradients.sum(axis=0) ** 2)))
    agreeing = PartialStatistics(4, 4, 8.0)
    assert agreeing.complete(gradient_norm_squared=2.0 * 1.09).variance_trace < 0.0
    with pytest.raises(ValueError, match="average the gradients"):
        agreeing.complete(gradient_norm_squared=2.0 * 1.11)
    with pytest.raises(
        ValueError,
        match=r"gradient_norm_squared must be at least 0, got gradient_norm_squared = -5\.0",
    ):
        agreeing.complete(gradient_norm_squared=-5.0)


def test_a_negative_variance_of_measured_groups_is_an_error_and_of_estimated_ones_is_not():
    for squares in ((8.0, 9.0), (np.array([8.0, 8.0]), np.array([2.0, 9.0]))):
        with pytest.raises(ValueError, match="their variance would be negative"):
            GradientStatistics(4, 4, *squares)
        sampled = GradientStatistics(4, 4, *squares, estimated=2)
        assert np.any(np.asarray(sampled.variance_trace) < 0.0)
        completed = (sampled.partial + sampled.partial).complete(gradient_norm_squared=squares[1])
        assert completed.estimated == 4
    with pytest.raises(ValueError, match="estimated must be at least 0"):
        GradientStatistics(4, 4, 8.0, 1.0, estimated=-1)


@given(hnp.arrays(np.float64, (6, 3), elements=st.floats(-1e3, 1e3)))
def test_no_true_gradients_are_refused(gradients):
    statistics = statistics_of(gradients, [1] * 6)
    scale = max(float(np.sum(gradients**2)), 1e-300)
    assert statistics.variance_trace >= -1e-12 * scale


def test_agreeing_gradients_show_a_variance_that_cancellation_does_not_drown():
    # Signal 1e4 times the noise: the two terms of the difference agree in eight digits.
    gradients = gradients_of(5, 64, offset=0.0) + 1e4
    trace = gradients.var(axis=0, ddof=1).sum()
    assert statistics_of(gradients, [1] * 64).variance_trace == pytest.approx(trace, rel=1e-6)


def test_the_biased_trace_has_the_expectation_of_the_within_batch_one():
    statistics = GradientStatistics(8, 2, group_square_sum=48.0, gradient_norm_squared=4.0)
    assert statistics.variance_trace == 16.0
    assert statistics.biased_variance_trace == 14.0


def test_one_group_shows_no_variance():
    statistics = GradientStatistics(8, 1, 16.0, 2.0)
    assert math.isnan(statistics.variance_trace)
    assert math.isnan(statistics.noise_scale)
    assert GradientStatistics(1, 1, 2.0, 2.0).biased_variance_trace == 0.0


def test_noise_scale_is_infinite_where_noise_hides_the_gradient():
    assert GradientStatistics(2, 2, 2.0, 0.0).noise_scale == math.inf
    assert GradientStatistics(4, 4, 50.0, 9.0).noise_scale == pytest.approx(14 / 3 / (9 - 7 / 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0.0, 0.0), "examples must be at least 1"),
        ((2, 3, 0.0, 0.0), "groups = 3, examples = 2"),
        ((2, 0, 0.0, 0.0), "groups = 0, examples = 2"),
        ((2, -1, 0.0, 0.0), "groups must be at least 0"),
    ],
)
def test_impossible_counts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientStatistics(*arguments)


def test_counts_are_integers():
    with pytest.raises(TypeError, match=r"groups must be an integer, got groups = 2\.5"):
        GradientStatistics(4, 2.5, 1.0, 1.0)


def test_what_is_read_is_plain_numbers():
    read = GradientStatistics(4, 4, np.float32(50.0), np.array(9.0), loss=np.float64(2.0)).read()
    squares = read.group_square_sum, read.gradient_norm_squared, read.loss
    assert squares == (50.0, 9.0, 2.0)
    assert {type(one) for one in squares} == {float}
    two = GradientStatistics(4, 4, np.array([50.0, 8.0]), np.array([9.0, 1.0])).read()
    assert two.variance_trace.tolist() == pytest.approx([14 / 3, 4 / 3])
