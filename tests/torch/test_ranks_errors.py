"""Ranks that do not train alike are an error on each of them, within seconds."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cabs
import cabs_torch
from tests.torch.engines import M, gradients, losses_of, network, share, weights
from tests.torch.gloo import Ranks

pytestmark = pytest.mark.slow

# Seconds that ranks wait for each other, in the tests in which one is gone or late.
PATIENCE = 2.0


@pytest.fixture
def two_for_once(tmp_path):
    ranks = Ranks(2, tmp_path, timeout=PATIENCE)
    yield ranks
    ranks.end()


def assert_each_says(found, *texts):
    for one in found:
        assert isinstance(one, str), one
        for text in texts:
            assert text in one, one


def statistics_of(mine, **options):
    model = DistributedDataParallel(network())
    return cabs_torch.backward(losses_of(model, mine), **options)


def with_controllers(change):
    """Return what is decided upon the same controllers, and what is said of others."""
    controllers = [cabs.Controller(M) for _ in range(2)]
    change(controllers[1], dist.get_rank())
    same = statistics_of(share(True), controller=controllers[0])
    found = cabs.Controller(M).update(same, learning_rate=0.1).batch_size
    other = statistics_of(share(True), controller=controllers[1])
    try:
        cabs.Controller(M).update(other, learning_rate=0.1)
    except RuntimeError as error:
        return found, str(error)
    return found, "no error"


def one_step(controller, rank):
    for _ in range(rank):
        controller.update(learning_rate=0.1, variance_trace=300.0, loss=1.0)


def its_own_loss(controller, rank):
    controller.update(learning_rate=0.1, variance_trace=300.0, loss=1.0 + 1e-9 * rank)


@pytest.mark.parametrize("change", [one_step, its_own_loss])
def test_controllers_that_differ_are_an_error_on_every_rank(two, change):
    found = two.all(with_controllers, change)
    assert len({size for size, _ in found}) == 1
    for _, said in found:
        assert "do not train alike" in said
        assert "its controller has fingerprint" in said
        assert "load the same state" in said


def unequal_without_a_word():
    edges = [0, 7, 15, 24]
    mine = range(*edges[dist.get_rank() : dist.get_rank() + 2])
    return statistics_of(list(mine)).variance_trace


def test_shares_that_differ_are_an_error_on_every_rank(three):
    # One of them has a third of the batch, and sees nothing wrong with its own weights.
    found = three.run(unequal_without_a_word)
    assert_each_says(found, "RuntimeError", "batch_size=loader.batch.examples")


def with_shares_that_do_not_add_up(is_read_first):
    """Return whether a step that is told of another batch moves this rank's weights."""
    model = DistributedDataParallel(network())
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), weights(model)
    statistics = cabs_torch.backward(losses_of(model, share(False)))
    said = "no error"
    try:
        if is_read_first:
            statistics.read()
        optimizer.step()
        statistics.read()
    except RuntimeError as error:
        said = str(error)
    return said, not torch.equal(weights(model), before)


@pytest.mark.parametrize("is_read_first", [True, False])
def test_statistics_read_before_the_step_stop_every_rank_before_its_weights_move(
    two, is_read_first
):
    for said, has_moved in two.all(with_shares_that_do_not_add_up, is_read_first):
        assert "so that their gradients have wrong weights" in said
        assert has_moved is not is_read_first


def of_another_batch(batch_size):
    return statistics_of(share(True), batch_size=batch_size).variance_trace


def test_a_batch_of_another_size_is_an_error(two):
    assert_each_says(two.run(of_another_batch, M - 2), "have 24 examples together", "wrong weights")
    assert_each_says(two.run(of_another_batch, M + 2), "this is a microbatch, of 24 examples")


def drawn_by_size():
    """Feed a rank a batch of another size, as its loader does if its controller differs."""
    mine = share(True)[: 8 - 2 * dist.get_rank()]
    return statistics_of(mine, batch_size=2 * len(mine)).variance_trace


def test_batches_of_different_sizes_are_an_error(two):
    assert_each_says(two.run(drawn_by_size), "RuntimeError", "batches of different sizes")


def without_an_engine():
    """Return what is said of gradients that nobody reduced, and what there is once they are."""
    model = network()
    statistics = cabs_torch.backward(losses_of(model, share(False)), batch_size=M)
    said = []
    for read in (
        statistics.read,
        lambda: cabs_torch.gradient_norm_squared(model.parameters()),
        lambda: statistics.variance_trace,
    ):
        try:
            said.append(read())
        except RuntimeError as error:
            said.append(str(error))
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    norm_squared = cabs_torch.gradient_norm_squared(model.parameters())
    whole = statistics.partial.complete(gradient_norm_squared=norm_squared, loss=statistics.loss)
    return said, whole.read(), gradients(model)


def test_gradients_that_nobody_averages_are_an_error_until_somebody_does(two):
    model = network()
    expected = cabs_torch.backward(losses_of(model, list(range(M)))).read()
    for said, statistics, gradient in two.all(without_an_engine):
        assert_each_says(said, "nobody has averaged them", "DistributedDataParallel")
        torch.testing.assert_close(gradient, gradients(model))
        assert statistics.variance_trace == pytest.approx(expected.variance_trace)
        assert statistics.loss == pytest.approx(expected.loss)


def inside_of_no_sync():
    model = DistributedDataParallel(network())
    with model.no_sync():
        return cabs_torch.backward(losses_of(model, share(True))).read()


def on_top_of_others():
    model = DistributedDataParallel(network())
    for _ in range(2):
        statistics = cabs_torch.backward(losses_of(model, share(True)))
    return statistics.read()


def on_top_of_other_pieces():
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    for _ in range(2):
        statistics = cabs_torch.backward(losses_of(model, share(True)))
    return statistics.read()


def test_gradients_of_something_else_are_an_error(two):
    assert_each_says(two.run(inside_of_no_sync), "nobody has averaged them", "no_sync")
    for case in (on_top_of_others, on_top_of_other_pieces):
        assert_each_says(two.run(case), "gradients were not zero before the pass")


def added_up_by_fully_shard():
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    model.set_gradient_divide_factor(1.0)
    return cabs_torch.backward(losses_of(model, share(True))).read()


def with_a_hook():
    def add(_, bucket):
        done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda future: future.value()[0])

    model = DistributedDataParallel(network())
    model.register_comm_hook(None, add)
    return model


def added_up_by_a_hook():
    model = with_a_hook()
    return cabs_torch.backward(losses_of(model, share(True))).read()


def added_up_in_groups():
    model, mine = with_a_hook(), share(True)
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=M)
    with model.no_sync():
        accumulation.backward(losses_of(model, mine[:5]).mean(), examples=5)
    accumulation.backward(losses_of(model, mine[5:]).mean(), examples=7)
    return accumulation.complete().read()


@pytest.mark.parametrize("case", [added_up_by_fully_shard, added_up_by_a_hook, added_up_in_groups])
def test_gradients_that_are_added_up_are_an_error(two, case):
    assert_each_says(two.run(case), "has the sum of the gradients of 2 ranks", "average")


def of_accumulation(examples):
    model = DistributedDataParallel(network())
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=M)
    loss = losses_of(model, share(True)).mean()
    accumulation.backward(loss, examples=examples)
    return accumulation.complete().read()


def test_an_accumulation_that_lacks_examples_is_an_error(two):
    assert_each_says(two.run(of_accumulation, 11), "have 22 examples together")


def that_overflow():
    model = DistributedDataParallel(network())
    losses = losses_of(model, share(True)) * (torch.inf if dist.get_rank() else 1.0)
    controller = cabs.Controller(M)
    statistics = cabs_torch.backward(losses, controller=controller)
    return controller.update(statistics, learning_rate=0.1).reason.held


def test_gradients_that_overflow_on_one_rank_hold_the_size_on_all(two):
    assert two.all(that_overflow) == [True, True]


def on_a_mesh_of_its_own():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("outer", "inner"))
    model = fully_shard(network(), mesh=mesh["inner"])
    return cabs_torch.backward(losses_of(model, share(True))).read()


def test_pieces_that_lie_on_other_ranks_are_an_error(two):
    assert_each_says(two.run(on_a_mesh_of_its_own), "give the group of the former")


def seconds_of(function):
    start = time.monotonic()
    try:
        function()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


# What is said of a sum that never arrives, where it is one of the library's own.
GONE = "the sums over 2 ranks have not arrived: a rank has ended, is later than the timeout"


def without_a_rank(when):
    """Return what the first rank is told, and when, if the second one ends before a moment."""
    model = DistributedDataParallel(network()) if when == "gradients" else network()
    losses = losses_of(model, share(True))
    if when == "sums":
        # What averages gradients has been asked then.
        cabs_torch.backward(losses)
        model.zero_grad()
        losses = losses_of(model, share(True))
    if when == "norm":
        losses.mean().backward()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if when == "norm":
        return seconds_of(lambda: cabs_torch.gradient_norm_squared(model.parameters()))
    return seconds_of(lambda: cabs_torch.backward(losses).read())


@pytest.mark.parametrize("when", ["first", "sums", "norm", "gradients"])
def test_a_rank_that_is_killed_is_an_error(two_for_once, when):
    (said, seconds), gone = two_for_once.run(without_a_rank, when)
    assert gone == "gone"
    # The sum of gradients is DDP's.
    assert ("Connection" if when == "gradients" else GONE) in said
    assert seconds < 10 * PATIENCE


def with_a_late_rank(is_asked):
    model = network()
    losses = losses_of(model, share(True))
    if is_asked:
        cabs_torch.backward(losses)
        losses = losses_of(model, share(True))
    if dist.get_rank() == 1:
        time.sleep(2 * PATIENCE)
    return seconds_of(lambda: cabs_torch.backward(losses).variance_trace)


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_rank_that_is_late_is_an_error(two_for_once, is_asked):
    for said, seconds in two_for_once.run(with_a_late_rank, is_asked):
        assert GONE in said
        assert seconds < 10 * PATIENCE


def with_a_rank_that_does_something_else():
    """One rank fails before its pass, and comes to the next step."""
    model = network()
    losses = losses_of(model, share(True))
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="sample must be at least 1"):
            cabs_torch.backward(losses, sample=0)
        return "", 0.0
    return seconds_of(lambda: cabs_torch.backward(losses).read())


def test_a_rank_that_fails_alone_leaves_the_others_with_an_error(two_for_once):
    (said, seconds), _ = two_for_once.run(with_a_rank_that_does_something_else)
    assert GONE in said
    assert seconds < 10 * PATIENCE
