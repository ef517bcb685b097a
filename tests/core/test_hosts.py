"""Whoever takes batches ahead: a state counts what was trained on, or there is an error."""

import json
from collections import deque
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import BatchSampler, StreamSampler
from cabs.data import DrawnBatch, Loader
from tests.core.runs import controller, run

lags = st.integers(0, 3)
seeds = st.integers(0, 99)
kinds = st.sampled_from(["indices", "stream"])

# As hosts do that want to know which batch is the last.
HOST = """
class {name}:
    def __init__(self, loader, **attributes):
        self.loader = loader
        vars(self).update(attributes)

    def __iter__(self):
        self.iterator = iter(self.loader)
        self.batches = [batch for batch in [next(self.iterator, None)] if batch is not None]
        return self

    def __next__(self):
        if not self.batches:
            raise StopIteration
        batch = self.batches.pop()
        self.batches += [batch for batch in [next(self.iterator, None)] if batch is not None]
        return batch

    def __getattr__(self, name):
        return getattr(self.loader, name)
"""
LIGHTNING = "lightning.pytorch.loops.fetchers", "_PrefetchDataFetcher"
ACCELERATE = "accelerate.data_loader", "DataLoaderShard"
OTHER = "training.of_somebody", "Prefetcher"


def host(module, name):
    namespace = {"__name__": module}
    exec(HOST.format(name=name), namespace)
    return namespace[name]


def loader(kind="indices", *, examples=60, lag=0, seed=0, source=None, **options):
    source = controller() if source is None else source
    if kind == "indices":
        sampler = BatchSampler(examples, source, seed=seed)
    else:
        sampler = StreamSampler(lambda epoch: range(seed + epoch, seed + epoch + examples), source)
    return Loader(list, sampler, lag=lag, **options)


@pytest.mark.parametrize(
    ("known", "options"),
    [
        (("pytorch_lightning.loops.fetchers", "_PrefetchDataFetcher"), {}),
        (LIGHTNING, {}),
        (ACCELERATE, {}),
        (OTHER, {"one_ahead": True}),
    ],
)
@given(kinds, st.integers(2, 90), lags, seeds, st.integers(0, 25))
def test_a_run_resumed_in_a_host_is_the_uninterrupted_one(
    known, options, kind, examples, lag, seed, stop
):
    taking = host(*known)

    def make():
        return loader(kind, examples=examples, lag=lag, seed=seed, **options)

    with make() as batches:
        whole = run(taking(batches), 30)
    with make() as batches:
        records = run(taking(batches), stop)
        state = json.loads(json.dumps(batches.state_dict()))
    with make() as batches:
        batches.load_state_dict(state)
        assert run(taking(batches), 30, records=records) == whole
    # Each example once, in the order in which they were trained on.
    for epoch in range(whole[-1].epoch):
        seen = [one for record in whole if record.epoch == epoch for one in record.examples]
        first = seed + epoch if kind == "stream" else 0
        assert sorted(seen) == list(range(first, first + examples))


def test_a_constant_size_in_a_host_loses_no_batch():
    taking = host(*LIGHTNING)
    with loader(examples=40, source=5) as batches:
        trained = []
        for step, batch in enumerate(taking(batches), start=1):
            trained += batch
            if step == 2:
                break
        assert batches.state_dict()["sampler"]["position"] == 10
        state = batches.state_dict()
    with loader(examples=40, source=5) as batches:
        batches.load_state_dict(state)
        for batch in taking(batches):
            trained += batch
    assert sorted(trained) == list(range(40))


@pytest.mark.parametrize("lag", [0, 2])
def test_a_host_that_stops_leaves_what_it_took_ahead_to_the_next_loop(lag):
    taking = host(*LIGHTNING)
    with loader(examples=40, source=5, lag=lag) as batches:
        trained = []
        for batch in taking(batches):
            trained += batch
            if batches.position == 10:
                break
        # Whoever it is that goes on.
        for batch in batches:
            trained += batch
        assert batches.epoch == 1
    assert sorted(trained) == list(range(40))


def test_in_a_host_the_loader_tells_of_the_batch_that_is_trained_on():
    taking = host(*LIGHTNING)
    with loader(examples=20, source=8) as batches:
        seen = []
        for batch in taking(batches):
            assert batches.batch.drawn.tolist() == batch
            seen.append((batches.epoch, batches.position, batches.batch.start))
        # While the last one is trained on, the host has been told that the epoch has ended.
        assert seen == [(0, 8, 0), (0, 16, 8), (1, 0, 16)]


def test_what_the_controllers_steps_deny_is_an_error():
    taking = host(*OTHER)
    batches = loader(examples=400)
    run(taking(batches), 5)
    before = repr(batches)
    with pytest.raises(
        ValueError, match=r"2 batches were before this loop's first controller.upda"
    ):
        batches.state_dict()
    assert repr(batches) == before
    # Which of both it is, only the caller can tell.
    batches = loader(examples=400, one_ahead=False)
    run(taking(batches), 5)
    assert batches.state_dict()["sampler"]["position"] == batches.position
    batches = loader(examples=400, one_ahead=True)
    for _ in zip(range(3), batches, strict=False):
        batches.controller.update(learning_rate=0.1, variance_trace=60.0, loss=1.0)
    with pytest.raises(ValueError, match="after the update of the one before it; leave one_ahead"):
        batches.state_dict()


@pytest.mark.parametrize("every", [2, 3, 10])
def test_a_loop_that_updates_now_and_then_is_no_host(every):
    batches = loader(examples=200)
    for number, _ in enumerate(batches, start=1):
        batches.state_dict()
        if number % every == 0:
            batches.controller.update(learning_rate=0.1, variance_trace=60.0, loss=1.0)
        batches.state_dict()


@given(kinds, st.integers(2, 60), lags, seeds, st.integers(1, 4), st.integers(1, 20))
def test_a_state_can_be_had_of_any_batch_that_was_taken_ahead(
    kind, examples, lag, seed, ahead, stop
):
    def followed(batches, steps, records):
        """Train on batches that are taken so many ahead, within each epoch."""
        while True:
            taken, rest = deque(), iter(batches)
            while True:
                while len(taken) <= ahead and (batch := next(rest, None)) is not None:
                    taken.append((batch, batches.batch))
                if not taken:
                    break
                batch, drawn = taken.popleft()
                trace = 10.0 + 37.0 * (sum(batch) % 11)
                batches.controller.update(learning_rate=0.1, variance_trace=trace, loss=1.0)
                records.append((drawn.epoch, batch, drawn.asked, drawn.lag))
                if len(records) == steps:
                    return json.loads(json.dumps(batches.state_dict(after=drawn)))

    options = {"examples": examples, "lag": lag, "seed": seed, "one_ahead": False}
    whole, records = [], []
    with loader(kind, **options) as batches:
        followed(batches, 25, whole)
    with loader(kind, **options) as batches:
        state = followed(batches, stop, records)
    with loader(kind, **options) as batches:
        batches.load_state_dict(state)
        followed(batches, 25, records)
    assert records == whole


def test_a_batch_that_was_not_handed_out_has_no_state():
    batches = loader()
    first = next(iter(batches))
    assert first
    with pytest.raises(TypeError, match=r"after must be a cabs\.data\.DrawnBatch"):
        batches.state_dict(after=first)
    other = DrawnBatch(3, 0, 2, 2, 0, None)
    with pytest.raises(ValueError, match="got the one from position 0 of epoch 3; keep"):
        batches.state_dict(after=other)


def test_hosts_that_take_more_than_one_are_refused():
    for known, attributes, ahead in (
        (LIGHTNING, {"prefetch_batches": 3}, 3),
        (
            ("accelerate.data_loader", "DataLoaderDispatcher"),
            {"state": SimpleNamespace(num_processes=2)},
            2,
        ),
    ):
        batches = loader()
        with pytest.raises(ValueError, match=f"whoever iterates takes {ahead} batches ahead"):
            iter(host(*known)(batches, **attributes))
        assert batches.position == 0


@pytest.mark.parametrize("sizes", [[[2, -1]], [[2, 0], [2, -2]]])
def test_sizes_that_were_asked_for_after_their_own_batch_are_damaged(sizes):
    state = loader().state_dict()
    with pytest.raises(ValueError, match="this state is damaged"):
        loader().load_state_dict({**state, "sizes": sizes})


def test_one_ahead_is_yes_or_no():
    with pytest.raises(TypeError, match="one_ahead must be a bool, got one_ahead = 1"):
        loader(one_ahead=1)
