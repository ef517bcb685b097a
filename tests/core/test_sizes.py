"""Admissible sizes: what is allowed, and which is nearest."""

import math
from bisect import bisect_right
from itertools import count, takewhile

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cabs import BatchSizes

listed = st.sets(st.integers(1, 5000), min_size=1, max_size=40)
values = (
    st.floats(-1e4, 1e4)
    | st.floats(allow_nan=False, allow_infinity=True)
    | st.integers(0, 5000).map(lambda n: n / 2)
)
ranges = st.builds(
    lambda low, length, step: BatchSizes.range(low, low + length + step, multiple_of=step),
    st.integers(1, 500),
    st.integers(0, 3000),
    st.integers(1, 100),
)


@given(listed.map(BatchSizes) | ranges, values)
def test_nearest_is_no_farther_than_any_other_allowed_size(sizes, value):
    chosen = sizes.nearest(value)
    assert chosen in sizes
    if math.isfinite(value):
        assert all(abs(chosen - value) <= abs(other - value) for other in sizes)
    else:
        assert chosen == (sizes.maximum if value > 0 else sizes.minimum)


@given(
    st.integers(1, 400),
    st.integers(0, 1000),
    st.floats(-10.0, 2000.0) | st.integers(0, 3000).map(lambda n: n / 2),
)
def test_nearest_of_consecutive_sizes_is_rounding_half_to_even_then_clipping(low, width, value):
    sizes = BatchSizes.range(low, low + width)
    assert sizes.nearest(value) == min(max(round(value), low), low + width)


@given(listed, st.floats(0.0, 6000.0), st.floats(0.0, 6000.0))
def test_nearest_is_monotone(sizes, one, two):
    sizes = BatchSizes(sizes)
    assert sizes.nearest(min(one, two)) <= sizes.nearest(max(one, two))


@given(listed)
def test_a_range_and_a_list_of_the_same_sizes_are_equal(sizes):
    assert BatchSizes(sizes) == BatchSizes(sorted(sizes, reverse=True))
    assert list(BatchSizes(sizes)) == sorted(sizes)
    step = BatchSizes.range(7, 70, multiple_of=7)
    assert step == BatchSizes(list(step))
    assert hash(step) == hash(BatchSizes(list(step)))


@given(listed.map(BatchSizes) | ranges)
def test_sizes_go_through_json_unchanged(sizes):
    assert BatchSizes.from_json(sizes.to_json()) == sizes


@given(listed.map(BatchSizes) | ranges, st.floats(1.001, 10.0), st.data())
def test_growth_reaches_no_farther_than_allowed_and_always_the_next_size(sizes, factor, data):
    current = data.draw(st.sampled_from(list(sizes)))
    limit = sizes.limit_growth(current, factor)
    allowed = list(sizes)
    following = allowed[min(bisect_right(allowed, current), len(allowed) - 1)]
    assert limit in sizes
    assert limit >= following
    assert limit <= max(current * factor, following)


@given(st.integers(1, 100), st.integers(0, 5000), st.floats(1.01, 8.0))
@example(2, 2, 1.5)  # 4.5 is rounded to 4
def test_a_geometric_grid_starts_at_its_minimum_and_stays_below_its_maximum(low, width, factor):
    grid = BatchSizes.geometric(low, low + width, factor=factor)
    assert grid.minimum == low
    assert grid.maximum <= low + width
    powers = (round(low * factor**power) for power in count())
    assert set(grid) == set(takewhile(lambda size: size <= low + width, powers))


def test_a_geometric_grid_with_a_tiny_factor_is_every_size():
    assert BatchSizes.geometric(16, 64, factor=1.0 + 1e-9) == BatchSizes.range(16, 64)
    assert list(BatchSizes.geometric(2, 4, factor=1e308)) == [2]


def test_of_two_even_sizes_as_near_the_smaller_is_chosen():
    assert BatchSizes([16, 32]).nearest(24.0) == 16
    assert BatchSizes([15, 25]).nearest(20.0) == 15


def test_a_set_of_one_size_has_one_representation():
    for one in (BatchSizes(range(5, 6, 3)), BatchSizes.range(5, 9, multiple_of=5)):
        assert (one, one.to_json()) == (BatchSizes([5]), BatchSizes([5]).to_json())


def test_a_geometric_grid_holds_its_powers():
    assert list(BatchSizes.geometric(10, 300, factor=3)) == [10, 30, 90, 270]
    assert list(BatchSizes.geometric(1, 10, factor=1.3)) == [1, 2, 3, 4, 5, 6, 8]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BatchSizes([]), "at least one batch size, got none"),
        (lambda: BatchSizes([16, 0]), "at least 1, got a batch size = 0"),
        (lambda: BatchSizes(range(0)), "at least one batch size, got none"),
        (lambda: BatchSizes.range(32, 16), "minimum = 32 and maximum = 16"),
        (lambda: BatchSizes.range(16, 48, multiple_of=64), "no multiple of 64 lies between"),
        (lambda: BatchSizes.range(0, 48), "minimum must be at least 1, got minimum = 0"),
        (lambda: BatchSizes.geometric(16, 64, factor=1.0), "above 1, got factor = 1.0"),
        (lambda: BatchSizes.geometric(16, 64, factor=math.nan), "above 1, got factor = nan"),
        (lambda: BatchSizes.geometric(64, 16), "minimum = 64, maximum = 16"),
        (lambda: BatchSizes.geometric(16, 2**60), "nor maximum 2\\*\\*53"),
        (lambda: BatchSizes.range(1, 2**70), "maximum must be at most 2\\*\\*53"),
        (lambda: BatchSizes([2**60]), "a batch size must be at most 2\\*\\*53"),
        (
            lambda: BatchSizes([1, 2, 5]).nearest(math.nan),
            "value must be a number, got value = nan",
        ),
        (lambda: BatchSizes.from_json({"minimum": 1}), "describes no batch sizes"),
        (lambda: BatchSizes.from_json({"minimum": "a", "maximum": 2, "step": 1}), "describes no"),
        (lambda: BatchSizes.from_json("range"), "describes no batch sizes"),
    ],
)
def test_sizes_that_exclude_each_other_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("size", [16.0, "16", None, True])
def test_a_size_is_an_integer(size):
    with pytest.raises(TypeError, match="must be an integer"):
        BatchSizes([size])


def test_representations_are_readable():
    assert repr(BatchSizes.range(16, 64)) == "BatchSizes(16 to 64)"
    assert repr(BatchSizes([16, 18, 64])) == "BatchSizes([16, 18, 64])"
    assert 17.5 not in BatchSizes.range(16, 64)
    assert np.int64(17) in BatchSizes.range(16, 64)
    assert True not in BatchSizes([1, 2])
    assert len(BatchSizes.range(16, 64)) == 49
