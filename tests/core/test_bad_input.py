"""What the controller does with bad input, and which kinds of numbers it takes."""

import json
import math
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given

import cabs
from cabs import CABS, BatchSizes, Controller
from cabs.control import Reason
from tests.core.strategies import controllers, feed, observations, papers, strange, updated

pytestmark = pytest.mark.filterwarnings("ignore:the batch size is 1:RuntimeWarning")


# Bad input


@given(controllers(rules=papers), observations, strange, strange, strange)
def test_nothing_that_is_not_finite_reaches_the_averages(controller, observed, rate, trace, loss):
    feed(controller, observed)
    before, held = controller.state_dict()["state"], controller.held_steps
    rate = abs(rate)
    decision = controller.update(learning_rate=rate, variance_trace=trace, loss=loss)
    after = controller.state_dict()["state"]
    json.dumps(after, allow_nan=False)
    if not all(map(math.isfinite, (rate, trace, loss))):
        assert decision.held
        assert decision.raw is None
        assert decision.batch_size == before["batch_size"]
        assert controller.held_steps == held + 1
        for name in ("variance_trace", "variance_weight", "loss", "loss_weight"):
            assert after[name] == before[name]


@pytest.mark.parametrize(
    ("observation", "reason"),
    [
        ({"loss": math.nan}, Reason.LOSS_NOT_FINITE),
        ({"variance_trace": math.inf}, Reason.VARIANCE_NOT_FINITE),
        ({"variance_trace": [1.0, math.nan]}, Reason.VARIANCE_NOT_FINITE),
        ({"learning_rate": math.inf}, Reason.LEARNING_RATE_NOT_FINITE),
        ({"loss": 0.0}, Reason.LOSS_AT_FLOOR),
        ({"loss": -3.0}, Reason.LOSS_AT_FLOOR),
        ({"learning_rate": [1e300] * 2, "variance_trace": [1e300, -1e300]}, Reason.RULE_NOT_FINITE),
        ({"loss": -1e308, "learning_rate": math.nan}, Reason.LEARNING_RATE_NOT_FINITE),
    ],
)
def test_a_held_decision_says_why(observation, reason):
    decision = updated(**observation)
    assert (decision.reason, decision.held, reason.held) == (reason, True, True)
    assert (decision.batch_size, decision.raw) == (32, None)


def test_averages_that_would_overflow_are_held():
    controller = Controller.as_published()
    decision = controller.update(learning_rate=1e-300, variance_trace=1e39, loss=1.0)
    assert decision.reason is Reason.VARIANCE_NOT_FINITE
    assert decision.average_loss is None
    assert controller.held_steps == 1


def test_a_negative_loss_is_as_good_as_any_above_the_floor():
    controller = Controller(32, rule=CABS(-4.0))
    assert controller.update(learning_rate=0.1, variance_trace=1000.0, loss=-3.0).raw == 100.0


def test_a_loss_at_the_floor_still_enters_the_average():
    controller = Controller(32, smoothing=0.5)
    controller.update(learning_rate=0.1, variance_trace=900.0, loss=-1.0)
    decision = controller.update(learning_rate=0.1, variance_trace=900.0, loss=2.0)
    assert decision.average_loss == pytest.approx(1.0)
    assert decision.reason is Reason.RULE


def test_a_learning_rate_of_zero_asks_for_the_smallest_batch():
    decision = updated(learning_rate=0.0)
    assert (decision.raw, decision.batch_size, decision.reason) == (0.0, 16, Reason.MINIMUM)


def test_a_rule_that_overflows_asks_for_the_largest_batch():
    decision = updated(learning_rate=1e300, variance_trace=1e300)
    assert (decision.batch_size, decision.reason) == (2048, Reason.MAXIMUM)
    assert math.isfinite(decision.raw)
    assert updated(loss=1e-307).batch_size == updated(loss=1e-300).batch_size == 2048


def test_without_smoothing_the_last_value_alone_counts():
    controller = Controller(16, smoothing=0.0)
    controller.update(learning_rate=0.1, variance_trace=1e20, loss=1e17)
    assert controller.update(learning_rate=0.1, variance_trace=5e3, loss=1.0).raw == 500.0


def test_a_warning_that_is_an_error_changes_nothing():
    controller = Controller(1, sizes=[1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="the batch size is 1"):
            controller.update(learning_rate=0.1, variance_trace=math.nan, loss=1.0)
    assert (controller.step, controller.held_steps) == (0, 0)


def test_no_other_size_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller = Controller(2, sizes=[1, 2])
        controller.update(learning_rate=0.1, variance_trace=math.nan, loss=1.0)


def test_one_example_alone_is_held_and_warned_about():
    statistics = cabs.GradientStatistics(1, 1, 3.0, 3.0)
    controller = Controller(1, sizes=BatchSizes.range(1, 8))
    with pytest.warns(RuntimeWarning, match="one example shows no variance"):
        decision = controller.update(
            learning_rate=0.1, variance_trace=statistics.variance_trace, loss=1.0
        )
    assert decision.reason is Reason.VARIANCE_NOT_FINITE


@pytest.mark.parametrize(
    ("observation", "error", "message"),
    [
        ({"learning_rate": -0.1}, ValueError, r"at least 0, got learning_rate = -0\.1"),
        ({"learning_rate": [0.1, 0.2]}, ValueError, "2 learning rates for 1 traces"),
        ({"variance_trace": []}, ValueError, "variance_trace must hold at least one number"),
        ({"variance_trace": None}, ValueError, "variance_trace is missing at step 0"),
        ({"loss": [1.0]}, TypeError, "loss must be a number"),
        ({"loss": np.ones(2)}, ValueError, "loss must be one number, got an array of 1 dim"),
        ({"variance_trace": np.ones((2, 2))}, ValueError, "an array of 2 dimensions"),
        ({"loss": "1.0"}, TypeError, "loss must be a number, got loss = '1.0'"),
        ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a number or a sequence"),
        ({"learning_rate": True}, TypeError, "learning_rate must be a number"),
        ({"variance_trace": 1j}, TypeError, "variance_trace must be a number"),
        ({"learning_rate": [math.nan, -0.1]}, ValueError, r"got learning_rate = -0\.1"),
        ({"loss": np.bool_(True)}, TypeError, "loss must be a number"),
        ({"loss": np.array(True)}, TypeError, "loss must be a number"),
        ({"loss": np.array("1.5")}, TypeError, "loss must be a number"),
        ({"loss": 10**400}, ValueError, "loss must be within the range of a float"),
        ({"variance_trace": {"a": 1.0}}, TypeError, "a sequence of numbers, got {'a'"),
    ],
)
def test_an_observation_that_makes_no_sense_raises_and_changes_nothing(observation, error, message):
    controller = Controller(32)
    with pytest.raises(error, match=message):
        controller.update(
            **{"learning_rate": 0.1, "variance_trace": 9.0, "loss": 1.0, **observation}
        )
    assert controller.state_dict() == Controller(32).state_dict()


def test_the_number_of_parameter_groups_does_not_change():
    controller = Controller(32)
    controller.update(learning_rate=0.1, variance_trace=[1.0, 2.0], loss=1.0)
    with pytest.raises(ValueError, match="2 as in the steps before, got 3"):
        controller.update(learning_rate=0.1, variance_trace=[1.0, 2.0, 3.0], loss=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"batch_size": 8},
            r"one of the sizes allowed, BatchSizes\(16 to 2048\), got batch_size = 8",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got batch_size = 0"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got smoothing = 1\.0"),
        ({"hysteresis": -0.1}, r"hysteresis must be at least 0 and finite, got hysteresis = -0\.1"),
        ({"max_growth": 1.0}, r"max_growth must be above 1 and finite, got max_growth = 1\.0"),
        ({"every": 0}, "every must be at least 1, got every = 0"),
        ({"sizes": []}, "sizes must hold at least one batch size"),
    ],
)
def test_a_configuration_error_names_the_argument_and_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Controller(**{"batch_size": 16, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 16.0},
        {"debias": 1},
        {"every": "2"},
        {"rule": "CABS"},
        {"sizes": 64},
        {"sizes": "16"},
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused(arguments):
    with pytest.raises(TypeError, match="must be"):
        Controller(**{"batch_size": 16, **arguments})


# Numbers of any kind


class Variable:
    """A 0-d variable of TensorFlow: iterable, with a shape and no number of axes."""

    def __init__(self, value):
        self.value, self.shape = value, ()

    def numpy(self):
        return np.float32(self.value)

    def __iter__(self):
        raise TypeError("Cannot iterate over a scalar tensor.")


class Tensor:
    """A 0-d or 1-d tensor of a framework that is not NumPy."""

    def __init__(self, values):
        self.values, self.ndim = values, int(isinstance(values, list))

    def item(self):
        return self.values

    def tolist(self):
        return self.values

    def __float__(self):
        raise AssertionError("a tensor that requires gradients warns when it is made a float")


@pytest.mark.parametrize(
    "number",
    [
        float,
        np.float64,
        np.float32,
        np.array,
        Fraction,
        Decimal,
        Tensor,
        Variable,
        np.int64,
        lambda n: int(n),
    ],
)
def test_numbers_of_any_kind_are_taken(number):
    expected = Controller(32).update(learning_rate=2.0, variance_trace=64.0, loss=1.0)
    given = Controller(32).update(
        learning_rate=number(2.0), variance_trace=number(64.0), loss=number(1.0)
    )
    assert given == expected


@pytest.mark.parametrize("numbers", [list, tuple, np.array, Tensor, lambda n: map(np.float32, n)])
def test_sequences_of_any_kind_are_taken(numbers):
    decision = updated(learning_rate=numbers([0.5, 0.25]), variance_trace=numbers([64.0, 128.0]))
    assert decision.observation.learning_rate == (0.5, 0.25)
    assert decision.observation.variance_trace == (64.0, 128.0)
    assert all(type(value) is float for value in decision.observation.variance_trace)


def test_a_decision_cannot_be_changed():
    with pytest.raises(AttributeError):
        updated().batch_size = 3
