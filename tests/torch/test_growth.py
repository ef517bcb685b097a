"""A dataset that grows: each epoch reads what there is when it begins, whoever reads it."""

import pytest
import torch

import cabs_torch

# There may be fewer cores than workers here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Replay(torch.utils.data.Dataset):
    """What was collected so far."""

    def __init__(self, length):
        self.values = list(range(length))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


def epoch_of(loader):
    return torch.cat(list(loader)).tolist()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 1, "lag": 2},
        {"lag": 1, "reseed": False},
    ],
)
def test_every_epoch_reads_what_there_is_when_it_begins(shuffle, options):
    dataset = Replay(20)
    with cabs_torch.loader(dataset, 8, shuffle=shuffle, **options) as loader:
        assert sorted(epoch_of(loader)) == list(range(20))
        dataset.values += range(20, 50)
        assert sorted(epoch_of(loader)) == list(range(50))
        assert sorted(epoch_of(loader)) == list(range(50))
        del dataset.values[30:]
        assert sorted(epoch_of(loader)) == list(range(30))


def test_workers_that_live_on_are_the_same_while_the_length_is():
    dataset = Replay(20)
    options = {"num_workers": 1, "persistent_workers": True}
    with cabs_torch.loader(dataset, 8, collate_fn=lambda examples: examples, **options) as loader:

        def worker():
            list(loader)
            return loader._fetch._data_loader._iterator._workers[0].pid

        first = worker()
        assert worker() == first
        dataset.values += [20]
        assert worker() != first


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_shrinks_within_an_epoch_is_an_error_and_is_not_read_beyond_its_end(workers):
    dataset = Replay(40)
    with cabs_torch.loader(dataset, 8, num_workers=workers) as loader:
        batches = iter(loader)
        next(batches)
        del dataset.values[20:]
        with pytest.raises(
            ValueError, match=r"epoch 0 began with 40 examples, .* and there are 20"
        ):
            next(batches)
        assert loader.position == 8


def test_the_ranks_follow_together():
    dataset = Replay(20)
    ranks = [cabs_torch.loader(dataset, 8, rank=rank, world_size=2) for rank in range(2)]
    for length in (20, 33):
        dataset.values = list(range(length))
        assert sorted(index for rank in ranks for index in epoch_of(rank)) == list(range(length))
