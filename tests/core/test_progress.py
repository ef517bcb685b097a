"""The rule for the least time: its curve of the loss, its formula, and what it gains."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import (
    CABS,
    BatchSizes,
    Controller,
    GradientStatistics,
    NoiseScale,
    NormTest,
    Progress,
)
from cabs.control.curve import decay_exponent, decrease, extended, mean_loss, steps_in

WIDE = BatchSizes.range(1, 10**6)


def curve_of(losses):
    curve = ()
    for loss in losses:
        curve = extended(curve, loss)
    return curve


@given(st.lists(st.floats(-10.0, 10.0), max_size=300), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_curve_holds_the_means_of_what_it_has_seen(losses, start, stop):
    curve, steps = curve_of(losses), len(losses)
    assert steps_in(curve) == steps
    assert len(curve) <= 9 * max(1.0, math.log2(steps + 1))
    lengths = [length for length, _ in curve]
    assert all(8 * one <= max(sum(lengths[:at]), 8) for at, one in enumerate(lengths))
    start, stop = sorted((start * steps, stop * steps))
    if stop - start < 1e-3:
        return
    # As a staircase, each step of which has its loss; a bucket at either end is flattened.
    edges = np.arange(steps + 1)
    cumulative = np.concatenate([[0.0], np.cumsum(losses)])
    exact = np.diff(np.interp([start, stop], edges, cumulative))[0] / (stop - start)
    longest = max(length for length, _ in curve)
    assert mean_loss(curve, start, stop) == pytest.approx(
        exact, abs=1e-9 + 20.0 * 2 * longest / (stop - start) * (longest > 1)
    )


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 300, 5000])
def test_the_exponent_of_a_power_law_is_found(exponent, steps):
    curve = curve_of([3.0 * (k + 0.5) ** -exponent for k in range(steps)])
    assert decay_exponent(curve, 0.0) == pytest.approx(exponent, rel=0.05)
    # Relative to a floor that is known.
    raised = curve_of([7.0 + 3.0 * (k + 0.5) ** -exponent for k in range(steps)])
    assert decay_exponent(raised, 7.0) == pytest.approx(exponent, rel=0.05)


@pytest.mark.parametrize("steps", [90, 900, 9000])
def test_the_exponent_is_that_of_the_means_over_two_stretches(steps):
    # Bent, so that other stretches have other exponents.
    losses = 0.1 + 0.05 * (np.arange(1, steps + 1) / steps) ** -0.7
    late, early = losses[steps // 3 :].mean(), losses[steps // 9 : steps // 3].mean()
    curve = curve_of(losses.tolist())
    expected = math.log(early / late) / math.log(3.0)
    assert decay_exponent(curve, 0.0) == pytest.approx(expected, rel=0.02)
    assert decrease(curve) == pytest.approx((early - late) / math.log(3.0), rel=0.02)
    # After as many steps before, whose losses nobody knows, the stretches lie closer together.
    apart = math.log((steps + 2 / 3 * steps) / (steps + 2 / 9 * steps))
    told = (apart / math.log(3.0)) ** 2
    expected = told * math.log(early / late) / apart + (1.0 - told) * 0.5
    assert decay_exponent(curve, 0.0, steps) == pytest.approx(expected, rel=0.02)


def test_the_first_steps_a_rising_loss_and_a_loss_of_any_sign():
    assert decay_exponent(curve_of([1.0] * 7), 0.0) == 1.0
    assert decay_exponent(curve_of(range(1, 50)), 0.0) == 0.05
    assert decay_exponent(curve_of([-1.0] * 50), 0.0) == 0.05
    assert decrease(curve_of([1.0] * 7)) == 0.0
    assert decrease(curve_of(range(50))) < 0.0
    falling = [-math.log(k + 1.0) for k in range(400)]
    # Per e-fold of the steps it falls by one.
    assert decrease(curve_of(falling)) == pytest.approx(1.0, rel=0.02)


def fed(rule, losses, *, rate=0.1, trace=100.0, square=None, sizes=WIDE):
    controller = Controller(16, sizes=sizes, rule=rule, smoothing=0.0)
    given_square = {} if square is None else {"expected_gradient_norm_squared": square}
    for loss in losses:
        decision = controller.update(
            learning_rate=rate, variance_trace=trace, loss=loss, **given_square
        )
    return controller, decision


def test_without_overhead_and_for_a_root_it_is_the_paper():
    losses = [5.0 * (k + 0.5) ** -0.5 for k in range(2000)]
    _, paper = fed(CABS(), losses)
    _, ours = fed(Progress(overhead=0.0), losses)
    assert ours.raw == pytest.approx(paper.raw, rel=0.03)


@given(st.floats(0.0, 1e5), st.floats(1e-3, 10.0), st.floats(1e-3, 1e6), st.booleans())
def test_the_size_solves_its_equation(overhead, rate, trace, is_adaptive):
    rule = Progress(overhead, adaptive=is_adaptive)
    square = 2.0 if is_adaptive else None
    _, decision = fed(rule, [4.0], rate=rate, trace=trace, square=square)
    # In the first steps the exponent is 1, so that the decrease is the loss.
    noise, size = rate * trace / (2.0 * 4.0), decision.raw
    grown = trace / (trace + 2.0 * 16 * square) if is_adaptive else 0.0
    left, right = size**2 - size * (grown * overhead + noise), noise * overhead
    assert left == pytest.approx(right, rel=1e-6, abs=1e-9 * (size**2 + 1.0))


def test_a_costly_step_a_larger_rate_and_slower_progress_ask_for_more():
    losses = [5.0 * (k + 0.5) ** -0.5 for k in range(200)]
    raw = lambda *given, **options: fed(*given, **options)[1].raw  # noqa: E731
    usual = raw(Progress(100.0), losses)
    assert raw(Progress(1000.0), losses) > usual
    assert raw(Progress(100.0), losses, rate=0.2) > usual
    slower = [losses[-1] * ((k + 0.5) / 199.5) ** -0.2 for k in range(200)]
    assert raw(Progress(100.0), slower) > usual
    assert raw(Progress(100.0, adaptive=True), losses, square=0.01) > usual


def test_a_rate_of_zero_asks_for_the_smallest_size():
    _, decision = fed(Progress(100.0), [1.0] * 20, rate=0.0, sizes=BatchSizes.range(8, 64))
    assert decision.batch_size == 8


def test_a_loss_below_its_floor_that_does_not_fall_is_held():
    controller, decision = fed(Progress(100.0), [-1.0] * 20)
    assert decision.held
    assert decision.reason.value == "no progress"
    assert decision.batch_size == controller.batch_size == 16
    # It goes on as soon as the loss falls, whatever its sign.
    for step in range(20):
        decision = controller.update(learning_rate=0.1, variance_trace=100.0, loss=-2.0 - step)
    assert not decision.held


@pytest.mark.parametrize("overhead", [0.0, 512.0])
def test_a_loss_that_passes_zero_is_measured_by_differences(overhead):
    # It falls by 0.5 per e-fold of the steps, as of a density, and is 0 after 400 of them.
    losses = [0.5 * math.log(400.0 / (step + 1.0)) for step in range(2000)]
    controller = Controller(16, sizes=WIDE, rule=Progress(overhead=overhead, loss_floor=None))
    given = [
        controller.update(learning_rate=0.1, variance_trace=100.0, loss=loss) for loss in losses
    ]
    assert [decision.held for decision in given] == [step < 7 for step in range(2000)]
    q = 0.1 * 100.0 / (2.0 * 0.5)
    expected = 0.5 * q + math.sqrt(0.25 * q * q + q * overhead)
    asked = [decision.raw for decision in given[200:]]
    assert asked == pytest.approx([expected] * len(asked), rel=0.1)


def test_a_loss_without_a_floor_that_does_not_fall_holds_the_size():
    _, last = fed(Progress(loss_floor=None, overhead=8.0), [1.0] * 20)
    assert last.reason.value == "no progress"


def test_the_rate_factor_is_the_one_for_which_the_size_is_asked():
    sizes = BatchSizes.range(8, 64)
    _, decision = fed(Progress(500.0), [0.5], rate=1.0, trace=1000.0, sizes=sizes)
    assert decision.batch_size == 64
    rate = decision.learning_rate_factor
    _, lowered = fed(Progress(500.0), [0.5], rate=rate, trace=1000.0, sizes=sizes)
    assert lowered.raw == pytest.approx(64.0)


@pytest.mark.parametrize("rule", [Progress(300.0), NormTest(0.7), NoiseScale(), CABS(0.5)])
def test_a_controller_goes_through_json_in_the_middle_of_a_run(rule):
    random = np.random.default_rng(0)
    controllers = [Controller(16, rule=rule), Controller(16, rule=rule)]
    for step in range(60):
        numbers = {"learning_rate": 0.1, "variance_trace": random.uniform(50.0, 90.0)}
        numbers["loss"] = 2.0 + 3.0 / (step + 1.0)
        if rule.needs_gradient:
            numbers["expected_gradient_norm_squared"] = random.uniform(0.5, 1.0)
        first, second = (one.update(**numbers) for one in controllers)
        assert first == second
        saved = json.loads(json.dumps(controllers[1].state_dict()))
        controllers[1] = Controller(16, rule=rule)
        controllers[1].load_state_dict(saved)


@pytest.mark.parametrize(
    ("rule", "given_square", "message"),
    [
        (NoiseScale(), None, "must be given with the variance where the rule needs it"),
        (CABS(), 1.0, "and only there"),
        (Progress(10.0), 1.0, "and only there"),
    ],
)
def test_a_gradient_that_is_missing_or_of_no_use_is_refused(rule, given_square, message):
    with pytest.raises(ValueError, match=message):
        Controller(16, rule=rule).update(
            learning_rate=0.1,
            variance_trace=1.0,
            loss=1.0,
            expected_gradient_norm_squared=given_square,
        )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Progress(-1.0), ValueError, r"overhead must be at least 0, got overhead = -1\.0"),
        (lambda: Progress(math.inf), ValueError, "overhead must be finite, got overhead = inf"),
        (lambda: Progress(1.0, adaptive=1), TypeError, "adaptive must be a bool"),
        (lambda: CABS(math.nan), ValueError, "loss_floor must be finite, got loss_floor = nan"),
        (lambda: CABS("low"), TypeError, "loss_floor must be a number"),
        (lambda: NormTest(0.0), ValueError, "theta must be above 0 and finite"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def time_to(target, size_of, overhead, *, scale=10.0, exponent=0.6, noise=40.0):
    """Return the time until a loss is reached that falls with steps and rises with noise."""
    time, size = 0.0, 16.0
    for step in range(200_000):
        loss = scale * (step + 1.0) ** -exponent + noise / (2.0 * size)
        if loss <= target:
            return time
        time += overhead + size
        size = size_of(loss)
    return math.inf


@pytest.mark.once
@pytest.mark.parametrize("overhead", [0.0, 128.0, 1024.0, 8192.0])
def test_in_the_model_it_takes_as_long_as_the_best_constant_size_or_less(overhead):
    # Of the loss that a run has, as in the derivation; variance times rate is the noise.
    constants = [2.0**power for power in range(3, 17)]
    controller = Controller(16, sizes=WIDE, rule=Progress(overhead), smoothing=0.5, hysteresis=0.0)

    def ours(loss):
        return controller.update(learning_rate=1.0, variance_trace=40.0, loss=loss).batch_size

    target = 0.15
    best = min(time_to(target, lambda _, size=one: size, overhead) for one in constants)
    assert time_to(target, ours, overhead) <= 1.1 * best


def test_statistics_hold_what_a_rule_needs():
    statistics = GradientStatistics(4, 4, 50.0, 9.0, loss=2.0)
    for rule, asked in ((NoiseScale(), 14 / 3 / (47 / 6)), (CABS(), 0.1 * 14 / 3 / 2.0)):
        decision = Controller(16, rule=rule).update(statistics, learning_rate=0.1)
        assert decision.raw == pytest.approx(asked)
    with pytest.raises(ValueError, match="must not be given beside statistics"):
        Controller(16, rule=NoiseScale()).update(
            statistics, learning_rate=0.1, expected_gradient_norm_squared=1.0
        )


@pytest.mark.parametrize(
    ("in_metric", "adaptive", "message"),
    [
        (False, True, r"not in the metric .*optimizer=optimizer"),
        (True, False, r"are in the metric .*adaptive=True"),
        (True, True, None),
        (False, False, None),
        # Nobody has said.
        (None, True, None),
        (None, False, None),
    ],
)
def test_statistics_in_another_metric_than_the_rule_s_are_refused(in_metric, adaptive, message):
    statistics = GradientStatistics(4, 4, 50.0, 9.0, loss=2.0, in_metric=in_metric)
    controller = Controller(16, rule=Progress(100.0, adaptive=adaptive))
    if message is None:
        assert not controller.update(statistics, learning_rate=0.1).held
        return
    before = controller.state_dict()
    with pytest.raises(ValueError, match=message):
        controller.update(statistics.read(), learning_rate=0.1)
    assert controller.state_dict() == before
    # Other rules take both.
    assert not Controller(16, rule=CABS()).update(statistics, learning_rate=0.1).held


def after(controller, rule, **settings):
    """Return a controller with another rule that goes on from the state of one."""
    other = Controller(16, rule=rule, **settings)
    other.load_state_dict(controller.state_dict(), changed_settings=True)
    Controller(16, rule=rule, **settings).load_state_dict(other.state_dict())
    return other


def test_the_rule_of_a_run_can_be_changed_where_the_state_holds_what_it_needs():
    numbers = {"learning_rate": 0.1, "variance_trace": 100.0, "loss": 1.0}
    progress, paper = Controller(16, rule=Progress(50.0)), Controller(16, every=5)
    for controller in (progress, paper):
        for _ in range(3):
            controller.update(**numbers) if controller.due else controller.update(
                learning_rate=0.1, loss=1.0
            )
    assert after(progress, CABS()).update(**numbers).raw == pytest.approx(10.0)
    assert after(progress, Progress(90.0)).update(**numbers).raw > 10.0
    # The losses before are not known, the number of steps is: the paper's exponent stands for them.
    assert after(paper, Progress(0.0), every=5).update(**numbers).raw == pytest.approx(10.0)
    # The gradient has not been measured, so that a measurement is due.
    scale = after(paper, NoiseScale(), every=5)
    assert scale.due
    assert scale.update(**numbers, expected_gradient_norm_squared=4.0).raw == pytest.approx(25.0)
    assert not after(scale, CABS(), every=5).due


def test_a_gradient_hidden_in_noise_asks_for_the_largest_size_and_leaves_the_rate():
    for rule in (NoiseScale(), NormTest(0.5)):
        decision = Controller(16, rule=rule).update(
            learning_rate=0.1, loss=1.0, variance_trace=100.0, expected_gradient_norm_squared=-0.1
        )
        assert (decision.batch_size, decision.learning_rate_factor) == (2048, 1.0)


@given(st.floats(0.0, 1e300), st.floats(0.0, 1e300), st.floats(0.0, 1e300))
def test_the_rate_factor_is_above_zero_and_at_most_one(overhead, rate, trace):
    controller = Controller(16, sizes=[16, 100], rule=Progress(overhead))
    decision = controller.update(learning_rate=rate, variance_trace=trace, loss=1.0)
    assert 0.0 < decision.learning_rate_factor <= 1.0
    Controller(16, sizes=[16, 100], rule=Progress(overhead)).load_state_dict(
        controller.state_dict()
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("curve", [[0, 1.0]]),
        ("curve", [[3, 1.0]]),
        ("curve", [[1, 1.0]] * 9),
        ("gradient_weight", 0.0),
        ("gradient_weight", 1e300),
    ],
)
def test_a_state_that_no_run_has_is_refused(name, value):
    rule = Progress(10.0, adaptive=True)
    controller = Controller(16, rule=rule, every=3)
    controller.update(
        learning_rate=0.1, variance_trace=1.0, loss=1.0, expected_gradient_norm_squared=1.0
    )
    state = controller.state_dict()
    state["state"][name] = value
    with pytest.raises(ValueError, match="this state is damaged"):
        Controller(16, rule=rule, every=3).load_state_dict(state)


@pytest.mark.once
@pytest.mark.parametrize("exponent", [0.42, 0.5, 0.58])
@pytest.mark.parametrize("steps_before", [1000, 20_000])
def test_a_run_continued_with_fresh_averages_asks_for_the_size_of_the_uninterrupted_one(
    exponent, steps_before
):
    random = np.random.default_rng(0)
    whole = Controller(16, sizes=WIDE, rule=Progress(300.0))
    fresh = Controller(16, sizes=WIDE, rule=Progress(300.0, steps_before=steps_before))
    for step in range(steps_before + 2000):
        loss = 3.0 * (step + 1.0) ** -exponent * math.exp(0.1 * random.standard_normal())
        trace = 4000.0 * loss * random.lognormal(0.0, 0.3)
        numbers = {"learning_rate": 0.1, "variance_trace": trace, "loss": loss}
        asked = whole.update(**numbers).raw
        if step >= steps_before:
            again = fresh.update(**numbers).raw
        if step >= steps_before + 200:
            assert again == pytest.approx(asked, rel=0.2)


def test_during_a_warm_up_the_size_follows_the_rate_and_forgets_it_afterwards():
    losses = [5.0 * (k + 0.5) ** -0.5 for k in range(400)]
    usual = Controller(16, sizes=WIDE, rule=Progress(300.0))
    warmed = Controller(16, sizes=WIDE, rule=Progress(300.0))
    for step, loss in enumerate(losses):
        numbers = {"variance_trace": 4000.0, "loss": loss}
        rate = 0.1 * min(1.0, (step + 1) / 100)
        asked = usual.update(learning_rate=0.1, **numbers).raw
        again = warmed.update(learning_rate=rate, **numbers).raw
        assert again < asked if step < 99 else again == asked


def test_a_decaying_rate_asks_for_as_much_less_as_it_is_smaller():
    losses = [5.0 * (k + 0.5) ** -0.5 for k in range(1000)]
    usual = Controller(16, sizes=WIDE, rule=Progress(0.0))
    decayed = Controller(16, sizes=WIDE, rule=Progress(0.0))
    for step, loss in enumerate(losses):
        share = 0.5 * (1.0 + math.cos(math.pi * step / len(losses)))
        asked = usual.update(learning_rate=0.1, variance_trace=4000.0, loss=loss).raw
        again = decayed.update(learning_rate=0.1 * share, variance_trace=4000.0, loss=loss).raw
        # Without overhead the size is proportional to the rate of the step.
        assert again == pytest.approx(share * asked)


@pytest.mark.parametrize("floor", [0.0, None])
def test_a_loss_that_rises_after_a_long_fall_moves_the_size_by_little_more_than_two(floor):
    usual, risen = (
        Controller(16, sizes=WIDE, rule=Progress(300.0, loss_floor=floor)) for _ in range(2)
    )
    ratios = []
    for step in range(8000):
        loss = 5.0 * (step + 0.5) ** -0.5
        expected = usual.update(learning_rate=0.1, variance_trace=4000.0, loss=loss).raw
        # To twice as much at step 1500, and back at 2000.
        loss *= 1.0 + max(0.0, 1.0 - abs(step - 1500) / 500)
        asked = risen.update(learning_rate=0.1, variance_trace=4000.0, loss=loss).raw
        if step >= 1000:
            ratios.append(asked / expected)
    # It asks for more as long as the rise is in the later stretch, and for less in the earlier.
    assert np.argmax(ratios) < 2000 < np.argmin(ratios)
    assert 0.5 < min(ratios) < 1.0 < max(ratios) < 2.5


def test_a_warm_up_from_a_rate_of_zero_leaves_adam_a_large_batch():
    controller = Controller(sizes=BatchSizes.range(16, 4096), rule=Progress(1024, adaptive=True))
    sizes = [controller.batch_size]
    for step in range(20):
        numbers = {"variance_trace": 4000.0, "expected_gradient_norm_squared": 0.5, "loss": 2.0}
        sizes.append(controller.update(learning_rate=1e-5 * step, **numbers).batch_size)
    assert min(sizes) > 500


def test_averages_in_another_metric_are_not_carried_over():
    plain = Controller(16, rule=Progress(100.0))
    for _ in range(10):
        plain.update(learning_rate=0.1, variance_trace=10.0, loss=1.0)
    adam = after(plain, Progress(100.0, adaptive=True))
    assert adam.due
    decision = adam.update(
        learning_rate=0.1, variance_trace=1e4, loss=1.0, expected_gradient_norm_squared=1.0
    )
    assert decision.average_variance_trace == 1e4
    # And back.
    again = after(adam, Progress(100.0)).update(learning_rate=0.1, variance_trace=10.0, loss=1.0)
    assert again.average_variance_trace == 10.0


def test_no_rate_makes_adam_ask_for_less_than_its_noise_does():
    rule = Progress(8192, adaptive=True)
    controller = Controller(16, sizes=BatchSizes.range(16, 512), rule=rule)
    decision = controller.update(
        learning_rate=0.1, variance_trace=1e4, loss=1.0, expected_gradient_norm_squared=0.1
    )
    assert (decision.batch_size, decision.learning_rate_factor) == (512, 1.0)
