"""The sampler: every example exactly once an epoch, whatever the sizes do."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import BatchSampler, BatchSizes, Controller


class Sizes:
    """Says one size after another, round and round."""

    def __init__(self, sizes):
        self.sizes, self.asked = sizes, 0

    @property
    def batch_size(self):
        self.asked += 1
        return self.sizes[(self.asked - 1) % len(self.sizes)]


examples = st.integers(1, 300)
sizes = st.lists(st.integers(1, 80), min_size=1, max_size=8)
seeds = st.integers(0, 2**64)


def drawn(sampler):
    return [indices.tolist() for indices in sampler]


def flat(batches):
    return [index for batch in batches for index in batch]


@given(examples, sizes, seeds, st.booleans())
def test_every_epoch_is_a_partition_whatever_sizes_arrive(examples, sizes, seed, shuffle):
    sampler = BatchSampler(examples, Sizes(sizes), seed=seed, shuffle=shuffle)
    for epoch in range(3):
        assert (sampler.epoch, sampler.position) == (epoch, 0)
        batches = drawn(sampler)
        assert sorted(flat(batches)) == list(range(examples))
        assert all(batches)


@given(examples, sizes, seeds, st.integers(1, 6))
def test_the_ranks_together_draw_every_example_once(examples, sizes, seed, world_size):
    sizes = [max(size, world_size) for size in sizes]
    ranks = [
        drawn(BatchSampler(examples, Sizes(sizes), seed=seed, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    # The order is that of a single rank, whose batches can differ by one at the end. Which rank
    # has which example does not depend on the sizes.
    alone = flat(drawn(BatchSampler(examples, Sizes(sizes), seed=seed)))
    for rank, batches in enumerate(ranks):
        assert flat(batches) == alone[rank::world_size]
    for shares in zip(*ranks, strict=True):
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1


@given(st.integers(80, 300), sizes, seeds)
def test_dropping_the_last_batch_leaves_whole_batches_without_repetition(examples, sizes, seed):
    asked = Sizes(sizes)
    sampler = BatchSampler(examples, asked, seed=seed, drop_last=True)
    asked.asked = 0
    batches = drawn(sampler)
    assert [len(batch) for batch in batches] == [
        sizes[number % len(sizes)] for number in range(len(batches))
    ]
    assert len(set(flat(batches))) == len(flat(batches))
    missing = examples - len(flat(batches))
    assert missing == 0 or missing < sizes[(asked.asked - 1) % len(sizes)]


@given(examples, sizes, seeds, st.integers(1, 40))
def test_a_restored_sampler_draws_what_the_first_would_have_drawn(examples, sizes, seed, stop):
    whole = BatchSampler(examples, Sizes(sizes), seed=seed)
    batches = [drawn(whole), drawn(whole)]
    first, taken = BatchSampler(examples, Sizes(sizes), seed=seed), []
    for indices in first:
        taken.append(indices.tolist())
        state = first.state_dict()
        if len(taken) == stop:
            break
    source = Sizes(sizes)
    resumed = BatchSampler(examples, source, seed=seed)
    source.asked = len(taken)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert (resumed.epoch, resumed.position) == (0, len(flat(taken)))
    assert taken + drawn(resumed) == batches[0]
    assert drawn(resumed) == batches[1]


@given(examples, sizes, seeds, st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_resuming_with_another_number_of_ranks_loses_and_repeats_nothing(
    examples, sizes, seed, before, after, stop
):
    sizes = [max(size, before, after) for size in sizes]
    taken, state = [], None
    for rank in range(before):
        sampler = BatchSampler(examples, Sizes(sizes), seed=seed, rank=rank, world_size=before)
        batches = iter(sampler)
        for _ in range(stop):
            taken += next(batches, np.array([], dtype=int)).tolist()
        state = sampler.state_dict()
    for rank in range(after):
        sampler = BatchSampler(examples, Sizes(sizes), seed=seed, rank=rank, world_size=after)
        sampler.load_state_dict(state)
        if state["epoch"] == 0:
            taken += flat(drawn(sampler))
    assert sorted(taken) == list(range(examples))


@given(examples, sizes, seeds, st.integers(1, 5), st.integers(0, 6))
def test_what_a_rank_will_draw_is_known_before_the_sizes_are(
    examples, sizes, seed, world_size, stop
):
    sizes = [max(size, world_size) for size in sizes]
    for rank in range(world_size):
        sampler = BatchSampler(examples, Sizes(sizes), seed=seed, rank=rank, world_size=world_size)
        batches = iter(sampler)
        for _ in range(stop):
            next(batches, None)
        upcoming = sampler.upcoming().tolist()
        if sampler.position:
            assert flat(drawn(sampler)) == upcoming


def test_the_size_is_that_of_the_moment_at_which_a_batch_is_drawn():
    controller = Controller(16, sizes=BatchSizes.range(16, 64), smoothing=0.0)
    sampler = BatchSampler(200, controller)
    lengths = []
    for indices, trace in zip(sampler, [20.0, 40.0, 64.0, 64.0, 64.0], strict=True):
        lengths.append(len(indices))
        controller.update(learning_rate=1.0, variance_trace=trace, loss=1.0)
    assert lengths == [16, 20, 40, 64, 60]


def test_a_loop_that_stopped_goes_on_where_it_was():
    sampler = BatchSampler(10, 3, shuffle=False)
    for indices in sampler:
        assert indices.tolist() == [0, 1, 2]
        break
    assert drawn(sampler) == [[3, 4, 5], [6, 7], [8, 9]]


def test_orders_differ_between_epochs_and_seeds_and_sizes_do_not_change_them():
    sampler = BatchSampler(50, 50, seed=1)
    first, second = drawn(sampler), drawn(sampler)
    assert first != second
    assert first != drawn(BatchSampler(50, 50, seed=2))
    assert flat(first) == flat(drawn(BatchSampler(50, 7, seed=1)))


def test_the_order_is_the_same_on_every_machine_and_with_every_numpy():
    sampler = BatchSampler(12, 12, seed=3)
    assert drawn(sampler) == [[11, 4, 6, 1, 5, 7, 0, 3, 8, 9, 2, 10]]
    assert drawn(sampler) == [[9, 0, 6, 7, 10, 5, 8, 2, 1, 4, 3, 11]]


def test_no_seed_and_epoch_share_their_order_with_another():
    late = BatchSampler(20, 20, seed=5)
    for _ in range(3):
        drawn(late)
    assert drawn(late) != drawn(BatchSampler(20, 20, seed=5 + (3 << 32)))


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_epoch_is_the_current_one_until_the_loop_over_it_has_ended(drop_last):
    sampler = BatchSampler(10, 5, drop_last=drop_last)
    seen = [(sampler.epoch, sampler.position) for _ in sampler]
    assert seen == [(0, 5), (0, 10)]
    assert (sampler.epoch, sampler.position) == (1, 0)


def test_ranks_drop_the_same_last_examples():
    ranks = [
        drawn(BatchSampler(11, 4, seed=1, drop_last=True, rank=rank, world_size=2))
        for rank in range(2)
    ]
    alone = drawn(BatchSampler(11, 4, seed=1, drop_last=True))
    assert [sorted(flat(shares)) for shares in zip(*ranks, strict=True)] == list(map(sorted, alone))
    assert len(flat(alone)) == 8


def test_it_is_a_batch_sampler_for_anybody_who_iterates():
    sampler = BatchSampler(7, 3, shuffle=False)
    assert repr(sampler) == "BatchSampler(examples=7, epoch=0, position=0, rank=0 of 1)"
    assert [len(batch) for batch in sampler] == [3, 2, 2]


@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 5))
def test_no_batch_is_left_with_a_single_example_or_too_few_for_the_ranks(
    examples, size, world_size
):
    size = max(size, world_size)
    smallest = max(2, 2 * world_size if size >= 2 * world_size else world_size)
    sampler = BatchSampler(examples, size, world_size=world_size)
    sizes, before = [], 0
    for _ in sampler:
        # At the end of the epoch the position starts anew.
        sizes.append(sampler.position - before)
        before = sampler.position
    assert sum(sizes) == examples
    assert min(sizes) >= min(smallest, examples)
    assert max(sizes) <= size + smallest - 1


def test_every_position_is_as_likely_for_every_example():
    counts = np.zeros((5, 5))
    sampler = BatchSampler(5, 5, seed=0)
    for _ in range(4000):
        (indices,) = sampler
        counts[np.arange(5), indices] += 1
    # Chi squared with 16 degrees of freedom exceeds 39.3 once in a thousand seeds.
    assert np.sum((counts - 800.0) ** 2 / 800.0) < 39.3


def test_a_batch_is_the_callers_own():
    sampler = BatchSampler(6, 3, shuffle=False)
    for indices in sampler:
        assert indices.dtype == np.int64
        indices[:] = -1
    assert drawn(sampler) == [[0, 1, 2], [3, 4, 5]]


def test_a_batch_larger_than_the_data_is_the_data():
    assert drawn(BatchSampler(3, 16, shuffle=False)) == [[0, 1, 2]]
    assert drawn(BatchSampler(1, 16)) == [[0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": 0}, "examples must be at least 1, got examples = 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got batch_size = 0"),
        ({"seed": -1}, "seed must be at least 0, got seed = -1"),
        ({"rank": 2, "world_size": 2}, "rank = 2, world_size = 2"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchSampler(**{"examples": 10, "batch_size": 2, **arguments})


def test_sizes_that_cannot_be_drawn_are_refused_when_they_are_asked_for():
    with pytest.raises(ValueError, match="a batch of 16 cannot be drawn from 10 examples"):
        drawn(BatchSampler(10, 16, drop_last=True))
    with pytest.raises(ValueError, match="leaves some of 4 ranks without an example"):
        drawn(BatchSampler(10, 2, world_size=4))
    with pytest.raises(TypeError, match="batch_size must be an integer"):
        drawn(BatchSampler(10, Sizes([2.5])))


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": "4"},
        {"batch_size": None},
        {"batch_size": 2.0},
        {"shuffle": "no"},
        {"drop_last": 1},
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(arguments):
    with pytest.raises(TypeError, match="must be a"):
        BatchSampler(**{"examples": 10, "batch_size": 2, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop_last": True}, "drop_last = True there and False here"),
        ({"extra": 1}, "not whole"),
        ({"format": "x"}, "no state of a batch sampler"),
        ({"version": 3}, "version 3, expected 1"),
        ({"examples": 11}, "examples = 11 there and 10 here"),
        ({"seed": 5}, "seed = 5 there and 0 here"),
        ({"shuffle": 1}, "shuffle = 1 there and True here"),
        ({"position": 11}, "position = 11 of 10 examples"),
        ({"position": 2.0}, "damaged"),
        ({"epoch": -1}, "damaged"),
        ({"epoch": 2**70}, "damaged"),
        ({"epoch": None}, "damaged"),
    ],
)
def test_a_state_of_other_batches_is_refused_and_nothing_changes(change, message):
    sampler = BatchSampler(10, 2)
    next(iter(sampler))
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before
