"""Data that grow or shrink: an epoch is as long as they were when it began, or an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import BatchSampler
from cabs.data import Loader
from tests.core.runs import controller

lags = st.integers(0, 3)
lengths = st.lists(st.integers(1, 60), min_size=2, max_size=5)


class Data:
    """So many examples."""

    def __init__(self, length):
        self.length = length

    def __call__(self):
        return self.length


def loader(data, *, lag=0, **options):
    return Loader(list, BatchSampler(data, controller(), **options), lag=lag)


def epoch_of(batches):
    return [index for batch in batches for index in batch]


@given(lengths, lags, st.booleans())
def test_every_epoch_is_as_long_as_its_data_when_it_begins(lengths, lag, shuffle):
    data = Data(3)
    with loader(data, lag=lag, shuffle=shuffle) as batches:
        for epoch, data.length in enumerate(lengths):
            drawn = epoch_of(batches)
            assert sorted(drawn) == list(range(data.length))
            assert shuffle or drawn == list(range(data.length))
            assert batches.epoch == epoch + 1


@given(lengths, st.integers(1, 4))
def test_ranks_follow_together(lengths, world_size):
    data = Data(3)
    ranks = [
        Loader(list, BatchSampler(data, 8, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for data.length in lengths:
        drawn = [index for batches in ranks for index in epoch_of(batches)]
        assert sorted(drawn) == list(range(data.length))


def test_what_is_upcoming_is_what_is_drawn():
    data = Data(5)
    sampler = BatchSampler(data, 2)
    epoch_of(sampler)
    data.length = 9
    upcoming = sampler.upcoming().tolist()
    assert sorted(upcoming) == list(range(9))
    assert epoch_of(sampler) == upcoming


def test_a_sampler_alone_follows_too():
    data = Data(5)
    sampler = BatchSampler(data, 2)
    for data.length in (5, 9, 2):
        assert sorted(epoch_of(sampler)) == list(range(data.length))


@pytest.mark.parametrize("lag", [0, 2])
def test_what_comes_within_an_epoch_is_said_and_drawn_in_the_next_one(lag):
    data = Data(20)
    with loader(data, lag=lag) as batches:
        rest = iter(batches)
        drawn = next(rest)
        data.length = 30
        with pytest.warns(RuntimeWarning, match="there are 30 examples now, and epoch 0 began w"):
            drawn += epoch_of(rest)
        assert sorted(drawn) == list(range(20))
        assert sorted(epoch_of(batches)) == list(range(30))


@pytest.mark.parametrize("lag", [0, 2])
def test_what_goes_within_an_epoch_is_an_error_and_is_not_asked_for(lag):
    data = Data(40)
    with loader(data, lag=lag, shuffle=False) as batches:
        rest = iter(batches)
        drawn = next(rest)
        data.length = 30
        with pytest.raises(ValueError, match=r"epoch 0 began with 40 examples, of which .* 30 now"):
            epoch_of(rest)
        assert drawn == list(range(batches.position))
        # Back again, it goes on.
        data.length = 40
        assert drawn + epoch_of(batches) == list(range(40))


def test_data_that_are_all_gone_are_an_error_when_the_next_epoch_begins():
    data = Data(4)
    batches = loader(data)
    epoch_of(batches)
    data.length = 0
    with pytest.raises(ValueError, match="examples must be at least 1, got examples = 0"):
        epoch_of(batches)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 6), lags)
def test_a_state_is_of_its_epochs_length_unless_that_has_ended(there, here, steps, lag):
    with loader(Data(there), lag=lag) as batches:
        for taken, _ in enumerate(batches):
            if taken == steps:
                break
        state = batches.state_dict()
    epoch, position = (state["sampler"][name] for name in ("epoch", "position"))
    with loader(Data(here), lag=lag) as resumed:
        if here != there and 0 < position < there:
            with pytest.raises(ValueError, match=f"examples = {there} there and {here} here"):
                resumed.load_state_dict(state)
            assert (resumed.epoch, resumed.position) == (0, 0)
            return
        resumed.load_state_dict(state)
        if here == there:
            assert resumed.state_dict() == state
            assert len(epoch_of(resumed)) == there - position
        else:
            assert sorted(epoch_of(resumed)) == list(range(here))
            assert resumed.epoch == epoch + (2 if position else 1)


@pytest.mark.parametrize("length", [9, 50])
def test_the_end_that_was_seen_ahead_is_not_that_of_a_longer_epoch(length):
    data = Data(20)
    fails = [True]

    def fetch(drawn):
        if fails:
            raise OSError("not yet")
        return drawn.tolist()

    # All of the epoch has been drawn, and nothing handed out.
    batches = Loader(fetch, BatchSampler(data, 8), lag=5)
    with pytest.raises(OSError, match="not yet"):
        epoch_of(batches)
    state = batches.state_dict()
    assert state["is_drawn"]
    fails.clear()
    data.length = length
    other = Loader(fetch, BatchSampler(data, 8), lag=5)
    other.load_state_dict(state)
    for loader in (batches, other):
        assert sorted(epoch_of(loader)) == list(range(length))


def test_a_state_that_is_refused_leaves_the_epoch_its_length():
    data = Data(30)
    state = loader(data).state_dict()
    state["controller"]["state"]["step"] = -1
    data.length = 20
    batches = loader(data)
    rest = iter(batches)
    drawn = next(rest)
    data.length = 30
    before = batches.state_dict()
    with pytest.raises(ValueError, match="damaged"):
        batches.load_state_dict(state)
    assert batches.state_dict() == before
    with pytest.warns(RuntimeWarning, match="epoch 0 began with 20"):
        drawn += epoch_of(batches)
    assert sorted(drawn) == list(range(20))


def test_a_state_after_a_batch_of_an_earlier_epoch_is_of_the_length_that_it_had():
    data = Data(20)
    batches, taken = Loader(list, BatchSampler(data, 4)), []
    for _ in range(3):
        taken += [(batches.batch, drawn) for drawn in batches]
        data.length += 4
    third, _ = taken[2]
    state = batches.state_dict(after=third)
    assert (state["sampler"]["examples"], state["sampler"]["position"]) == (20, 12)
    with pytest.raises(ValueError, match="examples = 20 there"):
        Loader(list, BatchSampler(data, 4)).load_state_dict(state)
    data.length = 20
    resumed = Loader(list, BatchSampler(data, 4))
    resumed.load_state_dict(state)
    assert list(resumed) == [drawn for batch, drawn in taken if batch.epoch == 0][3:]


def test_a_number_is_a_number_for_good():
    state = Loader(list, BatchSampler(10, 4)).state_dict()
    with pytest.raises(ValueError, match="examples = 10 there and 12 here"):
        Loader(list, BatchSampler(12, 4)).load_state_dict(state)
