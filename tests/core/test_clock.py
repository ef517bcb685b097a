"""What a step costs, measured by simulated clocks, and what the rule for the least time does."""

import json
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import BatchSizes, Controller, GradientStatistics, Progress, RunLog, Stopwatch, read_run
from cabs.control.costs import Clock, StepCost, timed

SIZES = BatchSizes.range(16, 4096)
EACH = 1e-5


def exact(_, seconds):
    return seconds


def heavy_tailed(random, seconds):
    """Return a time with a tenth of noise; every fifth is longer, without a finite variance."""
    seconds *= math.exp(0.1 * random.standard_normal())
    if random.random() < 0.2:
        seconds *= 1.0 + 5.0 * random.pareto(1.1)
    return seconds


def trained(overhead, clock, *, steps=200, seed=0, rule=None, sizes=SIZES, trace=800.0, **options):
    """Return a controller after steps on a simulated clock, and its decisions."""
    random = np.random.default_rng(seed)
    controller = Controller(16, sizes=sizes, rule=rule or Progress(), **options)
    decisions = []
    for step in range(steps):
        seconds = clock(random, EACH * (overhead + controller.batch_size))
        # The first steps are slow everywhere.
        seconds *= 30.0 if step < 2 else 1.0
        decisions.append(
            controller.update(
                learning_rate=0.1,
                variance_trace=trace,
                loss=3.0 * (step + 1.0) ** -0.5,
                seconds=seconds,
            )
        )
    return controller, decisions


@pytest.mark.parametrize("overhead", [128.0, 1024.0, 8192.0])
def test_the_overhead_is_found_within_a_fifth(overhead):
    found = np.array(
        [
            trained(overhead, heavy_tailed, seed=seed)[0].step_cost.overhead / overhead
            for seed in range(40)
        ]
    )
    # Half of the time or more is noise: some are unlucky.
    assert np.median(abs(found - 1.0)) < 0.08
    assert np.mean(abs(found - 1.0) < 0.2) >= 0.9
    # No more often too large than too small.
    assert abs(np.median(found) - 1.0) < 0.05


@pytest.mark.parametrize("overhead", [0.0, 128.0, 1024.0, 8192.0])
def test_a_clock_without_noise_is_exact(overhead):
    controller, _ = trained(overhead, exact)
    cost = controller.step_cost
    assert cost.overhead == pytest.approx(overhead, abs=1e-6 * (1.0 + overhead))
    assert cost.per_example == pytest.approx(EACH)
    assert cost.deviation < 1e-3 * (1.0 + overhead)


def test_it_says_how_sure_it_is():
    errors, said = [], []
    for seed in range(30):
        cost = trained(1024.0, heavy_tailed, seed=seed)[0].step_cost
        errors.append(cost.overhead - 1024.0)
        said.append(cost.deviation)
    typical = np.median(np.abs(errors)) * 1.4826
    assert 0.5 * typical < np.median(said) < 2.0 * typical


def test_sizes_are_varied_for_a_few_steps_and_stay_inside():
    for seed in range(10):
        _, decisions = trained(1024.0, heavy_tailed, seed=seed)
        assert all(decision.batch_size in SIZES for decision in decisions)
        explored = [decision.reason.value == "exploring" for decision in decisions]
        assert 16 <= sum(explored) <= 96
        # Once at the beginning, and never again.
        assert explored == sorted(explored, reverse=True)


def test_what_is_asked_for_is_what_the_overhead_given_would_ask_for():
    _, measured = trained(1024.0, exact)
    _, told = trained(1024.0, exact, rule=Progress(1024.0))
    assert measured[-1].raw == pytest.approx(told[-1].raw, rel=1e-6)
    assert measured[-1].reason is told[-1].reason


def test_growth_is_limited_while_exploring():
    _, decisions = trained(1024.0, exact, max_growth=1.5)
    sizes = [16] + [decision.batch_size for decision in decisions]
    assert all(after <= max(1.5 * before, before + 1) for before, after in pairwise(sizes))


def test_a_single_size_leaves_nothing_to_explore():
    controller, decisions = trained(1024.0, exact, sizes=BatchSizes([16]))
    assert controller.step_cost is None
    assert {decision.batch_size for decision in decisions} == {16}


def test_a_machine_twice_as_slow_is_noticed_and_timed_anew():
    controller, _ = trained(1024.0, exact)
    reasons = []
    for step in range(200, 400):
        # Each example costs four times as much: h is a quarter.
        seconds = EACH * (1024.0 + 4.0 * controller.batch_size)
        decision = controller.update(
            learning_rate=0.1,
            variance_trace=800.0,
            loss=3.0 * (step + 1.0) ** -0.5,
            seconds=seconds,
        )
        reasons.append(decision.reason.value)
    assert "exploring" in reasons
    assert controller.step_cost.overhead == pytest.approx(256.0, rel=1e-6)


@pytest.mark.parametrize("factor", [0.3, 0.5, 0.9, 1.1, 1.4, 2.0, 10.0])
@pytest.mark.parametrize("trace", [800.0, 1e6])
def test_a_machine_that_is_slower_as_a_whole_has_the_same_overhead(factor, trace):
    # With the larger trace the size stays at the largest, and no other is timed but to explore.
    random, count = np.random.default_rng(0), 0

    def clock(_, seconds):
        nonlocal count
        count += 1
        seconds *= math.exp(0.03 * random.standard_normal())
        return seconds * (factor if count > 500 else 1.0)

    controller, _ = trained(1024.0, clock, steps=1500, trace=trace)
    assert controller.step_cost.overhead == pytest.approx(1024.0, rel=0.2)
    seconds = controller.step_cost.per_example * (1024.0 + 4096.0)
    expected = EACH * (1024.0 + 4096.0)
    if not 0.7 < factor < 1.45:
        # It was noticed, and timed anew.
        expected *= factor
    assert seconds == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.5])
def test_a_clock_that_is_fast_or_slow_by_chance_is_not_explored_for_ever(share):
    def clock(random, seconds):
        return seconds * (10.0 if random.random() < share else 1.0)

    _, decisions = trained(1024.0, clock, steps=3000)
    explored = [decision.reason.value == "exploring" for decision in decisions]
    assert sum(explored) <= 3 * 96


def test_a_cost_that_no_size_shows_is_a_large_overhead():
    # As on a device that a batch does not fill.
    controller, _ = trained(1e9, heavy_tailed)
    assert controller.step_cost.overhead > 4096
    assert math.isfinite(controller.step_cost.overhead)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats()), max_size=200))
def test_any_timings_leave_a_bounded_clock(timings):
    clock = Clock()
    for examples, seconds in timings:
        clock = timed(clock, examples, seconds)
        assert all(0 < len(group) <= 31 for group in clock.timings)
        assert clock.steps <= len(timings)
        if clock.cost is not None:
            assert all(map(math.isfinite, clock.cost))
            assert clock.cost.fixed >= 0.0 < clock.cost.per_example


def test_a_run_that_measures_goes_on_to_the_bit_and_is_replayed(tmp_path):
    random = np.random.default_rng(0)
    run = lambda: Controller(16, sizes=SIZES, rule=Progress())  # noqa: E731
    one, other = run(), run()
    with RunLog(tmp_path / "run.jsonl", one) as log:
        for step in range(120):
            numbers = {"learning_rate": 0.1, "variance_trace": 4000.0, "loss": 3.0 / (step + 1.0)}
            numbers["seconds"] = heavy_tailed(random, EACH * (500.0 + one.batch_size))
            made = one.update(**numbers)
            log.write(made)
            assert made == other.update(**numbers)
            saved, other = json.loads(json.dumps(other.state_dict())), run()
            other.load_state_dict(saved)
    assert read_run(tmp_path / "run.jsonl").decisions[-1] == made


def test_a_table_of_seconds_asks_for_what_costs_least():
    steps = {64: 0.010, 128: 0.011, 160: 0.030}
    _, decisions = trained(0.0, exact, steps=5, rule=Progress(seconds=steps))
    assert {decision.raw for decision in decisions} == {128.0}
    # A table of c (h + m) asks for what the formula asks for.
    fine = {size: EACH * (700.0 + size) for size in range(16, 4096)}
    for options in ({}, {"adaptive": True}):
        raws = []
        for rule in (Progress(seconds=fine, **options), Progress(700.0, **options)):
            controller = Controller(16, sizes=SIZES, rule=rule)
            square = {"expected_gradient_norm_squared": 3.0} if options else {}
            raws.append(
                controller.update(learning_rate=0.1, variance_trace=4e3, loss=1.0, **square).raw
            )
        assert raws[0] == pytest.approx(raws[1], abs=0.51)


def test_what_is_wrong_is_said():
    update = Controller(16, rule=Progress()).update
    numbers = {"learning_rate": 0.1, "variance_trace": 1.0, "loss": 1.0}
    with pytest.raises(ValueError, match=r"seconds must be given.*Stopwatch"):
        update(**numbers)
    with pytest.raises(ValueError, match="seconds must be at least 0, got seconds = -1"):
        update(**numbers, seconds=-1.0)
    with pytest.raises(ValueError, match="must not both be given"):
        Progress(3.0, seconds={16: 1.0})
    with pytest.raises(ValueError, match="a time above 0"):
        Progress(seconds={16: 0.0})
    with pytest.raises(ValueError, match="mapping of sizes"):
        Progress(seconds=[1, 2])
    # A time that is none is left out, and a rule that measures none keeps it in the log alone.
    assert update(**numbers, seconds=math.nan).observation.examples == 16
    assert Controller(16).update(**numbers, seconds=2.0).observation.seconds == 2.0


def test_a_stopwatch_leaves_out_what_it_is_told_to_and_counts_loading():
    now = [0.0]

    def passes(seconds):
        now[0] += seconds

    def batches():
        for _ in range(4):
            passes(0.25)
            yield "batch"

    watch, laps = Stopwatch(clock=lambda: now[0]), []
    for _ in watch.loading(batches()):
        passes(1.0)
        with watch.left_out():
            passes(50.0)
        laps.append(watch.lap())
    assert laps == [None, 1.25, 1.25, 1.25]
    assert (watch.total, watch.loaded) == (3.75, 0.75)
    assert StepCost(1.0, 0.5, 0.0).overhead == 2.0


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_first_batch_is_as_large_as_the_overhead(adaptive):
    rule = partial(Progress, adaptive=adaptive)
    assert Controller(sizes=SIZES).batch_size == 16
    assert Controller(sizes=SIZES, rule=rule(1000)).batch_size == 1000
    assert Controller(sizes=SIZES, rule=rule(10**6)).batch_size == 4096
    assert Controller(sizes=SIZES, rule=rule(0)).batch_size == 16
    assert Controller(sizes=SIZES, rule=rule()).batch_size == (128 if adaptive else 16)
    table = rule(seconds={16: 1.0, 64: 1.9, 128: 2.5})
    assert Controller(sizes=SIZES, rule=table).batch_size == 64
    assert Controller(32, sizes=SIZES, rule=rule(1000)).batch_size == 32


def test_under_adam_nothing_smaller_than_asked_for_is_tried():
    controller = Controller(sizes=SIZES, rule=Progress(adaptive=True))
    for step in range(100):
        decision = controller.update(
            learning_rate=0.01,
            variance_trace=4000.0,
            expected_gradient_norm_squared=5.0,
            loss=3.0 * (step + 1.0) ** -0.5,
            seconds=EACH * (1024.0 + controller.batch_size),
        )
        if decision.reason.value == "exploring":
            assert decision.batch_size >= min(decision.raw, 1024.0) - 1
    assert controller.step_cost.overhead == pytest.approx(1024.0, rel=1e-3)


@pytest.mark.parametrize("adaptive", [True, False])
def test_where_more_is_asked_for_than_the_largest_size_smaller_ones_are_tried(adaptive):
    sizes = BatchSizes.range(16, 128)
    controller = Controller(sizes=sizes, rule=Progress(adaptive=adaptive))
    square = {"expected_gradient_norm_squared": 5.0} if adaptive else {}
    for _ in range(40):
        seconds = EACH * (1024.0 + controller.batch_size)
        controller.update(
            learning_rate=1.0, variance_trace=1e6, loss=1.0, seconds=seconds, **square
        )
    assert controller.step_cost.overhead == pytest.approx(1024.0, rel=1e-3)


def test_steps_that_do_not_measure_are_not_timed():
    controller = Controller(sizes=SIZES, rule=Progress(), every=2)
    for step in range(200):
        # A step that measures takes three tenths longer.
        dearer = 1.3 if controller.due else 1.0
        numbers = {"learning_rate": 0.1, "loss": 3.0 * (step + 1.0) ** -0.5}
        if controller.due:
            numbers["variance_trace"] = 800.0
        seconds = dearer * EACH * (100.0 + controller.batch_size)
        controller.update(**numbers, seconds=seconds)
    assert controller.step_cost.overhead == pytest.approx(100.0, rel=1e-3)


class OnDevice:
    """A number that a device still computes: to read it waits."""

    def __init__(self, value, clock):
        self.value, self.clock = value, clock

    def __float__(self):
        self.clock.now += 1.0
        return self.value


class FakeClock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_clock_is_read_when_all_numbers_have_arrived():
    clock = FakeClock()
    watch, controller = Stopwatch(clock), Controller(16, rule=Progress(overhead=128))
    for _ in range(3):
        decision = controller.update(
            learning_rate=0.1,
            variance_trace=OnDevice(900.0, clock),
            loss=OnDevice(1.5, clock),
            seconds=watch,
        )
    # Two numbers, a second each, and none of the step after it.
    assert decision.observation.seconds == 2.0


def test_a_step_is_timed_with_the_examples_that_it_had():
    controller = Controller(16, rule=Progress(overhead=128))
    numbers = {"learning_rate": 0.1, "variance_trace": 900.0, "loss": 1.5, "seconds": 0.25}
    assert controller.update(**numbers, examples=5).observation.examples == 5
    size = controller.batch_size
    assert controller.update(**numbers).observation.examples == size != 5
    with pytest.raises(ValueError, match="examples must be at least 1"):
        controller.update(**numbers, examples=0)
    with pytest.raises(ValueError, match="must not be given beside statistics"):
        controller.update(
            GradientStatistics(4, 4, 50.0, 9.0, loss=2.0), learning_rate=0.1, examples=4
        )


def test_where_measuring_costs_by_example_the_overhead_is_that_of_steps_that_measure():
    controller = Controller(16, sizes=SIZES, rule=Progress(), every=4)
    for step in range(400):
        # To measure doubles the cost of an example.
        each = 2.0 * EACH if controller.due else EACH
        seconds = EACH * 1024.0 + each * controller.batch_size
        trace = 800.0 if controller.due else None
        controller.update(
            learning_rate=0.1,
            variance_trace=trace,
            loss=3.0 * (step + 1.0) ** -0.5,
            seconds=seconds,
        )
    assert controller.step_cost.overhead == pytest.approx(512.0, rel=0.01)


def test_what_is_left_out_twice_is_left_out_once():
    now = [0.0]
    watch = Stopwatch(clock=lambda: now[0])
    watch.lap()
    with watch.left_out():
        now[0] += 1.0
        with watch.left_out():
            now[0] += 2.0
    now[0] += 4.0
    assert watch.lap() == 4.0
