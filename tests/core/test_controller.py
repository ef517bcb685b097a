"""The controller: what it decides, and why."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cabs
from cabs import CABS, BatchSizes, Controller
from cabs.control import DebiasedAverage, Reason, cabs_rule
from tests.core.strategies import controllers, feed, observations, ordinary, papers, updated

pytestmark = pytest.mark.filterwarnings("ignore:the batch size is 1:RuntimeWarning")

GOLDEN = Path(__file__).parents[1] / "golden" / "published_decisions.json"


# The rule


@given(st.lists(ordinary, min_size=1, max_size=30), st.floats(0.0, 0.99))
def test_a_decision_is_the_rule_of_the_averages_moved_to_the_nearest_size(observed, smoothing):
    controller = Controller(16, smoothing=smoothing, rule=CABS(-1.0))
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


@given(
    controllers(largest_every=1, rules=papers),
    observations,
    *(positive, positive, positive, positive, positive),
)
def test_decisions_are_monotone_in_learning_rate_and_variance_and_antitone_in_loss(
    controller, before, rate, trace, loss, more, factor
):
    feed(controller, before)
    saved, configuration = controller.state_dict(), controller.configuration
    loss += max(configuration.rule.loss_floor, 0.0)

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
            or larger.observation.loss < configuration.rule.loss_floor
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
    controller, variance, loss = Controller(16, debias=False, rule=CABS(-1.0)), 0.0, 1.0
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


def statistics(**changed):
    return cabs.GradientStatistics(
        **{"examples": 4, "groups": 4, "group_square_sum": 50.0, "gradient_norm_squared": 9.0}
        | changed
    )


def test_statistics_are_the_numbers_that_they_hold():
    given, alone = cabs.Controller(16), cabs.Controller(16)
    decision = given.update(statistics(loss=0.02), learning_rate=0.1)
    assert decision == alone.update(learning_rate=0.1, variance_trace=14 / 3, loss=0.02)
    # What the loop says of the loss counts.
    decision = given.update(statistics(loss=0.02), learning_rate=0.1, loss=0.01)
    assert decision == alone.update(learning_rate=0.1, variance_trace=14 / 3, loss=0.01)


def test_the_published_controller_takes_the_biased_variance_of_statistics():
    given, alone = cabs.Controller.as_published(), cabs.Controller.as_published()
    decision = given.update(statistics(loss=0.5), learning_rate=0.1)
    assert decision == alone.update(learning_rate=0.1, variance_trace=3.5, loss=0.5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, ValueError, "loss must be given"),
        ((statistics(),), {}, ValueError, "loss must be given"),
        ((statistics(),), {"variance_trace": 1.0, "loss": 1.0}, ValueError, "beside statistics"),
        ((0.5,), {"loss": 1.0}, TypeError, "got float; give a number as variance_trace="),
    ],
)
def test_what_is_missing_or_given_twice_is_an_error(arguments, options, error, message):
    controller = cabs.Controller(16)
    with pytest.raises(error, match=message):
        controller.update(*arguments, learning_rate=0.1, **options)
    assert controller.step == 0
