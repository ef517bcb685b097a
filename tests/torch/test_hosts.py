"""Whoever takes a batch ahead of workers: what nobody has trained on is read again."""

import pytest
import torch

import cabs_torch

# There may be fewer cores than workers here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def ahead(loader):
    """Yield each batch when the next one has been taken."""
    batches = iter(loader)
    batch = next(batches, None)
    while batch is not None:
        following = next(batches, None)
        yield batch
        batch = following


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 1, "lag": 2},
    ],
)
def test_what_was_taken_ahead_is_neither_lost_nor_repeated(options):
    options = {**options, "one_ahead": True}
    order = torch.cat(list(cabs_torch.loader(range(90), 90))).tolist()
    with cabs_torch.loader(range(90), 9, **options) as loader:
        trained = []
        for batch in ahead(loader):
            trained += batch.tolist()
            assert loader.position == len(trained) or loader.epoch == 1
            if len(trained) == 27:
                break
        state = loader.state_dict()
        # The same loader goes on, and so does another one with its state.
        other = cabs_torch.loader(range(90), 9, **options)
        other.load_state_dict(state)
        with other:
            for one in (loader, other):
                rest = [index for batch in ahead(one) for index in batch.tolist()]
                assert trained + rest == order
                assert one.epoch == 1
