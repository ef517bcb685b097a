"""The loader in PyTorch: workers read ahead, and the batch size still follows at once."""

import itertools
import json
import multiprocessing
import os
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, TensorDataset, get_worker_info

import cabs_torch
from cabs import BatchSizes, Controller
from tests.core.runs import controller, run

# There may be fewer cores than workers here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Augmented(torch.utils.data.Dataset):
    """Examples that are their index, and numbers at random from all global generators."""

    def __init__(self, examples, bad=None):
        self.examples, self.bad = examples, bad

    def __len__(self):
        return self.examples

    def __getitem__(self, index):
        if index == self.bad:
            raise OSError(f"cannot read {index}")
        noise = (random.random(), np.random.rand(), torch.rand(2))
        return {"index": index, "noise": noise, "name": f"example {index}"}


class Stream(IterableDataset):
    """As many examples, one after the other, sharded by the worker that reads."""

    def __init__(self, examples, bad=None):
        self.examples, self.bad, self.epoch = examples, bad, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, self.examples, step):
            if index == self.bad:
                raise OSError(f"cannot read {index}")
            noise = (random.random(), np.random.rand(), torch.rand(2))
            yield {"index": 1000 * self.epoch + index, "noise": noise, "name": "of a stream"}


class Indices:
    """A loader as the runs know it: batches are the indices, and all that was drawn is kept."""

    def __init__(self, loader):
        self.loader, self.seen = loader, {}

    def __iter__(self):
        for batch in self.loader:
            for place, index in enumerate(batch["index"].tolist()):
                noise = [float(values[place]) for values in batch["noise"][:2]]
                noise += batch["noise"][2][place].tolist()
                self.seen.setdefault((self.loader.epoch, index), []).append(noise)
            yield batch["index"]

    def __getattr__(self, name):
        return getattr(self.loader, name)


def indices(dataset, *, low=2, high=24, **options):
    return Indices(cabs_torch.loader(dataset, controller(low, high), **options))


def followed(dataset, steps, **options):
    """Return the records of a run, and what it saw of each example."""
    batches = indices(dataset, **options)
    with batches.loader:
        return run(batches, steps), batches.seen


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing_not_even_augmentations(workers, persistent):
    expected = followed(Augmented(90), 40)
    assert expected[0][-1].epoch >= 2
    others = followed(Augmented(90), 40, num_workers=workers, persistent_workers=persistent)
    assert others == expected
    assert {record.lag for record in others[0]} == {0}


@pytest.mark.parametrize("lag", [1, 2])
def test_with_a_lag_workers_change_nothing_either(lag):
    one, other = (followed(Augmented(90), 30, lag=lag, num_workers=count) for count in (1, 2))
    assert one == other
    assert {record.lag for record in one[0]} == set(range(lag + 1))


def test_training_draws_the_random_numbers_that_it_would_have_drawn():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(3), random.random(), np.random.rand()
    for workers in (0, 2):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        followed(Augmented(40), 8, num_workers=workers)
        followed(Stream(40), 8, num_workers=workers)
        assert torch.equal(torch.rand(3), expected[0])
        assert (random.random(), np.random.rand()) == expected[1:]


def test_examples_draw_other_numbers_in_other_epochs_and_of_other_examples():
    _, seen = followed(Augmented(60), 60)
    numbers = [tuple(noise) for drawn in seen.values() for noise in drawn]
    assert len(set(numbers)) == len(numbers) >= 120


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 25), st.integers(0, 2), st.integers(0, 2), st.integers(1, 2),
    st.booleans(),
)  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(stop, before, after, lag, is_lagged):
    lag = lag if is_lagged and before and after else 0
    dataset = Augmented(70)
    whole, everything = followed(dataset, 30, lag=lag, num_workers=max(before, bool(lag)))
    first = indices(dataset, lag=lag, num_workers=before)
    with first.loader:
        records = run(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
    rest = indices(dataset, lag=lag, num_workers=after)
    with rest.loader:
        rest.load_state_dict(state)
        records += run(rest, 30 - stop)
    assert records == whole
    together = {**first.seen}
    for key, noise in rest.seen.items():
        together[key] = together.get(key, []) + noise
    assert together == everything


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_cut_as_it_comes(workers):
    batches = indices(Stream(50), num_workers=workers)
    with batches.loader:
        records = run(batches, 12)
    drawn = [index for record in records for index in record.examples]
    assert drawn == [1000 * (place // 50) + place % 50 for place in range(len(drawn))]
    assert (records, batches.seen) == followed(Stream(50), 12)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_goes_on_where_it_was(workers):
    whole, everything = followed(Stream(80), 20, num_workers=workers)
    first = indices(Stream(80), num_workers=workers)
    with first.loader:
        records = run(first, 7)
    rest = indices(Stream(80), num_workers=workers)
    with rest.loader:
        rest.load_state_dict(first.state_dict())
        records += run(rest, 13)
    assert records == whole
    assert {**first.seen, **rest.seen} == everything
    first_epoch = [i for record in whole if record.epoch == 0 for i in record.examples]
    assert sorted(first_epoch) == list(range(80))


def test_streams_read_by_another_number_of_workers_are_other_streams():
    state = indices(Stream(80), num_workers=2).state_dict()
    with pytest.raises(ValueError, match=r"order = '2 workers, 32 at a time' there and '' here"):
        indices(Stream(80), num_workers=1).load_state_dict(state)
    indices(Stream(80), num_workers=1).load_state_dict(indices(Stream(80)).state_dict())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Augmented, Stream])
def test_an_example_that_cannot_be_read_is_an_error_at_its_own_batch(kind, workers):
    workers = min(workers, 1) if kind is Stream else workers
    whole, _ = followed(kind(200), 9, num_workers=workers)
    bad = whole[4].examples[0]
    # A stream is read a little ahead, to see whether an example would be left alone.
    before = 3 if kind is Stream else 4
    batches = indices(kind(200, bad=bad), num_workers=workers)
    records = []
    with batches.loader:
        for _ in range(2):
            with pytest.raises(OSError, match=f"cannot read {bad}"):
                run(batches, 9, records=records)
            assert records == whole[:before]
        state = batches.state_dict()
    # Mended, it goes on with that batch.
    batches = indices(kind(200), num_workers=workers)
    with batches.loader:
        batches.load_state_dict(state)
        assert run(batches, 9, records=records) == whole


class Record:
    """A plain object that holds tensors."""

    def __init__(self, index):
        self.values, self.half = torch.full((2,), float(index)), torch.ones(1).bfloat16()


def test_tensors_in_other_objects_and_beside_nothing_need_no_descriptors():
    examples = [
        (
            Record(index),
            torch.ones(2) if index % 2 else None,
            {"a": 1, **({"b": 2} if index else {})},
        )
        for index in range(700)
    ]
    before = len(os.listdir("/proc/self/fd"))
    batches = cabs_torch.loader(examples, 350, shuffle=False, num_workers=1, collate_fn=list)
    with batches:
        drawn = list(batches)
        assert len(os.listdir("/proc/self/fd")) - before < 50
    for index, (record, ones, _) in enumerate(itertools.chain(*drawn)):
        assert record.values.tolist() == [index] * 2
        assert record.half.dtype == torch.bfloat16
        assert (ones is None) == (index % 2 == 0)


def test_a_default_device_is_none_of_the_workers_business():
    with torch.device("meta"):
        batches = cabs_torch.loader([torch.ones(2, device="cpu")] * 6, 3, num_workers=1)
        with batches:
            assert [batch.tolist() for batch in batches] == [[[1.0, 1.0]] * 3] * 2


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_end_when_nobody_needs_them(persistent):
    def alive():
        return len(multiprocessing.active_children())

    before = alive()
    batches = cabs_torch.loader(Augmented(20), 4, num_workers=2, persistent_workers=persistent)
    list(batches)
    assert alive() - before == (2 if persistent else 0)
    next(iter(batches))
    assert alive() - before == 2
    del batches
    assert alive() == before


def test_the_size_is_asked_for_once_a_batch():
    class Schedule:
        asked = 0

        @property
        def batch_size(self):
            self.asked += 1
            return 2 + self.asked % 5

    schedule = Schedule()
    with cabs_torch.loader(Augmented(60), schedule, num_workers=2) as batches:
        assert len(list(batches)) == schedule.asked - 1


class Slow(torch.utils.data.Dataset):
    """Tells when each example was read."""

    def __len__(self):
        return 400

    def __getitem__(self, index):
        return index, time.monotonic()


@pytest.mark.slow
@pytest.mark.parametrize(("lag", "size"), [(0, 16), (1, 16), (0, 64)])
def test_workers_are_busy_with_what_comes_next_while_a_step_runs(lag, size):
    batches = cabs_torch.loader(Slow(), size, lag=lag, num_workers=2, shuffle=False)
    with batches:
        handed = {}
        for _, moments in batches:
            if batches.batch.start > 0 and batches.batch.start + size <= 400 - size:
                # Read before the loop asked for it: while the step before it ran.
                assert float(moments.max()) < handed["before"] + 0.15
            time.sleep(0.15)
            handed["before"] = time.monotonic() - 0.15


def test_a_batch_far_larger_than_those_before_is_drawn_at_once():
    sizes = Controller(2, sizes=[2, 200], smoothing=0.0)
    batches = cabs_torch.loader(Slow(), sizes, num_workers=2, shuffle=False)
    lengths = []
    with batches:
        for index, _ in batches:
            lengths.append(len(index))
            sizes.update(learning_rate=1.0, variance_trace=200.0, loss=1.0)
    assert lengths == [2, 200, 198]


def test_the_ranks_together_have_every_example_once():
    shares = []
    for rank in range(3):
        batches = cabs_torch.loader(Augmented(50), 7, rank=rank, world_size=3, num_workers=1)
        with batches:
            shares += [batch["index"] for batch in batches]
    assert sorted(torch.cat(shares).tolist()) == list(range(50))
    assert {len(share) for share in shares} <= {1, 2, 3}


def test_a_collate_function_is_given_the_examples_themselves():
    given = []
    batches = cabs_torch.loader(
        [torch.arange(length) for length in range(1, 30)], 5, num_workers=1, shuffle=False,
        collate_fn=lambda examples: given.extend(examples) or len(examples),
    )  # fmt: skip
    with batches:
        assert list(batches) == [5, 5, 5, 5, 5, 4]
    assert [example.tolist() for example in given] == [list(range(k)) for k in range(1, 30)]


def test_a_collate_function_draws_the_numbers_of_its_batch():
    def noisy(examples):
        return len(examples), torch.rand(()).item(), random.random()

    def drawn(state=None):
        batches = cabs_torch.loader(Augmented(20), 4, collate_fn=noisy)
        if state is not None:
            batches.load_state_dict(state)
        iterator = iter(batches)
        first = [next(iterator), next(iterator)]
        return first, batches.state_dict(), iterator

    first, state, iterator = drawn()
    assert drawn()[0] == first
    third = next(iterator)
    assert drawn(state)[0][0] == third
    assert len({first[0], first[1], third}) == 3


def test_a_worker_tells_of_the_users_own_dataset():
    def initialize(worker_id):
        get_worker_info().dataset.bad = 3 + worker_id

    batches = cabs_torch.loader(
        Augmented(20), 4, num_workers=1, shuffle=False, worker_init_fn=initialize
    )
    with batches, pytest.raises(OSError, match="cannot read 3"):
        list(batches)


def test_a_dataset_that_reads_several_at_a_time_is_asked_so_without_reseeding():
    class Together(TensorDataset):
        def __getitems__(self, indices):
            return [(self.tensors[0][index], len(indices)) for index in indices]

    dataset = Together(torch.arange(10))
    assert [count.tolist() for _, count in cabs_torch.loader(dataset, 5, reseed=False)] == [
        [5] * 5, [5] * 5
    ]  # fmt: skip
    assert len(next(iter(cabs_torch.loader(dataset, 5)))) == 1

    class TooFew(Together):
        def __getitems__(self, indices):
            return super().__getitems__(indices)[:-1]

    with pytest.raises(ValueError, match="one example for each index, got 4 for 5"):
        list(cabs_torch.loader(TooFew(torch.arange(10)), 5, reseed=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": []}, "dataset must hold at least one example"),
        ({"lag": 1}, "a thread reads the dataset"),
        ({"dataset": Stream(9), "shuffle": True}, "shuffle=True is for datasets with an index"),
        (
            {"dataset": Stream(9), "persistent_workers": True, "num_workers": 1},
            "persistent_workers=True is for datasets with an index",
        ),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"timeout": -1}, "timeout option should be non-negative"),
        ({"persistent_workers": True}, "needs num_workers > 0"),
        ({"world_size": 2, "rank": 2}, "rank must be below world_size"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cabs_torch.loader(**{"dataset": Augmented(9), "controller": 3, **arguments})


def test_an_empty_stream_is_an_error():
    with pytest.raises(ValueError, match="the stream of epoch 0 holds no example"):
        list(cabs_torch.loader(Stream(0), 4))


def test_sizes_larger_than_the_dataset_are_the_dataset():
    (batch,) = cabs_torch.loader(Augmented(5), Controller(64, sizes=BatchSizes.range(16, 64)))
    assert sorted(batch["index"].tolist()) == list(range(5))
