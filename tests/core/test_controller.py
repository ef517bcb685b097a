"""The controller: what it decides, why, and what it does with bad input."""

import json
import math
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cabs
from cabs import BatchSizes, Controller, DebiasedAverage, Reason, cabs_rule
from tests.core.strategies import controllers, feed, observations, ordinary, strange

pytestmark = pytest.mark.filterwarnings("ignore:the batch size is 1:RuntimeWarning")

GOLDEN = Path(__file__).parents[1] / "golden" / "published_decisions.json"


def updated(**observation):
    controller = Controller(32)
    return controller.update(
        **{"learning_rate": 0.1, "variance_trace": 900.0, "loss": 1.5, **observation}
    )


# The rule


@given(st.lists(ordinary, min_size=1, max_size=30), st.floats(0.0, 0.99))
def test_a_decision_is_the_rule_of_the_averages_moved_to_the_nearest_size(observed, smoothing):
    controller = Controller(16, smoothing=smoothing, loss_floor=-1.0)
    variance, loss = DebiasedAverage(smoothing), DebiasedAverage(smoothing)
    for observation in observed:
        decision = controller.update(**observation)
        assert decision.average_variance_trace == variance.update(observation["variance_trace"])
        assert decision.average_loss == loss.update(observation["loss"])
        asked = cabs_rule(
            learning_rate=observation["learning_rate"],
            variance_trace=variance.value,
            loss=loss.value,
            loss_floor=-1.0,
        )
        assert decision.raw == asked
        assert decision.batch_size == min(max(round(asked), 16), 2048)
        assert controller.batch_size == decision.batch_size


positive = st.floats(1e-3, 1e3)


@given(controllers(largest_every=1), observations, positive, positive, positive, positive, positive)
def test_decisions_are_monotone_in_learning_rate_and_variance_and_antitone_in_loss(
    controller, before, rate, trace, loss, more, factor
):
    feed(controller, before)
    saved, configuration = controller.state_dict(), controller.configuration
    loss += max(configuration.loss_floor, 0.0)

    def decided(**observation):
        twin = Controller.from_configuration(configuration)
        twin.load_state_dict(saved)
        return twin.update(**observation)

    base = decided(learning_rate=rate, variance_trace=trace, loss=loss)
    for larger in (
        decided(learning_rate=rate * (1.0 + factor), variance_trace=trace, loss=loss),
        decided(learning_rate=rate, variance_trace=trace + more, loss=loss),
        decided(learning_rate=rate, variance_trace=trace, loss=loss / (1.0 + factor)),
    ):
        if (
            base.held
            or larger.held
            or base.raw < 0.0
            or larger.observation.loss < configuration.loss_floor
        ):
            continue
        assert larger.raw >= base.raw
        assert larger.batch_size >= base.batch_size


def test_parameter_groups_are_averaged_one_by_one_and_summed_by_the_rule():
    controller = Controller(16, smoothing=0.5)
    controller.update(learning_rate=(0.1, 0.2), variance_trace=(100.0, 300.0), loss=1.0)
    decision = controller.update(learning_rate=(0.3, 0.1), variance_trace=(400.0, 300.0), loss=1.0)
    assert decision.raw == pytest.approx(0.3 * 300.0 + 0.1 * 300.0)
    assert decision.average_variance_trace == pytest.approx(600.0)


def test_it_decides_as_the_published_code_does_in_tensorflow():
    golden = json.loads(GOLDEN.read_text())["decisions"]
    controller = Controller.as_published()
    for expected in golden:
        observation = {name: expected[name] for name in ("learning_rate", "variance_trace", "loss")}
        decision = controller.update(**observation)
        assert (decision.raw, decision.batch_size) == (expected["raw"], expected["batch_size"])
    assert {min(g["batch_size"] for g in golden), max(g["batch_size"] for g in golden)} == {
        16,
        2048,
    }


def test_the_published_rule_takes_parameter_groups_too():
    controller, grouped = Controller.as_published(), Controller.as_published()
    one = controller.update(learning_rate=0.5, variance_trace=3e4, loss=1.0)
    many = grouped.update(
        learning_rate=[0.5, 0.25, 0.5], variance_trace=[1e4, 2e4, 1.5e4], loss=1.0
    )
    assert many.raw == pytest.approx(one.raw * (0.5 + 0.5 + 0.75) / 1.5, rel=1e-6)
    assert many.batch_size == 875
    same = Controller.as_published().update(learning_rate=0.5, variance_trace=[1e4, 2e4], loss=1.0)
    assert same.raw == one.raw


@given(st.lists(ordinary, min_size=1, max_size=20))
def test_without_debiasing_averages_start_at_no_variance_and_a_loss_of_one(observed):
    controller, variance, loss = Controller(16, debias=False, loss_floor=-1.0), 0.0, 1.0
    for observation in observed:
        decision = controller.update(**observation)
        variance = 0.95 * variance + (1.0 - 0.95) * observation["variance_trace"]
        loss = 0.95 * loss + (1.0 - 0.95) * observation["loss"]
        assert (decision.average_variance_trace, decision.average_loss) == (variance, loss)


# Sizes


@given(controllers(), observations)
def test_the_batch_size_is_always_an_allowed_one(controller, observed):
    for decision in feed(controller, observed):
        assert decision.batch_size in controller.configuration.sizes
        assert 0.0 < decision.learning_rate_factor <= 1.0


@pytest.mark.parametrize(
    ("trace", "size", "reason"),
    [
        (1000.0, 100, Reason.RULE),
        (10.0, 16, Reason.MINIMUM),
        (-50.0, 16, Reason.MINIMUM),
        (1e6, 512, Reason.MAXIMUM),
    ],
)
def test_a_decision_says_which_bound_it_met(trace, size, reason):
    controller = Controller(32, sizes=BatchSizes.range(16, 512))
    decision = controller.update(learning_rate=0.1, variance_trace=trace, loss=1.0)
    assert (decision.batch_size, decision.reason) == (size, reason)


def test_above_the_maximum_the_learning_rate_factor_keeps_the_coupling():
    controller = Controller(32, sizes=BatchSizes.range(16, 512))
    decision = controller.update(learning_rate=0.1, variance_trace=1e5, loss=2.0)
    effective = 0.1 * decision.learning_rate_factor
    assert effective * 1e5 / decision.batch_size == pytest.approx(2.0)
    held = controller.update(learning_rate=0.1, variance_trace=math.nan, loss=2.0)
    assert held.learning_rate_factor == decision.learning_rate_factor
    assert updated().learning_rate_factor == 1.0


@pytest.mark.parametrize(
    ("settings", "size"), [({"max_growth": 2.0}, 32), ({"hysteresis": 100.0}, 16)]
)
def test_the_factor_is_that_of_the_size_chosen_whatever_kept_it_small(settings, size):
    controller = Controller(16, sizes=BatchSizes.range(16, 64), **settings)
    decision = controller.update(learning_rate=0.1, variance_trace=1e4, loss=1.0)
    assert (decision.batch_size, decision.learning_rate_factor) == (size, size / decision.raw)


@pytest.mark.parametrize(("trace", "size"), [(160.0, 16), (5120.0, 512)])
def test_a_value_that_is_just_allowed_meets_no_bound(trace, size):
    controller = Controller(32, sizes=BatchSizes.range(16, 512))
    decision = controller.update(learning_rate=0.1, variance_trace=trace, loss=1.0)
    assert (decision.raw, decision.batch_size, decision.reason) == (size, size, Reason.RULE)


def test_hysteresis_keeps_the_size_until_the_margin_is_passed():
    controller = Controller(64, sizes=BatchSizes.geometric(16, 256), hysteresis=0.1, smoothing=0.0)

    def asked(raw):
        return controller.update(learning_rate=1.0, variance_trace=raw, loss=1.0)

    # Half way between 64 and 128 lies 96; with a margin of a tenth, 105.6.
    assert (asked(100.0).batch_size, asked(100.0).reason) == (64, Reason.HYSTERESIS)
    assert (asked(106.0).batch_size, controller.batch_size) == (128, 128)
    assert (asked(90.0).batch_size, asked(90.0).reason) == (128, Reason.HYSTERESIS)
    assert asked(85.0).batch_size == 64


def test_growth_is_limited_but_never_stuck_on_a_coarse_grid():
    controller = Controller(16, sizes=[16, 64, 65, 512], max_growth=1.5)
    observation = {"learning_rate": 1.0, "variance_trace": 1e4, "loss": 1.0}
    decisions = [controller.update(**observation) for _ in range(4)]
    assert [decision.batch_size for decision in decisions] == [64, 65, 512, 512]
    assert [decision.reason for decision in decisions] == [
        Reason.GROWTH,
        Reason.GROWTH,
        Reason.MAXIMUM,
        Reason.MAXIMUM,
    ]
    shrunk = controller.update(learning_rate=0.0, variance_trace=1.0, loss=1.0)
    assert shrunk.batch_size == 16


# Measuring every k-th step


def test_every_k_steps_the_variance_is_due():
    controller = Controller(16, every=3)
    due = []
    for _ in range(7):
        due.append(controller.due)
        trace = {"variance_trace": 100.0} if controller.due else {}
        controller.update(learning_rate=0.1, loss=1.0, **trace)
    assert due == [True, False, False, True, False, False, True]


def test_between_measurements_the_loss_and_the_learning_rate_still_count():
    controller = Controller(16, every=2, smoothing=0.0)
    controller.update(learning_rate=0.1, variance_trace=1000.0, loss=1.0)
    assert controller.update(learning_rate=0.2, loss=0.5).raw == 400.0


def test_a_measurement_that_was_held_is_due_again():
    controller = Controller(16, every=3)
    controller.update(learning_rate=0.1, variance_trace=math.inf, loss=1.0)
    assert controller.due
    with pytest.raises(ValueError, match="variance_trace is missing at step 1"):
        controller.update(learning_rate=0.1, loss=1.0)
    assert controller.step == 1


# Bad input


@given(controllers(), observations, strange, strange, strange)
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
    controller = Controller(32, loss_floor=-4.0)
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
        ({"loss_floor": math.inf}, "loss_floor must be finite, got loss_floor = inf"),
        ({"hysteresis": -0.1}, r"hysteresis must be at least 0 and finite, got hysteresis = -0\.1"),
        ({"max_growth": 1.0}, r"max_growth must be above 1 and finite, got max_growth = 1\.0"),
        ({"every": 0}, "every must be at least 1, got every = 0"),
        ({"sizes": []}, "sizes must hold at least one batch size"),
        ({"loss_floor": 10**400}, "loss_floor must be within the range of a float"),
    ],
)
def test_a_configuration_error_names_the_argument_and_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Controller(**{"batch_size": 16, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 16.0}, {"debias": 1}, {"every": "2"}, {"sizes": 64}, {"sizes": "16"}],
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
