"""Several processes that train together are one that trains alone."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import cabs
import cabs_torch
from tests.processes import joined


def dataset():
    torch.manual_seed(0)
    inputs = torch.randn(203, 5)
    return TensorDataset(torch.arange(203), inputs, inputs @ torch.arange(5.0) + torch.randn(203))


class Run:
    """A model, what trains it, and what a step does with this process's share of a batch."""

    def __init__(self):
        # Float64, since sums over ranks round otherwise than those of one process.
        self.model = torch.nn.Linear(5, 1, dtype=torch.float64)
        torch.nn.init.zeros_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.15)
        sizes = cabs.BatchSizes.range(6, 60)
        self.controller = cabs.Controller(6, sizes=sizes, rule=cabs.CABS(0.45))

        self.wrapped = self.model
        if dist.is_initialized():
            self.wrapped = DistributedDataParallel(self.model)

    def step(self, m, inputs, outputs):
        losses = 0.5 * (self.wrapped(inputs.double()).squeeze(1) - outputs).square()
        self.optimizer.zero_grad()
        statistics = cabs_torch.backward(losses, batch_size=m, controller=self.controller)
        self.optimizer.step()
        return self.controller.update(statistics, learning_rate=0.15).batch_size

    def weights(self):
        return torch.cat([one.detach().flatten() for one in self.model.parameters()])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(7))


def in_one_of(rank, ranks, folder, lag):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    run, seen = Run(), []
    loader = cabs_torch.loader(dataset(), run.controller, lag=lag, num_workers=min(lag, 1), seed=3)
    with loader:
        while loader.epoch < 3:
            for indices, inputs, outputs in loader:
                decided = run.step(loader.batch.examples, inputs, outputs)
                seen.append((loader.batch.epoch, loader.batch.examples, decided, indices))
    with pytest.raises(ValueError, match="may shard itself by rank"):
        cabs_torch.loader(Stream(), 6)
    shared = cabs_torch.loader(Stream(), 6, rank=rank, world_size=ranks)
    assert torch.cat(list(shared)).tolist() == list(range(7))[rank::ranks]
    torch.save((seen, run.weights()), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("ranks", "lag"), [(2, 0), (3, 1)])
def test_ranks_that_train_together_are_one_that_trains_alone(tmp_path, ranks, lag):
    started = mp.start_processes(
        in_one_of, (ranks, tmp_path, lag), nprocs=ranks, join=False, start_method="fork"
    )
    joined(started)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    alone, sizes, drawn = Run(), set(), {}
    for shares in zip(*(seen for seen, _ in found), strict=True):
        # The same step in all of them, and of all examples in this process.
        ((epoch, m, decided),) = {share[:3] for share in shares}
        indices = torch.cat([share[3] for share in shares])
        assert len(indices) == m
        assert alone.step(m, *dataset()[indices][1:]) == decided
        sizes.add(m)
        drawn.setdefault(epoch, []).extend(indices.tolist())
    assert len(sizes) > 3
    assert [sorted(drawn[epoch]) for epoch in range(3)] == [list(range(203))] * 3
    for _, weights in found:
        assert torch.equal(weights, found[0][1])
        torch.testing.assert_close(weights, alone.weights(), rtol=1e-9, atol=0)
