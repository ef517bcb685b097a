"""Streams: read again in each epoch, no further than needed, and ahead in a thread."""

import threading
import time

import pytest

from cabs import StreamSampler
from cabs.data import Loader


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
