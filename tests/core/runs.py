"""A training run without a model: observations that depend on the step and the batch alone."""

from typing import NamedTuple

from cabs import BatchSizes, Controller


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
