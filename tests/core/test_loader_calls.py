"""The loader, one call at a time: who asks when, what a state holds, what is refused."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cabs import BatchSampler, BatchSizes, Controller
from cabs.data import Loader
from tests.core.runs import Interrupt, loader, run


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


def test_one_example_is_a_batch_and_its_decision_is_held():
    batches = Loader(list, BatchSampler(1, Controller(2, sizes=BatchSizes.range(2, 8))))
    (batch,) = batches
    decision = batches.controller.update(learning_rate=0.1, variance_trace=np.nan, loss=1.0)
    assert (batch, decision.held, batches.controller.held_steps) == ([0], True, 1)
