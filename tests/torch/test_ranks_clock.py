"""Ranks whose clocks differ measure the same overhead, and decide alike."""

import itertools
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import cabs
import cabs_torch
from tests.torch.engines import network

OVERHEAD, EACH = 40, 2e-4


class Simulated:
    """A clock on which a step of m examples takes what a line says, faster on some ranks."""

    def __init__(self, rate):
        self.rate, self.now = rate, 0.0

    def __call__(self):
        return self.now

    def step(self, size):
        self.now += self.rate * EACH * (OVERHEAD + size)


class Slept(Simulated):
    """The clock of the machine, on which the first rank has nothing to do but to wait."""

    def __call__(self):
        return time.perf_counter()

    def step(self, size):
        if dist.get_rank():
            time.sleep(self.rate * EACH * (OVERHEAD + size))


def examples(count, step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    noise = torch.rand(count, generator=generator) < 0.4
    return inputs, torch.where(noise, step % 3, inputs[:, :3].argmax(dim=1))


def clocked(kind, count, in_groups):
    """Return the sizes of some steps, and the overhead in the end, with a watch for each rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    clock = kind(1.0 + rank)
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes = cabs.BatchSizes.range(8, 256, multiple_of=8)
    controller = cabs.Controller(sizes=sizes, rule=cabs.Progress())
    watch, found = cabs.Stopwatch(clock=clock), []
    for step in range(count):
        size = controller.batch_size
        inputs, targets = (one[rank::ranks] for one in examples(size, step))
        clock.step(size)
        optimizer.zero_grad()
        if in_groups:
            with cabs_torch.Microbatches(model, batch_size=size, controller=controller) as groups:
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
            statistics = groups.complete(loss=loss)
        else:
            losses = torch.nn.functional.cross_entropy(model(inputs), targets, reduction="none")
            statistics = cabs_torch.backward(losses, controller=controller)
        optimizer.step()
        decided = controller.update(statistics, learning_rate=0.1, seconds=watch)
        found.append((size, decided.observation.seconds, decided.observation.examples))
    return found, controller.step_cost, controller.fingerprint


@pytest.mark.parametrize("in_groups", [False, True], ids=["examples", "groups"])
def test_ranks_whose_clocks_differ_take_the_mean(two, in_groups):
    first, second = two.all(clocked, Simulated, 40, in_groups)
    assert first == second
    steps, cost, _ = first
    assert cost.overhead == pytest.approx(OVERHEAD)
    # The second clock runs twice as fast; a step's seconds are those of its own examples.
    for (size, *_), (_, seconds, timed) in itertools.pairwise(steps[1:]):
        assert timed == size
        assert seconds == pytest.approx(1.5 * EACH * (OVERHEAD + size))
    assert [one[1] for one in steps[:2]] == [None, None]
    assert len({size for size, *_ in steps}) > 2


def test_a_rank_that_waits_measures_what_it_waits_for(two):
    first, second = two.all(clocked, Slept, 20, False)
    assert first == second
    steps, cost, _ = first
    # A single lap may begin late, on a machine that is busy.
    slept = sum(2 * EACH * (OVERHEAD + size) for size, *_ in steps[1:-1])
    assert sum(seconds for _, seconds, _ in steps[2:]) > 0.9 * slept
    assert cost.overhead > 0.0


def statistics_of(step, **given):
    model = DistributedDataParallel(network())
    inputs, targets = (one[dist.get_rank() :: 2] for one in examples(24, step))
    losses = torch.nn.functional.cross_entropy(model(inputs), targets, reduction="none")
    return cabs_torch.backward(losses, **given)


def with_its_own_seconds():
    controller = cabs.Controller(24, rule=cabs.Progress())
    # Numbers that say nothing of ranks.
    numbers = statistics_of(0, controller=controller).read()
    controller.update(numbers, learning_rate=0.1, seconds=0.1 + 0.01 * dist.get_rank())
    statistics_of(1, controller=controller).read()


def test_a_rank_that_feeds_its_own_seconds_is_an_error_on_every_rank(two):
    for said in two.run(with_its_own_seconds):
        assert "RuntimeError" in said
        assert "do not train alike" in said
        assert "what backward returned, which takes the mean of the ranks' seconds" in said


def without_a_controller():
    controller = cabs.Controller(24, rule=cabs.Progress())
    controller.update(statistics_of(0), learning_rate=0.1, seconds=cabs.Stopwatch())


def test_a_rule_that_measures_needs_the_controller_in_the_sum(two):
    for said in two.run(without_a_controller):
        assert "ValueError: controller must be given where the statistics are made" in said


def after_a_state():
    """One rank has no seconds of the step before, for it has loaded a state."""
    controller = cabs.Controller(24, rule=cabs.Progress())
    found = []
    for step in range(3):
        if step == 1 and dist.get_rank():
            controller.load_state_dict(controller.state_dict())
        statistics = statistics_of(step, controller=controller)
        decided = controller.update(statistics, learning_rate=0.1, seconds=0.1)
        found.append(decided.observation.seconds)
    return found


def test_seconds_that_one_rank_lacks_are_missing_on_all(two):
    assert two.all(after_a_state) == [[None, None, pytest.approx(0.1)]] * 2
