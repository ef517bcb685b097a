"""Streaming moments, against float64 NumPy over all rows at once."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import GradientStatistics
from cabs.gradients import GradientMoments

seeds = st.integers(0, 2**32 - 1)
cuts = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 2)
offsets = st.sampled_from([0.0, 1.0, -1e4, 1e8])
scales = st.sampled_from([1e-12, 1e-3, 1.0, 1e6])


def rows_of(seed, count, shape, offset=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(size=(count, *shape)) * scale + offset


def moments_of(*chunks):
    moments = GradientMoments()
    for chunk in chunks:
        moments.update(chunk)
    return moments


def assert_agrees_with_numpy(moments, rows):
    # What float64 itself cannot hold of the rows no algorithm can give back.
    resolution = (np.abs(rows).max() * 2.0**-53) ** 2 * len(rows)
    shape = rows.shape[1:]
    variance = rows.var(axis=0, ddof=1)
    assert moments.groups == moments.examples == len(rows)
    assert moments.mean.shape == moments.variance.shape == shape
    np.testing.assert_allclose(
        moments.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-15 * np.abs(rows).max()
    )
    np.testing.assert_allclose(moments.variance, variance, rtol=1e-9, atol=4 * resolution)
    assert moments.variance_trace == pytest.approx(
        variance.sum(), rel=1e-9, abs=4 * resolution * rows[0].size
    )


@given(seeds, cuts, st.sampled_from([(), (1,), (4,), (2, 3)]), offsets, scales)
def test_chunks_of_any_size_agree_with_numpy_under_bad_scaling(seed, sizes, shape, offset, scale):
    rows = rows_of(seed, sum(sizes), shape, offset, scale)
    assert_agrees_with_numpy(moments_of(*np.split(rows, np.cumsum(sizes)[:-1])), rows)


@given(seeds, cuts, offsets, scales)
def test_merging_agrees_with_numpy_in_any_order(seed, sizes, offset, scale):
    rows = rows_of(seed, sum(sizes), (3,), offset, scale)
    parts = [moments_of(chunk) for chunk in np.split(rows, np.cumsum(sizes)[:-1])]
    for order in (parts, parts[::-1]):
        whole = GradientMoments()
        for part in order:
            whole.merge(part)
        assert_agrees_with_numpy(whole, rows)


@given(seeds, st.lists(st.integers(1, 6), min_size=2, max_size=8))
def test_rows_that_are_means_of_groups_give_the_group_estimate(seed, sizes):
    rows = rows_of(seed, sum(sizes), (4,), offset=1.0)
    means = np.array([part.mean(axis=0) for part in np.split(rows, np.cumsum(sizes)[:-1])])
    moments = GradientMoments()
    moments.update(means[:1], sizes=sizes[:1])
    moments.update(means[1:], sizes=np.array(sizes[1:]))
    square_sum = float(np.sum(np.array(sizes) * np.sum(means**2, axis=1)))
    gradient_norm_squared = float(np.sum(rows.mean(axis=0) ** 2))
    expected = GradientStatistics(sum(sizes), len(sizes), square_sum, gradient_norm_squared)
    assert moments.variance_trace == pytest.approx(expected.variance_trace, rel=1e-9)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-9)
    assert moments.statistics.variance_trace == pytest.approx(expected.variance_trace, rel=1e-9)
    assert moments.statistics.groups == len(sizes)
    assert moments.statistics.examples == sum(sizes)


def test_an_offset_a_trillion_times_the_deviation_does_not_cancel():
    deviations = np.array([[-1.0], [0.0], [1.0]]) * 2.0**-10
    assert moments_of(deviations + 2.0**30).variance_trace == 2.0**-20
    assert moments_of(*(row[None] + 2.0**30 for row in deviations)).variance_trace == 2.0**-20


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32])
def test_narrow_types_are_accumulated_in_float64(dtype):
    rows = (np.random.default_rng(0).normal(size=(500, 3)) * 50).astype(dtype)
    expected = rows.astype(np.float64).var(axis=0, ddof=1).sum()
    assert moments_of(rows[:100], rows[100:]).variance_trace == pytest.approx(expected, rel=1e-12)


def test_the_callers_arrays_are_left_alone():
    rows = np.arange(6.0).reshape(3, 2)
    moments = moments_of(rows)
    np.testing.assert_array_equal(rows, np.arange(6.0).reshape(3, 2))
    other = GradientMoments()
    other.merge(moments)
    rows[:] = 100.0
    np.testing.assert_array_equal(moments.mean, [2.0, 3.0])
    moments.update([[2.0, 3.0]])
    assert other.groups == 3
    np.testing.assert_array_equal(other.variance, [4.0, 4.0])
    moments.mean[:] = 7.0
    np.testing.assert_array_equal(moments.mean, [2.0, 3.0])


def test_one_row_shows_no_variance():
    moments = moments_of([[1.0, 2.0]])
    assert math.isnan(moments.variance_trace)
    assert np.isnan(moments.variance).all()
    with pytest.raises(ValueError, match="examples must be at least 1"):
        GradientMoments().statistics  # noqa: B018


@pytest.mark.parametrize(
    ("gradients", "sizes", "message"),
    [
        (np.zeros((2, 4)), None, r"shape \(n, \*\(3,\)\)"),
        (1.0, None, "leading axis of examples"),
        (np.zeros((2, 3)), [1], r"sizes must have shape \(2,\)"),
        (np.zeros((2, 3)), [1, 0], "sizes must be positive integers"),
        (np.zeros((2, 3)), [1.0, 2.0], "sizes must be positive integers"),
    ],
)
def test_rows_that_do_not_fit_are_refused(gradients, sizes, message):
    moments = moments_of(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=message):
        moments.update(gradients, sizes=sizes)
    assert moments.groups == 1


def test_moments_of_other_shapes_do_not_merge():
    with pytest.raises(ValueError, match=r"shape \(3,\) cannot take in those of shape \(2,\)"):
        moments_of(np.zeros((1, 3))).merge(moments_of(np.zeros((1, 2))))
