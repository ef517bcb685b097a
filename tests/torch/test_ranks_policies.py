"""``fully_shard`` in half precision, with pieces on the host, and replicas reduced late."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import cabs_torch
from tests.torch.engines import M, all_ranks, gradients, losses_of, network
from tests.torch.test_microbatches import expected
from tests.torch.test_ranks_statistics import assert_same

pytestmark = pytest.mark.slow

# Microbatches of each rank.
K = 3


def by_layers(model, mesh, **policy):
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def in_half_precision(model):
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    return by_layers(model, all_ranks(), mp_policy=policy)


def on_the_host(model):
    policy = CPUOffloadPolicy(pin_memory=False)
    return by_layers(model, all_ranks(), offload_policy=policy)


def reduced_late(model):
    return by_layers(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("all", "part")))


def each(model, pieces, dtype):
    """Yield the losses of each microbatch, of which the last one is reduced over all ranks."""
    for number, piece in enumerate(pieces):
        is_last = number == len(pieces) - 1
        if dist.get_world_size() == 4:
            # Pieces are summed in each pass, and their replicas in the last one.
            model.set_requires_all_reduce(is_last)
        else:
            model.set_requires_gradient_sync(is_last)
        yield losses_of(model, piece, dtype)


def by_backward(model, pieces, dtype):
    parts = [cabs_torch.backward(one, batch_size=M) for one in each(model, pieces, dtype)]
    return sum(one.partial for one in parts).complete(
        gradient_norm_squared=cabs_torch.gradient_norm_squared(model.parameters()),
        loss=sum(one.loss * one.examples for one in parts) / M,
    )


def by_accumulation(model, pieces, dtype):
    groups = cabs_torch.Accumulation(model, batch_size=M)
    for losses in each(model, pieces, dtype):
        groups.backward(losses.mean(), examples=len(losses))
    return groups.complete()


def by_microbatches(model, pieces, dtype):
    total = 0.0
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        for losses in each(model, pieces, dtype):
            loss = losses.mean() / len(pieces)
            loss.backward()
            total += loss.detach()
    return groups.complete(loss=total)


def trained(policy, act, dtype, count=K):
    """Return the statistics and the gradient of the second of two steps."""
    model, ranks = policy(network(dtype)), dist.get_world_size()
    pieces = torch.arange(M).tensor_split(ranks * count)[dist.get_rank() :: ranks]
    for _ in range(2):
        model.zero_grad()
        statistics = act(model, pieces, dtype).read()
    return statistics, gradients(model)


def of_one_process(act, groups, dtype):
    if act is not by_backward:
        return expected(groups, dtype)
    model = network(dtype)
    return cabs_torch.backward(losses_of(model, range(M), dtype)).read(), gradients(model)


def assert_as_one_process(found, act, groups, dtype, rtol):
    statistics, gradient = of_one_process(act, groups, dtype)
    for one, other in found:
        assert one == found[0][0]
        assert_same([[one], other], [[statistics], gradient], rtol)


ACTS = [by_backward, by_accumulation, by_microbatches]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("count", [1, K])
def test_half_precision_is_measured_as_it_is_trained(two, act, count):
    found = two.all(trained, in_half_precision, act, torch.float32, count)
    assert_as_one_process(found, act, 2 * count, torch.float32, 0.02)


@pytest.mark.parametrize("act", ACTS)
def test_pieces_on_the_host_are_those_of_one_process(two, act):
    found = two.all(trained, on_the_host, act, torch.float64)
    assert_as_one_process(found, act, 2 * K, torch.float64, 1e-10)


@pytest.mark.parametrize("act", ACTS)
def test_replicas_that_are_reduced_late_are_those_of_one_process(four, act):
    found = four.all(trained, reduced_late, act, torch.float64)
    assert_as_one_process(found, act, 4 * K, torch.float64, 1e-10)
