"""Gradients that ranks compute together are measured as what they are, or there is an error."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

import cabs_torch
from cabs_torch.graph.collectives import is_collective
from tests.torch.engines import ENGINES, M, losses_of, network, unreduced


def of_tensor_parallelism(how):
    """Return what is measured of a layer that is cut in two, and an uncut one."""
    model, mesh = network(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
    if how == "Accumulation":
        return cabs_torch.Accumulation(model, batch_size=M)
    if how == "Microbatches":
        return cabs_torch.Microbatches(model, batch_size=M)
    losses = losses_of(model, list(range(M)))
    options = {} if how == "backward" else how
    if "uncut" in options:
        options = {"parameter_groups": [list(model[3].parameters())], "process_group": False}
        measured = cabs_torch.backward(losses, **options)
        return float(measured.variance_trace[0]), float(model[3].weight.grad.sum())
    found = cabs_torch.backward(losses, **options)
    return found.read()


@pytest.mark.parametrize(
    "how", ["backward", {"process_group": False}, {"uncovered": "microbatches"}]
)
def test_parameters_that_tensor_parallelism_has_cut_are_an_error_with_a_remedy(two, how):
    for said in two.run(of_tensor_parallelism, how):
        assert "UncoveredParameterError" in said
        assert "computes a DTensor, of which this rank may hold a part" in said
        assert "'0.weight' of Sequential" in said
        assert "train with DistributedDataParallel or fully_shard; or leave them out" in said
        assert "Accumulation" not in said


def test_what_tensor_parallelism_has_not_cut_is_measured(two):
    model = network()
    losses = losses_of(model, list(range(M)))
    expected = cabs_torch.backward(losses, parameter_groups=[list(model[3].parameters())])
    expected = float(expected.variance_trace[0]), float(model[3].weight.grad.sum())
    for found in two.all(of_tensor_parallelism, {"uncut": True}):
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("how", ["Accumulation", "Microbatches"])
def test_groups_of_tensor_parallelism_are_an_error(two, how):
    for said in two.run(of_tensor_parallelism, how):
        assert "Of tensor parallelism there are no statistics" in said


class Attention(nn.Module):
    """Attention in which each rank has a part of each sequence, and gathers the keys."""

    def __init__(self, gather):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(5, 4), nn.Linear(5, 4)
        self.gather = gather
        self.double()

    def forward(self, inputs):
        keys = self.key(inputs).transpose(0, 1).contiguous()
        with warnings.catch_warnings():
            # One of the two is on its way out.
            warnings.simplefilter("ignore", FutureWarning)
            keys = self.gather(keys).transpose(0, 1)
        return (self.query(inputs) @ keys.mT).softmax(dim=2) @ keys


def by_functional_collectives(keys):
    return functional.all_gather_single_autograd(keys, 0, dist.group.WORLD)


def by_differentiable_ones(keys):
    return torch.cat(differentiable.all_gather(keys))


class Gathered(torch.autograd.Function):
    """A gather as trainers write it themselves."""

    @staticmethod
    def forward(_, keys):
        parts = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, keys)
        return torch.cat(parts)

    @staticmethod
    def backward(_, cotangent):
        summed = cotangent.contiguous()
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()]


class Exchanged(torch.autograd.Function):
    """A ring of two ranks."""

    @staticmethod
    def forward(_, keys):
        return torch.cat([keys, Exchanged.sent(keys)])

    @staticmethod
    def backward(_, cotangent):
        own, other = cotangent.chunk(2)
        return own + Exchanged.sent(other.contiguous())

    @staticmethod
    def sent(mine):
        peer, theirs = 1 - dist.get_rank(), torch.empty_like(mine)
        both = dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)
        for work in dist.batch_isend_irecv(list(both)):
            work.wait()
        return theirs


GATHERS = [by_functional_collectives, by_differentiable_ones, Gathered.apply, Exchanged.apply]
NAMES = ["functional", "differentiable", "own", "ring"]


def of_context_parallelism(number, how):
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(6, 8, 5, generator=generator, dtype=torch.float64)
    # Gradients that an engine averages look as those of ranks that compute alone do.
    model = DistributedDataParallel(Attention(GATHERS[number]))
    mine = whole.chunk(2, dim=1)[dist.get_rank()]
    if how == "Microbatches":
        with cabs_torch.Microbatches(model, batch_size=12) as groups:
            model(mine).square().mean().backward()
        return groups.complete().read()
    if how == "one":
        # Nothing is tried out where there is a single example.
        losses = model(mine[:1]).square().mean(dim=(1, 2))
        return cabs_torch.backward(losses, batch_size=2).read()
    losses = model(mine).square().mean(dim=(1, 2))
    if how == "Accumulation":
        accumulation = cabs_torch.Accumulation(model, batch_size=12)
        return accumulation.backward(losses.mean(), examples=6)
    return cabs_torch.backward(losses, **how).read()


@pytest.mark.parametrize("number", range(len(GATHERS)), ids=NAMES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"process_group": False},
        {"uncovered": "microbatches"},
        *("Accumulation", "Microbatches", "one"),
    ],
)
def test_numbers_that_pass_from_rank_to_rank_are_an_error(two, number, how):
    for said in two.run(of_context_parallelism, number, how):
        kind = "RuntimeError" if how == "Microbatches" else "UncoveredParameterError"
        assert said.startswith(f"{kind}: "), said
        assert "passes numbers from rank to rank, as context and expert parallelism do" in said


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_, inputs):
        return 2.0 * inputs

    @staticmethod
    def backward(_, cotangent):
        return 2.0 * cotangent


class WithAFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, inputs):
        return Doubled.apply(self.inner(inputs))


APPLY, BACKWARD = BackwardCFunction.apply, torch.autograd.backward


def of_a_function_that_sends_nothing(engine):
    """Return what is measured of the same groups in two ways, where an engine sends much."""
    model = ENGINES[engine](WithAFunction())
    pieces = torch.arange(M).tensor_split(4)[dist.get_rank() :: 2]
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        for number, piece in enumerate(pieces):
            with unreduced(model, is_last=number == 1):
                (losses_of(model, piece).mean() / 2).backward()
    found = [groups.complete().read()]
    model.zero_grad()
    groups = cabs_torch.Accumulation(model, batch_size=M)
    for number, piece in enumerate(pieces):
        with unreduced(model, is_last=number == 1):
            groups.backward(losses_of(model, piece).mean(), examples=M // 4)
    found.append(groups.complete().read())
    assert BackwardCFunction.apply is APPLY
    assert torch.autograd.backward is BACKWARD
    return [one.variance_trace for one in found]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_functions_that_send_nothing_are_measured(two, engine):
    model = WithAFunction()
    accumulation = cabs_torch.Accumulation(model, batch_size=M)
    for piece in torch.arange(M).tensor_split(4):
        accumulation.backward(losses_of(model, piece).mean(), examples=M // 4)
    expected = accumulation.complete().read().variance_trace
    for found in two.all(of_a_function_that_sends_nothing, engine):
        assert found == pytest.approx([expected] * 2)


def test_normalization_over_ranks_passes_numbers_from_rank_to_rank():
    # It has no forward pass on a CPU.
    node = SimpleNamespace(name=lambda: "SyncBatchNormBackward", _forward_cls=SyncBatchNorm)
    assert is_collective(node)


def of_a_mesh_of_one(kind):
    """Return what a rank measures alone of a model that ``fully_shard`` holds on it alone."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("outer", "inner"))
    model = fully_shard(network(), mesh=mesh["inner"])
    pieces, options = torch.arange(M).split(M // 2), {"batch_size": M, "process_group": False}
    for _ in range(2):
        model.zero_grad()
        if kind == "accumulation":
            groups = cabs_torch.Accumulation(model, **options)
            for number, piece in enumerate(pieces):
                model.set_requires_gradient_sync(number == 1)
                groups.backward(losses_of(model, piece).mean(), examples=M // 2)
        else:
            with cabs_torch.Microbatches(model, **options) as groups:
                for piece in pieces:
                    (losses_of(model, piece).mean() / 2).backward()
        statistics = groups.complete().read()
    return statistics


@pytest.mark.parametrize("kind", ["accumulation", "microbatches"])
def test_a_mesh_of_one_rank_inside_of_others_is_that_ranks_own(two, kind):
    model = network()
    accumulation = cabs_torch.Accumulation(model, batch_size=M)
    for piece in torch.arange(M).split(M // 2):
        accumulation.backward(losses_of(model, piece).mean(), examples=M // 2)
    expected = accumulation.complete().read()
    for found in two.all(of_a_mesh_of_one, kind):
        assert found.variance_trace == pytest.approx(expected.variance_trace, rel=1e-10)
        assert found.gradient_norm_squared == pytest.approx(expected.gradient_norm_squared)
