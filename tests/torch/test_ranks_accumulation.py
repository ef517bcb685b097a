"""Microbatches of several ranks are those of one process, whoever holds the gradients meanwhile."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import cabs_torch
from tests.torch.engines import ENGINES, M, gradients, losses_of, network, share, unreduced
from tests.torch.gloo import Ranks
from tests.torch.test_ranks_statistics import alone, assert_same

pytestmark = pytest.mark.slow


def in_microbatches(engine, size, accumulated):
    """Return the statistics of this rank's share in pieces, of which the last one is reduced."""
    model = ENGINES[engine](network())
    pieces = torch.tensor(share(False)).split(size)
    parts, loss = [], 0.0
    accumulation = None
    if accumulated:
        accumulation = cabs_torch.Accumulation(model, batch_size=M)
    for number, piece in enumerate(pieces):
        with unreduced(model, is_last=number == len(pieces) - 1):
            losses = losses_of(model, piece)
            if accumulation is not None:
                accumulation.backward(losses.mean(), examples=len(piece))
                continue
            one = cabs_torch.backward(losses, batch_size=M)
            parts.append(one.partial)
            loss = loss + one.loss * one.examples / M
    if accumulation is not None:
        statistics = accumulation.complete()
    else:
        norm_squared = cabs_torch.gradient_norm_squared(model.parameters())
        statistics = sum(parts).complete(gradient_norm_squared=norm_squared, loss=loss)
    return statistics.read(), gradients(model)


@pytest.mark.parametrize("engine", ["ddp", "views", "fsdp", "fsdp by layers"])
def test_microbatches_of_ranks_are_those_of_one_process(two, engine):
    # Both ranks take as many pieces.
    for statistics, gradient in two.all(in_two_pieces, engine):
        (expected, *_), whole, _ = alone(torch.float64, {}, count=1)
        assert_same([[statistics], gradient], [[expected], whole], 1e-10)


def in_two_pieces(engine):
    return in_microbatches(engine, len(share(False)) // 2, accumulated=False)


def accumulated_in_two_pieces(engine):
    return in_microbatches(engine, len(share(False)) // 2, accumulated=True)


@pytest.mark.parametrize("engine", ["ddp", "views", "fsdp", "fsdp by layers"])
def test_groups_of_ranks_are_groups(two, engine):
    model = network()
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=M)
    for piece in (range(4), range(4, 8), range(8, 16), range(16, 24)):
        loss = losses_of(model, list(piece)).mean()
        accumulation.backward(loss, examples=len(piece))
    expected = accumulation.complete().read()
    assert expected.groups == 4
    for statistics, gradient in two.all(accumulated_in_two_pieces, engine):
        assert_same([[statistics], gradient], [[expected], gradients(model)], 1e-10)


def pieces_given(what):
    """Return what is accumulated with another argument than the module."""
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    mine = share(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = optimizer if what == "optimizer" else model.parameters()
    if what != "too early":
        # The whole parameters are made by the first forward pass.
        losses_of(model, mine)
    accumulation = cabs_torch.Accumulation(given, batch_size=M)
    for number, piece in enumerate((mine[:5], mine[5:])):
        model.set_requires_gradient_sync(number == 1)
        accumulation.backward(losses_of(model, piece).mean(), examples=len(piece))
    return float(sum(accumulation.complete().variance_trace.reshape(-1)))


def test_parameters_of_fully_shard_are_found_after_a_first_pass(two):
    for said in two.run(pieces_given, "too early"):
        assert "for fully_shard give the module itself" in said
    first = two.all(pieces_given, "parameters")
    assert first[0] > 0.0
    assert two.all(pieces_given, "optimizer") == first == two.all(pieces_given, "parameters")


def on_top_of_others(when):
    """Return what is said where gradients are not those of the microbatches alone."""
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    mine = share(True)
    accumulation = cabs_torch.Accumulation(model, batch_size=M)
    for step in range(2):
        for number, piece in enumerate((mine[:5], mine[5:])):
            model.set_requires_gradient_sync(number == 1 or when == "between")
            accumulation.backward(losses_of(model, piece).mean(), examples=len(piece))
            if when == "between":
                for parameter in model.parameters():
                    parameter.grad *= 2.0
        found = accumulation.complete().read().variance_trace
        if step == 0:
            assert found > 0.0
    return found


def test_pieces_of_a_gradient_that_were_there_before_give_no_number(two):
    assert all(torch.tensor(two.all(on_top_of_others, "before")).isnan())
    for said in two.run(on_top_of_others, "between"):
        assert "gradients were changed between microbatches" in said


def of_one_rank(kind):
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (1,)))
    pieces = torch.arange(M).split(M // 2)
    if kind == "accumulation":
        accumulation = cabs_torch.Accumulation(model, batch_size=M)
        for number, piece in enumerate(pieces):
            model.set_requires_gradient_sync(number == 1)
            accumulation.backward(losses_of(model, piece).mean(), examples=M // 2)
        return accumulation.complete().read()
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        for piece in pieces:
            (losses_of(model, piece).mean() / 2).backward()
    return groups.complete().read()


def test_a_single_rank_that_fully_shard_holds_is_one_process(tmp_path):
    model = network()
    accumulation = cabs_torch.Accumulation(model, batch_size=M)
    for piece in torch.arange(M).split(M // 2):
        accumulation.backward(losses_of(model, piece).mean(), examples=M // 2)
    expected = accumulation.complete().read()
    ranks = Ranks(1, tmp_path)
    for kind in ("accumulation", "microbatches"):
        (found,) = ranks.all(of_one_rank, kind)
        assert found.variance_trace == pytest.approx(expected.variance_trace, rel=1e-10)
        assert found.gradient_norm_squared == pytest.approx(expected.gradient_norm_squared)
    ranks.end()
