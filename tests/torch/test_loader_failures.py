"""Workers that die, and examples that break: told at their batch, and nothing is lost."""

import sys

import pytest
import torch

import cabs_torch
from tests.processes import finished

# There may be fewer cores than workers here.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

# In a process of its own, which can be ended if it waits for ever.
DYING = """
import os, signal, sys, time
import cabs_torch, torch

class Dying(torch.utils.data.Dataset):
    dies = True
    def __len__(self):
        return 200
    def __getitem__(self, index):
        if index == 150 and self.dies and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return index

lag, persistent, timeout = int(sys.argv[1]), bool(int(sys.argv[2])), float(sys.argv[3])
dataset = Dying()
order = torch.cat(list(cabs_torch.loader(dataset, 200))).tolist()
batches = cabs_torch.loader(
    dataset, 9, num_workers=2, lag=lag, persistent_workers=persistent, timeout=timeout
)
inside = False
try:
    for batch in batches:
        inside = True
        time.sleep(0.02)
        inside = False
except RuntimeError as error:
    assert "DataLoader worker" in str(error), error
    # PyTorch's own interrupts the step that is at work when a worker dies.
    assert not inside
else:
    raise AssertionError("nobody died")
position = batches.position
assert position <= order.index(150)
dataset.dies = False
# The same loader goes on, and so does another one with its state.
other = cabs_torch.loader(dataset, 9, num_workers=1)
other.load_state_dict(batches.state_dict())
for loader in (batches, other):
    with loader:
        assert torch.cat(list(loader)).tolist() == order[position:]
"""


# The last waits for longer than the process may live, where the dead are not looked for meanwhile.
@pytest.mark.parametrize("options", ["0 0 0", "0 1 0", "1 0 0", "0 0 1000"])
def test_a_worker_that_dies_is_an_error_and_nothing_is_lost(options):
    command = [sys.executable, "-W", "ignore", "-c", DYING, *options.split()]
    done = finished(command, limit=120.0)
    assert done.returncode == 0, done.stderr


class Broken(torch.utils.data.Dataset):
    """Breaks at its sixth example."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index if index != 5 else self.how()


def stop():
    raise StopIteration


def local_error():
    class OwnError(Exception):
        pass

    raise OwnError("only the worker knows this type")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("reseed", [False, True])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        (stop, "generator raised StopIteration"),
        (local_error, "only the worker knows this type"),
        (lambda: lambda: None, "Can't (get|pickle) local object"),
    ],
)
def test_whatever_breaks_at_an_example_is_told_and_ends_no_epoch(how, message, workers, reseed):
    batches = cabs_torch.loader(
        Broken(how), 4, shuffle=False, num_workers=workers, reseed=reseed, collate_fn=list
    )
    with batches:
        iterator = iter(batches)
        assert next(iterator) == [0, 1, 2, 3]
        if not workers and "local object" in message:
            return
        with pytest.raises(Exception, match=message):
            next(iterator)
        assert batches.position == 4
