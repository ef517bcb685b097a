"""The loader: sizes that change at any step, and nothing lost, repeated or left to chance."""

import json
import linecache
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import BatchSampler, StreamSampler
from cabs.data import Loader
from tests.core.runs import Interrupt, loader, run

examples = st.integers(1, 150)
lags = st.integers(0, 3)
seeds = st.integers(0, 99)
kinds = st.sampled_from(["indices", "stream", "stream read ahead", "blocks"])


def of_epoch(records, epoch):
    return [one for record in records if record.epoch == epoch for one in record.examples]


@pytest.mark.slow
@given(kinds, examples, lags, seeds)
def test_every_epoch_is_a_partition_whatever_the_controller_decides(kind, examples, lag, seed):
    with loader(kind, examples, lag=lag, seed=seed) as batches:
        records = run(batches, 3 * examples)
    for epoch in range(records[-1].epoch):
        assert sorted(of_epoch(records, epoch)) == list(range(examples))


@given(kinds, st.integers(2, 150), lags, seeds)
def test_the_lag_is_bounded_and_tells_which_decision_a_batch_obeys(kind, examples, lag, seed):
    with loader(kind, examples, lag=lag, seed=seed) as batches:
        records = run(batches, 40)
    decided = [2, *(record.decision.batch_size for record in records)]
    place = 0
    for step, record in enumerate(records):
        place = place + 1 if step and record.epoch == records[step - 1].epoch else 0
        assert record.lag == min(lag, place)
        assert record.asked == decided[step - record.lag]
        left = examples - sum(len(before.examples) for before in records[step - place : step])
        assert abs(len(record.examples) - min(record.asked, left)) <= 1


@given(kinds, st.integers(2, 120), lags, seeds, st.integers(0, 30), st.booleans())
def test_a_resumed_run_is_the_uninterrupted_one(kind, examples, lag, seed, stop, drop_last):
    examples = max(examples, 24 if drop_last else 2)
    with loader(kind, examples, lag=lag, seed=seed, drop_last=drop_last) as batches:
        whole = run(batches, 45)
    with loader(kind, examples, lag=lag, seed=seed, drop_last=drop_last) as batches:
        first = run(batches, stop)
        state = json.loads(json.dumps(batches.state_dict()))
    with loader(kind, examples, lag=lag, seed=seed, drop_last=drop_last) as batches:
        batches.load_state_dict(state)
        assert batches.state_dict() == state
        assert first + run(batches, 45 - stop) == whole


@pytest.mark.slow
@pytest.mark.once
@given(kinds, st.integers(2, 120), lags, seeds, st.integers(1, 12))
def test_a_run_resumed_at_every_few_steps_is_the_uninterrupted_one(kind, examples, lag, seed, few):
    with loader(kind, examples, lag=lag, seed=seed) as batches:
        whole = run(batches, 30)
    records, state = [], None
    while len(records) < 30:
        with loader(kind, examples, lag=lag, seed=seed) as batches:
            if state is not None:
                batches.load_state_dict(state)
            records += run(batches, min(few, 30 - len(records)))
            state = batches.state_dict()
    assert records == whole


@given(
    kinds, st.integers(5, 120), seeds, st.tuples(lags, lags),
    st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 12),
)  # fmt: skip
def test_another_lag_and_another_number_of_ranks_lose_and_repeat_nothing(
    kind, examples, seed, lags, ranks, stop
):
    def shares(lag, world_size, steps, state=None):
        drawn, states = [], []
        for rank in range(world_size):
            settings = {"low": 4}
            options = {"rank": rank, "world_size": world_size, "settings": settings}
            with loader(kind, examples, lag=lag, seed=seed, **options) as batches:
                if state is not None:
                    batches.load_state_dict(state)
                epoch = batches.epoch
                for taken, batch in enumerate(batches, start=1):
                    drawn += batch
                    # All ranks must decide alike, so the observation is not of the share.
                    batches.controller.update(
                        learning_rate=0.1, variance_trace=100.0 + 50.0 * (taken % 3), loss=1.0
                    )
                    if taken == steps:
                        break
                states.append((batches.epoch - epoch, batches.state_dict()))
        assert all(one == states[0] for one in states)
        return drawn, *states[0]

    drawn, ended, state = shares(lags[0], ranks[0], stop)
    if not ended:
        rest, _, _ = shares(lags[1], ranks[1], None, state)
        drawn += rest
    assert sorted(drawn) == list(range(examples))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_what_was_drawn_ahead_by_other_ranks_is_drawn_anew(world_size):
    def shares(world_size, state=None):
        for rank in range(world_size):
            source = BatchSampler(12, 5, shuffle=False, rank=rank, world_size=world_size)
            batches = Loader(list, source, lag=2)
            if state is not None:
                batches.load_state_dict(state)
            yield batches

    # Four ranks end the epoch in one batch of seven, since two would leave some without any.
    drawn, states = [], []
    for batches in shares(4):
        drawn += next(iter(batches))
        states.append(batches.state_dict())
    if world_size == 6:
        with pytest.raises(ValueError, match="leaves some of 6 ranks without an example"):
            list(next(shares(world_size, states[0])))
        return
    for batches in shares(world_size, states[0]):
        drawn.extend(one for batch in batches for one in batch)
    assert sorted(drawn) == list(range(12))


@pytest.mark.slow
@given(kinds, st.integers(2, 120), lags, seeds, st.integers(1, 25))
def test_speed_changes_nothing(kind, examples, lag, seed, slow):
    def stumble(drawn):
        if sum(drawn) % slow == 0:
            time.sleep(0.001)
        return list(drawn)

    with loader(kind, examples, lag=lag, seed=seed) as batches:
        whole = run(batches, 15)
    with loader(kind, examples, lag=lag, seed=seed, fetch=stumble) as batches:
        assert run(batches, 15, after=lambda: time.sleep(0.0005)) == whole


@given(kinds, st.integers(2, 100), lags, seeds, st.integers(0, 99))
def test_an_example_that_fails_for_a_while_is_neither_lost_nor_repeated(
    kind, examples, lag, seed, bad
):
    bad, fails = bad % examples, 2

    def fetch(drawn):
        nonlocal fails
        if bad in drawn and fails:
            fails -= 1
            raise OSError(f"cannot read example {bad}")
        return list(drawn)

    with loader(kind, examples, lag=lag, seed=seed) as batches:
        whole = run(batches, 40)
    records, notes = [], []
    with loader(kind, examples, lag=lag, seed=seed, fetch=fetch) as batches:
        while len(records) < 40:
            try:
                run(batches, 40, records=records)
            except OSError as error:
                notes += error.__notes__
    assert len(notes) + fails == 2
    assert all("it is still the next one" in note for note in notes)
    assert records == whole


def epoch_of(batches):
    return batches._place.epoch


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("kind", ["indices", "stream"])
def test_an_interrupt_at_any_line_loses_and_repeats_nothing(kind, lag):
    lines = 0

    def interrupted(at):
        """Raise at the at-th line that is run; return what the loop was given."""
        nonlocal lines
        lines, drawn = 0, {}
        batches = loader(kind, 23, lag=lag)

        def trace(frame, event, _):
            nonlocal lines
            if not frame.f_globals.get("__name__", "").startswith("cabs."):
                return None
            # A signal is not handled between a store and the yield that follows it.
            yields = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if event == "line" and yields != "yield made":
                lines += 1
                if lines == at:
                    raise Interrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            while (epoch := epoch_of(batches)) < 2:
                try:
                    for batch in batches:
                        drawn.setdefault(epoch, []).extend(map(int, batch))
                except Interrupt:
                    sys.settrace(before)
        finally:
            sys.settrace(before)
            batches.close()
        return drawn

    interrupted(0)
    for at in range(1, lines, 1 + lines // 400):
        drawn = interrupted(at)
        assert {epoch: sorted(one) for epoch, one in drawn.items()} == {
            0: list(range(23)),
            1: list(range(23)),
        }


def test_a_stream_that_fails_is_read_again_and_not_taken_to_have_ended():
    fails = [True]

    def stream(_):
        for number in range(20):
            if number == 11 and fails:
                fails.clear()
                raise OSError("the connection was reset")
            yield number

    batches = Loader(list, StreamSampler(stream, 4), lag=1)
    drawn = []
    with pytest.raises(OSError, match="the connection was reset"):
        drawn.extend(one for batch in batches for one in batch)
    drawn.extend(one for batch in batches for one in batch)
    assert drawn == list(range(20))
