"""A training run without a model: observations that depend on the step and the batch alone."""

import random
from typing import NamedTuple

from cabs import BatchSampler, BatchSizes, Controller, StreamSampler
from cabs.data import Loader


class Interrupt(BaseException):
    """What Ctrl-C raises, but for the tests' own runner."""


class Record(NamedTuple):
    """What one step of a run saw and decided."""

    epoch: int
    examples: list
    asked: int
    lag: int
    decision: object


def controller(low=2, high=24, **settings):
    return Controller(low, sizes=BatchSizes.range(low, high), smoothing=0.5, **settings)


def run(loader, steps, *, records=None, after=None):
    """Go on until there are so many records, through as many epochs as it takes."""
    records = [] if records is None else records
    while len(records) < steps:
        for batch in loader:
            examples = [int(example) for example in batch]
            trace = 10.0 + 37.0 * (sum(examples) % 11) + 3.0 * (loader.controller.step % 7)
            decision = loader.controller.update(
                learning_rate=0.1, variance_trace=trace, loss=1.0 + 0.1 * (len(examples) % 3)
            )
            drawn = loader.batch
            records.append(Record(drawn.epoch, examples, drawn.asked, drawn.lag, decision))
            if after is not None:
                after()
            if len(records) == steps:
                break
    return records


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
