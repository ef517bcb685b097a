"""The rules, against their equations."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs.control import cabs_rule, noise_scale_rule, norm_test

positive = st.floats(1e-6, 1e6)


@given(positive, positive, positive, st.floats(-10.0, 10.0))
def test_cabs_is_learning_rate_times_trace_over_loss_above_the_floor(rate, trace, excess, floor):
    loss = floor + excess
    expected = rate * trace / (loss - floor) if loss > floor else math.inf
    asked = cabs_rule(learning_rate=rate, variance_trace=trace, loss=loss, loss_floor=floor)
    assert asked == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=5), positive)
def test_parameter_groups_add_up(groups, loss):
    rates, traces = zip(*groups, strict=True)
    expected = sum(rate * trace for rate, trace in groups) / loss
    asked = cabs_rule(learning_rate=rates, variance_trace=traces, loss=loss)
    assert asked == pytest.approx(expected, rel=1e-12)


def test_one_learning_rate_serves_all_groups():
    assert cabs_rule(learning_rate=0.1, variance_trace=[10.0, 20.0], loss=1.0) == pytest.approx(3.0)


@pytest.mark.parametrize("loss", [0.5, 0.25, -1.0])
def test_a_loss_at_or_under_the_floor_asks_for_everything(loss):
    asked = cabs_rule(learning_rate=0.1, variance_trace=10.0, loss=loss, loss_floor=0.5)
    assert asked == math.inf


def test_more_learning_rates_than_traces_are_refused():
    with pytest.raises(ValueError, match="got 2 learning rates and 1 traces"):
        cabs_rule(learning_rate=[0.1, 0.2], variance_trace=3.0, loss=0.0)


@given(positive, positive, st.floats(0.01, 10.0))
def test_at_the_norm_test_size_the_relative_deviation_is_theta(trace, square, theta):
    size = norm_test(variance_trace=trace, gradient_norm_squared=square, theta=theta)
    assert math.sqrt(trace / size / square) == pytest.approx(theta, rel=1e-9)


@given(positive, positive)
def test_the_noise_scale_is_the_norm_test_with_theta_one(trace, square):
    arguments = {"variance_trace": trace, "gradient_norm_squared": square}
    assert noise_scale_rule(**arguments) == norm_test(**arguments, theta=1.0)


@pytest.mark.parametrize("square", [0.0, -1.0])
def test_noise_that_hides_the_gradient_asks_for_everything(square):
    assert noise_scale_rule(variance_trace=1.0, gradient_norm_squared=square) == math.inf
    assert norm_test(variance_trace=1.0, gradient_norm_squared=square) == math.inf


@pytest.mark.parametrize(
    "names",
    [("variance_trace",), ("gradient_norm_squared",), ("variance_trace", "gradient_norm_squared")],
)
@pytest.mark.parametrize("square", [0.0, 1.0])
def test_rules_of_nan_are_nan(names, square):
    arguments = {
        "variance_trace": 1.0,
        "gradient_norm_squared": square,
        **dict.fromkeys(names, math.nan),
    }
    assert math.isnan(noise_scale_rule(**arguments))
    assert math.isnan(norm_test(**arguments, theta=0.5))


@pytest.mark.parametrize("name", ["learning_rate", "variance_trace", "loss", "loss_floor"])
@pytest.mark.parametrize("loss", [0.0, 1.0])
def test_the_cabs_rule_of_nan_is_nan(name, loss):
    arguments = {"learning_rate": 0.1, "variance_trace": 1.0, "loss": loss, name: math.nan}
    assert math.isnan(cabs_rule(**arguments))


def test_a_tiny_theta_asks_for_much():
    assert norm_test(variance_trace=1.0, gradient_norm_squared=1.0, theta=1e-200) == math.inf


def test_theta_is_positive():
    with pytest.raises(ValueError, match=r"theta must be above 0 and finite, got theta = 0\.0"):
        norm_test(variance_trace=1.0, gradient_norm_squared=1.0, theta=0.0)
