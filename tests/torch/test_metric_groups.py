"""Groups of examples in the metric of the step that an optimizer takes next."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cabs
import cabs_torch
from tests.torch.engines import M, batch, losses_of, network, unreduced
from tests.torch.models import cross_entropy
from tests.torch.reference import gradients_one_by_one
from tests.torch.test_metric import OPTIMIZERS, assert_sums, optimizer_of, steps

SIZES = 5, 3, 9, 7
EVEN = (6,) * 4


def expected(model, optimizer, sizes):
    """Return the two sums of each group of parameters, for a model that holds its gradient."""
    inputs, targets = batch()
    rows = gradients_one_by_one(model, cross_entropy, inputs, targets)
    means = torch.stack([one.mean(dim=0) for one in rows.split(sizes)])
    counts, widths = torch.tensor(sizes).double(), [one.numel() for one in model.parameters()]
    sums = {}
    for parameter, weights, each, whole in zip(
        model.parameters(),
        steps(model, optimizer),
        means.split(widths, dim=1),
        rows.mean(dim=0).split(widths),
        strict=True,
    ):
        flat = weights.flatten()
        sums[parameter] = counts @ (each.square() @ flat), whole.square() @ flat
    by_group = ([sums[one] for one in group["params"]] for group in optimizer.param_groups)
    return torch.tensor([[sum(part) for part in zip(*one, strict=True)] for one in by_group]).T


def accumulated(model, optimizer, sizes, scaler=None, **options):
    groups = cabs_torch.Accumulation(optimizer, batch_size=M, in_metric=True, **options)
    for piece in torch.arange(M).split(sizes):
        groups.backward(losses_of(model, piece).mean(), examples=len(piece), scaler=scaler)
    return groups.complete()


def watched(model, optimizer, sizes):
    with cabs_torch.Microbatches(optimizer, batch_size=M, in_metric=True) as groups:
        for piece in torch.arange(M).split(sizes):
            (losses_of(model, piece).mean() / len(sizes)).backward()
    return groups.complete()


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
@pytest.mark.parametrize(("measure", "sizes"), [(accumulated, SIZES), (watched, EVEN)])
def test_groups_are_those_of_a_loop(kind, options, measure, sizes):
    model = network()
    optimizer = optimizer_of(model, kind, options)
    for _ in range(3):
        optimizer.zero_grad()
        statistics = measure(model, optimizer, list(sizes))
        assert statistics.groups == len(sizes)
        assert_sums(statistics, expected(model, optimizer, list(sizes)))
        optimizer.step()


def test_a_scale_is_taken_out_of_the_metric():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), eps=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    statistics = accumulated(model, optimizer, list(SIZES), scaler)
    scaler.unscale_(optimizer)
    assert_sums(statistics, expected(model, optimizer, list(SIZES)))


def on_ranks(kind):
    """Return what ranks find whose microbatches are those of one process, two each."""
    model = DistributedDataParallel(network())
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3), []
    controller = cabs.Controller(M, rule=cabs.Progress(overhead=8, adaptive=True))
    options = {"batch_size": M, "in_metric": True, "controller": controller}
    mine = torch.arange(M).split(6)[2 * dist.get_rank() :][:2]
    for _ in range(3):
        optimizer.zero_grad()
        if kind == "accumulation":
            groups = cabs_torch.Accumulation(optimizer, **options)
            for number, piece in enumerate(mine):
                with unreduced(model, is_last=number == 1):
                    groups.backward(losses_of(model, piece).mean(), examples=len(piece))
        else:
            with cabs_torch.Microbatches(optimizer, **options) as groups:
                for number, piece in enumerate(mine):
                    with unreduced(model, is_last=number == 1):
                        (losses_of(model, piece).mean() / 2).backward()
        statistics = groups.complete()
        found.append(torch.stack([statistics.group_square_sum, statistics.gradient_norm_squared]))
        controller.update(statistics, learning_rate=0.01, loss=1.0)
        optimizer.step()
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["accumulation", "microbatches"])
def test_groups_of_ranks_are_those_of_a_loop(two, kind):
    model = network()
    optimizer, sums = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3), []
    for _ in range(3):
        optimizer.zero_grad()
        losses_of(model, list(range(M))).mean().backward()
        sums.append(expected(model, optimizer, list(EVEN)))
        optimizer.step()
    for found in two.all(on_ranks, kind):
        torch.testing.assert_close(found, torch.stack(sums), rtol=1e-9, atol=1e-12)


def of_pieces(is_late):
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.Adam(model.parameters())
    if is_late:
        losses_of(model, list(range(4)))
    cabs_torch.Accumulation(optimizer, batch_size=M, in_metric=True)


@pytest.mark.parametrize("is_late", [False, True])
def test_the_metric_of_pieces_is_refused(two, is_late):
    for said in two.run(of_pieces, is_late):
        assert "in_metric must be False where fully_shard leaves each rank a piece" in said
        assert "use DistributedDataParallel, or a rule that is not adaptive" in said


@pytest.mark.parametrize("make", [cabs_torch.Accumulation, cabs_torch.Microbatches])
def test_what_has_no_metric_is_an_error(make):
    model = network()
    with pytest.raises(TypeError, match="in_metric needs the optimizer in place of parameters"):
        make(model, batch_size=M, in_metric=True)
    adaptive = cabs.Controller(M, rule=cabs.Progress(overhead=8, adaptive=True))
    with pytest.raises(ValueError, match="in_metric must be True for a controller whose rule is"):
        make(model, batch_size=M, controller=adaptive)
    complex_ones = torch.optim.Adam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="for complex parameters"):
        make(complex_ones, batch_size=M, in_metric=True)
