"""The loader: sizes that change at any step, and nothing lost, repeated or left to chance."""

import json
import linecache
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import BatchSampler, BatchSizes, Controller, StreamSampler
from cabs.data import Loader
from tests.core.runs import controller, run

examples = st.integers(1, 150)
lags = st.integers(0, 3)
seeds = st.integers(0, 99)
kinds = st.sampled_from(["indices", "stream", "stream read ahead", "blocks"])


def sampler(kind, examples, source, seed=0, **options):
    """Samplers of the same examples in three shapes; the order of a stream is its own."""
    if kind == "indices":
        return BatchSampler(examples, source, seed=seed, **options)

    def order(epoch):
        return random.Random(f"{seed} {epoch}").sample(range(examples), examples)

    if kind == "stream":
        return StreamSampler(order, source, **options)
    if kind == "stream read ahead":
        return StreamSampler(order, source, ahead=1 + seed % 9, **options)

    def blocks(epoch):
        numbers = order(epoch)
        return [numbers[first : first + 7] for first in range(0, examples, 7)]

    return StreamSampler.of_blocks(blocks, source, **options)


def loader(kind, examples, *, lag=0, seed=0, fetch=list, settings=None, **options):
    return Loader(
        fetch, sampler(kind, examples, controller(**(settings or {})), seed, **options), lag=lag
    )


def of_epoch(records, epoch):
    return [one for record in records if record.epoch == epoch for one in record.examples]


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


class Interrupt(BaseException):
    """What Ctrl-C raises, but for the tests' own runner."""


def epoch_of(batches):
    return batches._place.epoch


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


@pytest.mark.parametrize("lag", [0, 2])
def test_the_size_is_asked_for_once_a_batch_and_by_the_loop(lag):
    class Schedule:
        asked = 0

        @property
        def batch_size(self):
            assert threading.current_thread() is threading.main_thread()
            self.asked += 1
            return 2 + self.asked % 3

    schedule = Schedule()
    batches = Loader(list, BatchSampler(60, schedule), lag=lag)
    # And once more, to see that there is nothing left.
    assert len(list(batches)) == schedule.asked - 1


def test_an_interrupt_while_the_thread_is_waited_for_loses_nothing(monkeypatch):
    batches = Loader(list, BatchSampler(20, 3, shuffle=False), lag=1)
    drawn = list(next(iter(batches)))
    shutdown = ThreadPoolExecutor.shutdown

    def interrupted(thread, **options):
        monkeypatch.undo()
        shutdown(thread, **options)
        raise Interrupt

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", interrupted)
    with pytest.raises(Interrupt):
        batches.close()
    drawn.extend(one for batch in batches for one in batch)
    assert drawn == list(range(20))


@pytest.mark.parametrize("lag", [0, 2])
def test_a_loop_that_stopped_goes_on_where_it_was(lag):
    batches = Loader(list, BatchSampler(10, 3, shuffle=False), lag=lag)
    assert next(iter(batches)) == [0, 1, 2]
    batches.close()
    assert next(iter(batches)) == [3, 4, 5]
    assert [batches.epoch, batches.position] == [0, 6]
    assert list(batches) == [[6, 7], [8, 9]]
    assert [batches.epoch, batches.position] == [1, 0]


def test_a_close_waits_for_the_batch_that_is_being_made():
    begun, ended = threading.Event(), []

    def fetch(drawn):
        if drawn[0]:
            begun.set()
            time.sleep(0.2)
            ended.append(drawn[0])
        return drawn

    batches = Loader(fetch, BatchSampler(12, 3, shuffle=False), lag=2)
    next(iter(batches))
    assert begun.wait(10.0)
    batches.close()
    # The one that was begun, and not the one after it.
    assert ended == [3]


def test_one_batch_is_made_ahead_while_the_loop_is_busy_with_another():
    fetched = []
    with Loader(lambda drawn: fetched.append(drawn[0]) or drawn, BatchSampler(9, 3, shuffle=False),
                lag=1) as batches:  # fmt: skip
        next(iter(batches))
        deadline = time.monotonic() + 10.0
        while len(fetched) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert fetched == [0, 3]


def test_without_a_lag_nothing_is_fetched_before_it_is_wanted():
    fetched = []
    batches = Loader(lambda drawn: fetched.append(drawn[0]) or drawn, BatchSampler(9, 3))
    next(iter(batches))
    assert len(fetched) == 1


def test_what_makes_batches_is_told_what_will_be_asked_for():
    class Recorder:
        def __init__(self):
            self.calls = []

        def begin(self, epoch, upcoming, size):
            self.calls.append((epoch, upcoming.tolist(), size))

        def fetch(self, batch):
            return batch.drawn

        def end(self):
            self.calls.append("ended")

        def close(self):
            self.calls.append("closed")

    recorder = Recorder()
    batches = Loader(recorder, BatchSampler(4, 2, shuffle=False, rank=1, world_size=2))
    for _ in batches:
        pass
    for _ in batches:
        break
    batches.close()
    list(batches)
    assert recorder.calls == [
        (0, [1, 3], 2), "ended", (1, [1, 3], 2), "closed", (1, [3], 2), "ended",
    ]  # fmt: skip


def test_a_batch_may_be_anything_also_nothing():
    assert list(Loader(lambda _: None, BatchSampler(4, 2))) == [None, None]


def test_the_controllers_state_travels_with_the_loaders():
    batches = loader("indices", 50, lag=1)
    run(batches, 5)
    other = loader("indices", 50)
    other.load_state_dict(batches.state_dict())
    assert other.controller.state_dict() == batches.controller.state_dict()


def test_other_settings_are_refused_unless_they_are_wanted():
    batches = loader("indices", 500, lag=2)
    run(batches, 5)
    state = batches.state_dict()
    smaller = loader("indices", 500, lag=2, settings={"high": 5})
    before = smaller.state_dict()
    with pytest.raises(ValueError, match="changed_settings=True"):
        smaller.load_state_dict(state)
    assert smaller.state_dict() == before
    same = loader("indices", 500, lag=2)
    same.load_state_dict(state, changed_settings=True)
    assert same.state_dict() == state
    smaller.load_state_dict(state, changed_settings=True)
    rest = [len(batch) for batch in smaller]
    assert sum(rest) == 500 - batches.position
    assert max(rest) <= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "no state of a loader"),
        ({"version": 2}, "version 2, expected 1"),
        ({"extra": 1}, "not whole"),
        ({"sizes": [[0, 1]]}, "damaged"),
        ({"sizes": [[2, -1]]}, "damaged"),
        ({"sizes": [[2, True]]}, "damaged"),
        ({"sizes": [2]}, "damaged"),
        ({"sizes": None}, "damaged"),
        ({"is_drawn": 1}, "damaged"),
        ({"world_size": None}, "damaged"),
        ({"controller": None}, "saved without a controller"),
        ({"controller": {"format": "y"}}, "no state of a controller"),
        ({"sampler": {"format": "y"}}, "no state of a batch sampler"),
    ],
)
def test_a_state_of_something_else_is_refused_and_nothing_changes(change, message):
    batches = loader("indices", 50, lag=2)
    records = run(batches, 3)
    before = batches.state_dict()
    with pytest.raises(ValueError, match=message):
        batches.load_state_dict({**before, **change})
    assert batches.state_dict() == before
    assert run(batches, 20, records=records) == run(loader("indices", 50, lag=2), 20)


def test_a_constant_size_has_no_controller_in_its_state():
    batches = Loader(list, BatchSampler(10, 3), lag=1)
    assert batches.state_dict()["controller"] is None
    with pytest.raises(ValueError, match="saved with a controller"):
        batches.load_state_dict(loader("indices", 10).state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fetch": 3}, "fetch must be a function"),
        ({"sampler": [1, 2]}, "sampler must be a cabs.BatchSampler"),
        ({"lag": 1.0}, "lag must be an integer"),
        ({"lag": True}, "lag must be an integer"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        Loader(**{"fetch": list, "sampler": BatchSampler(10, 2), **arguments})


def test_a_batch_that_was_not_handed_out_has_nothing_to_tell():
    with pytest.raises(ValueError, match="no batch has been handed out yet"):
        _ = Loader(list, BatchSampler(10, 2)).batch


# Streams


@pytest.mark.parametrize("examples", [iter([1, 2]), (one for one in [1, 2])])
def test_a_stream_that_cannot_be_read_again_is_refused(examples):
    with pytest.raises(TypeError, match="can be iterated over only once"):
        StreamSampler(examples, 2)


def test_an_empty_stream_is_an_error_and_not_an_epoch():
    with pytest.raises(ValueError, match="the stream of epoch 0 holds no example"):
        list(StreamSampler([], 2))


def test_a_stream_that_became_shorter_is_an_error():
    state = {**StreamSampler("abc", 2).state_dict(), "position": 5}
    sampler = StreamSampler("abc", 2)
    sampler.load_state_dict(state)
    with pytest.raises(ValueError, match="has ended after 3 examples, of which 5 were drawn"):
        list(sampler)


def test_no_more_of_a_stream_is_read_than_two_examples_beyond_a_batch():
    read = []

    def stream(_):
        for number in range(20):
            read.append(number)
            yield number

    next(iter(StreamSampler(stream, 3)))
    assert len(read) == 5


def test_a_thread_reads_a_stream_ahead_while_the_loop_is_busy():
    read = []

    def stream(_):
        for number in range(40):
            read.append((number, threading.current_thread()))
            yield number

    with Loader(list, StreamSampler(stream, 3, ahead=8)) as batches:
        assert next(iter(batches)) == [0, 1, 2]
        deadline = time.monotonic() + 10.0
        while len(read) < 12 and time.monotonic() < deadline:
            time.sleep(0.001)
        # What was looked at, and eight more, in blocks of four.
        assert 12 <= len(read) <= 16
        assert threading.main_thread() not in {thread for _, thread in read}
        assert [one for batch in batches for one in batch] == list(range(3, 40))


def test_a_stream_that_fails_in_the_thread_fails_in_the_loop():
    def stream(_):
        yield from range(10)
        raise OSError("the connection was reset")

    batches = Loader(list, StreamSampler(stream, 4, ahead=3))
    with pytest.raises(OSError, match="the connection was reset"):
        list(batches)
    assert batches.position == 8


def test_what_is_no_stream_is_refused():
    with pytest.raises(TypeError, match="must be an iterable, or a function of the epoch"):
        StreamSampler(5, 2)


def test_one_example_is_a_batch_and_its_decision_is_held():
    batches = Loader(list, BatchSampler(1, Controller(2, sizes=BatchSizes.range(2, 8))))
    (batch,) = batches
    decision = batches.controller.update(learning_rate=0.1, variance_trace=np.nan, loss=1.0)
    assert (batch, decision.held, batches.controller.held_steps) == ([0], True, 1)
