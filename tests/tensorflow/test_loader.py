"""The loader in TensorFlow, over arrays and over tf.data, and in checkpoints of TensorFlow."""

import json

import numpy as np
import pytest
import tensorflow as tf

import cabs_tensorflow
from tests.core.runs import controller, run


def arrays():
    return np.arange(90)


def of_tf_data():
    return tf.data.Dataset.range(90)


def by_epoch():
    return lambda epoch: tf.data.Dataset.range(90).shuffle(40, seed=epoch + 1)


def made(source, **options):
    return cabs_tensorflow.loader(source(), controller(), **options)


SOURCES = pytest.mark.parametrize("source", [arrays, of_tf_data, by_epoch])


@SOURCES
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_every_epoch_has_each_example_once_and_the_lag_is_told(source, lag):
    with made(source, lag=lag) as batches:
        records = run(batches, 30)
    assert records[-1].epoch >= 2
    decided = [2, *(record.decision.batch_size for record in records)]
    for step, record in enumerate(records):
        assert record.lag <= lag
        assert record.asked == decided[step - record.lag]
    for epoch in range(records[-1].epoch):
        drawn = [one for record in records if record.epoch == epoch for one in record.examples]
        assert sorted(drawn) == list(range(90))


@SOURCES
@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("stop", [1, 9, 17])
def test_a_resumed_run_is_the_uninterrupted_one(source, lag, stop):
    with made(source, lag=lag) as batches:
        whole = run(batches, 25)
    with made(source, lag=lag) as batches:
        records = run(batches, stop)
        state = json.loads(json.dumps(batches.state_dict()))
    with made(source, lag=lag) as batches:
        batches.load_state_dict(state)
        assert run(batches, 25, records=records) == whole


def test_batches_are_tensors_in_the_nest_of_the_source():
    examples = {"x": np.ones((6, 2), np.float32), "y": (np.arange(6), np.array(list("abcdef")))}
    for source in (examples, tf.data.Dataset.from_tensor_slices(examples)):
        batches = cabs_tensorflow.loader(source, 4, shuffle=None)
        first = next(iter(batches))
        assert first["x"].shape == (4, 2)
        assert first["y"][1].dtype == tf.string
        assert all(isinstance(part, tf.Tensor) for part in tf.nest.flatten(first))


def test_a_step_is_traced_once_for_all_sizes():
    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)])
    def step(batch):
        return tf.reduce_sum(batch)

    totals = [int(step(batch)) for batch in cabs_tensorflow.loader(np.arange(20), 6)]
    assert sum(totals) == 190
    assert step.experimental_get_tracing_count() == 1


def test_the_ranks_together_have_every_example_once():
    for source in (arrays, of_tf_data):
        drawn = []
        for rank in range(4):
            batches = cabs_tensorflow.loader(source(), 7, rank=rank, world_size=4)
            drawn += [one for batch in batches for one in batch.numpy().tolist()]
        assert sorted(drawn) == list(range(90))


class InCheckpoint(tf.train.experimental.PythonState):
    """Lets a ``tf.train.Checkpoint`` hold the state of a loader, as text."""

    def __init__(self, loader):
        self.loader = loader

    def serialize(self):
        return json.dumps(self.loader.state_dict())

    def deserialize(self, value):
        self.loader.load_state_dict(json.loads(value))


def test_a_checkpoint_of_tensorflow_holds_it(tmp_path):
    with made(arrays, lag=1) as batches:
        whole = run(batches, 20)
    with made(arrays, lag=1) as batches:
        records = run(batches, 8)
        saved = tf.train.Checkpoint(weights=tf.Variable(3.0), loader=InCheckpoint(batches))
        path = saved.save(str(tmp_path / "checkpoint"))
    with made(arrays, lag=1) as batches:
        weights = tf.Variable(0.0)
        restored = tf.train.Checkpoint(weights=weights, loader=InCheckpoint(batches))
        restored.restore(path).assert_consumed()
        assert float(weights) == 3.0
        assert run(batches, 20, records=records) == whole


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (np.arange(0), {}, "source must hold at least one example"),
        (tf.data.Dataset.range(9), {"shuffle": True}, "shuffle=True is for arrays"),
        (tf.data.Dataset.range(9).batch(3), {}, "must be a dataset of single examples"),
        (tf.data.Dataset.range(9).shuffle(9).map(abs), {}, "shuffled anew at each pass"),
        (tf.data.Dataset.range(0), {}, "the stream of epoch 0 holds no example"),
        ((np.arange(3), np.arange(4)), {}, "must have the same|[Dd]imension"),
    ],
)
def test_what_does_not_fit_is_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        next(iter(cabs_tensorflow.loader(source, 2, **options)))


def test_an_order_that_is_drawn_once_can_be_read_again():
    examples = tf.data.Dataset.range(30).shuffle(30, seed=1, reshuffle_each_iteration=False)
    batches = cabs_tensorflow.loader(examples, 7)
    drawn = []
    for batch in batches:
        drawn += batch.numpy().tolist()
        batches.close()
    assert sorted(drawn) == list(range(30))


def test_a_function_of_the_epoch_returns_a_dataset():
    with pytest.raises(TypeError, match=r"must return a tf\.data\.Dataset for each epoch"):
        next(iter(cabs_tensorflow.loader(lambda epoch: [epoch], 2)))


def test_an_example_that_fails_ends_no_epoch():
    fails = [True]

    def read(number):
        if number == 70 and fails:
            fails.clear()
            raise OSError("the disk is gone")
        return number

    examples = tf.data.Dataset.range(90).map(lambda n: tf.py_function(read, [n], tf.int64))
    examples = examples.map(lambda n: tf.ensure_shape(n, []))
    batches = cabs_tensorflow.loader(examples, 8)
    drawn = []
    with pytest.raises(tf.errors.OpError, match="the disk is gone"):
        drawn.extend(one for batch in batches for one in batch.numpy().tolist())
    drawn.extend(one for batch in batches for one in batch.numpy().tolist())
    assert drawn == list(range(90))
