"""Exponential averages without bias."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs.control import DebiasedAverage

smoothings = st.floats(0.0, 0.999)
finite = st.floats(-1e6, 1e6)


@given(smoothings, st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 200))
def test_the_average_of_a_constant_is_that_constant(smoothing, value, times):
    average = DebiasedAverage(smoothing)
    assert {average.update(value) for _ in range(times)} == {value}


@given(smoothings, st.lists(finite, min_size=1, max_size=60))
def test_it_is_the_weighted_mean_of_its_definition(smoothing, values):
    average = DebiasedAverage(smoothing)
    for value in values:
        average.update(value)
    weights = smoothing ** np.arange(len(values))[::-1]
    expected = np.average(values, weights=weights)
    assert average.value == pytest.approx(expected, rel=1e-9, abs=1e-9 * max(map(abs, values)))


@given(smoothings, st.lists(finite, min_size=1, max_size=60))
def test_it_is_the_usual_average_divided_by_one_minus_beta_to_the_t(smoothing, values):
    average, biased = DebiasedAverage(smoothing), 0.0
    for value in values:
        average.update(value)
        biased = smoothing * biased + (1.0 - smoothing) * value
    expected = biased / (1.0 - smoothing ** len(values))
    # Numbers of the smallest kind have few digits, and the usual average rounds them to 0.
    close = 1e-7 * max(map(abs, values)) + 1e-300
    assert average.value == pytest.approx(expected, rel=1e-7, abs=close)


def test_finite_values_never_overflow():
    average = DebiasedAverage(0.5)
    values = [1.7e308, -1.7e308, 1.0, 1.0]
    assert all(math.isfinite(average.update(value)) for value in values)


def test_a_smoothing_of_zero_keeps_the_last_value_alone():
    average = DebiasedAverage(0.0)
    assert [average.update(value) for value in (1e17, 1.0, -3e-9)] == [1e17, 1.0, -3e-9]


def test_there_is_no_average_of_nothing():
    assert math.isnan(DebiasedAverage().value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_and_leaves_no_trace(value):
    average = DebiasedAverage()
    average.update(2.0)
    with pytest.raises(ValueError, match="value must be finite"):
        average.update(value)
    assert average.value == 2.0


@pytest.mark.parametrize("smoothing", [1.0, -0.1, math.nan, 1.2])
def test_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\), got smoothing"):
        DebiasedAverage(smoothing)
