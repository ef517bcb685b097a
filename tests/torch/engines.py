"""What averages gradients over ranks, and a small network that several tests train under it."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed._composable.replicate_with_fsdp import replicate as replicate_by_fsdp
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.torch.models import cross_entropy

M = 24


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(M, 5, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), inputs[:, :3].argmax(dim=1)


def share(is_equal):
    """Return which examples this rank has: the same number, or the more the higher it is.

    With None it is one, and the last rank has all others.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if is_equal is None:
        return list(range(rank, M)) if rank == ranks - 1 else [rank]
    if is_equal:
        return list(range(rank, M, ranks))
    edges = [M * k * (k + 1) // (ranks * (ranks + 1)) for k in (rank, rank + 1)]
    return list(range(*edges))


def all_ranks():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def by_layers(model):
    mesh = all_ranks()
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hybrid(model):
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("all", "part"))
    return fully_shard(model, mesh=mesh)


def compressed(model):
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return wrapped


ENGINES = {
    "ddp": DistributedDataParallel,
    "static": lambda model: DistributedDataParallel(model, static_graph=True),
    "unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "fsdp": lambda model: fully_shard(model, mesh=all_ranks()),
    "fsdp by layers": by_layers,
    "hsdp": hybrid,
    "compressed": compressed,
    "replicate": replicate,
    "replicate by fsdp": lambda model: replicate_by_fsdp(model, mesh=all_ranks()),
}


def gradients(model):
    found = [one.grad for one in model.parameters()]
    whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in found]
    return torch.cat([one.flatten() for one in whole])


def weights(model):
    found = [one.detach() for one in model.parameters()]
    whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in found]
    return torch.cat([one.flatten() for one in whole])


def losses_of(model, examples, dtype=torch.float64):
    inputs, targets = batch(dtype)
    return cross_entropy(model(inputs[examples]), targets[examples])


@contextlib.contextmanager
def unreduced(model, *, is_last):
    if hasattr(model, "no_sync"):
        with contextlib.nullcontext() if is_last else model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(is_last)
        yield
