"""What statistics add to the collectives of a training step, as PyTorch's profiler sees them."""

from collections import Counter

import torch

import cabs_torch
from tests.torch.engines import ENGINES, M, losses_of, network, share, unreduced

# By what a step is called: the engine, the microbatches of each rank, and what measures.
STEPS = {
    "``backward``, ``DistributedDataParallel``": ("ddp", 1, "backward"),
    "``backward``, ``fully_shard`` of each layer": ("fsdp by layers", 1, "backward"),
    "``backward``, ``fully_shard`` on a mesh of 2 x 2": ("hsdp", 1, "backward"),
    "``backward`` of 3 microbatches, ``DistributedDataParallel``": ("ddp", 3, "backward"),
    "``Accumulation`` of 3, ``DistributedDataParallel``": ("ddp", 3, "Accumulation"),
    "``Accumulation`` of 3, ``fully_shard`` of each layer": ("fsdp by layers", 3, "Accumulation"),
    "``Microbatches``, 3 of them, ``DistributedDataParallel``": ("ddp", 3, "Microbatches"),
    "``Microbatches``, 3 of them, ``fully_shard`` of each layer": (
        *("fsdp by layers", 3),
        "Microbatches",
    ),
}


def passes(model, count, act):
    """Call a function with the losses of each microbatch, the last one reduced."""
    pieces = torch.tensor(share(True)).tensor_split(count)
    for number, piece in enumerate(pieces):
        with unreduced(model, is_last=number == count - 1):
            act(losses_of(model, piece))


def plain(model, count):
    passes(model, count, lambda losses: (losses.mean() / count).backward())


def by_backward(model, count):
    parts = []
    passes(model, count, lambda losses: parts.append(cabs_torch.backward(losses, batch_size=M)))
    if count == 1:
        return parts[0].read()
    norm_squared = cabs_torch.gradient_norm_squared(model.parameters())
    whole = sum(one.partial for one in parts)
    return whole.complete(gradient_norm_squared=norm_squared).read()


def by_accumulation(model, count):
    groups = cabs_torch.Accumulation(model, batch_size=M)
    passes(model, count, lambda losses: groups.backward(losses.mean(), examples=len(losses)))
    return groups.complete().read()


def by_microbatches(model, count):
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        plain(model, count)
    return groups.complete().read()


MEASURED = {
    "backward": by_backward,
    "Accumulation": by_accumulation,
    "Microbatches": by_microbatches,
}


def collectives(model, count, step):
    """Return the collectives of a step, by name and how many numbers they have."""
    model.zero_grad()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as seen:
        step(model, count)
    # As they were recorded: to make a tree of all events takes longer than the step.
    events = seen.profiler.kineto_results.events()
    found = [one for one in events if one.name().startswith("gloo:")]
    return Counter((one.name(), sum(map(sum, one.shapes()))) for one in found)


def counted(label):
    """Return what a step has without statistics, and what they add, on one of the ranks."""
    engine, count, measured = STEPS[label]
    steps = {}
    for step in (plain, MEASURED[measured]):
        model = ENGINES[engine](network())
        first = collectives(model, count, step)
        # After the second one DDP has its buckets.
        model.zero_grad()
        step(model, count)
        steps[step] = first, collectives(model, count, step)
    (first, before), (first_measured, after) = steps.values()
    added = after - before
    assert not before - after, "a collective is gone"
    return {
        "plain": before.total(),
        "added": added.total(),
        "numbers added": sum(numbers * times for (_, numbers), times in added.items()),
        "more in the first step": (first_measured - first).total() - added.total(),
    }
