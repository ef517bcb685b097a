"""A tf.data pipeline gives each batch the size that is asked for when it is drawn."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import cabs
import cabs_tensorflow


class Asked:
    """Says a size, and counts how often it was asked."""

    def __init__(self, batch_size):
        self.size = batch_size
        self.asked = 0
        self.again = threading.Condition()

    @property
    def batch_size(self):
        with self.again:
            self.asked += 1
            self.again.notify_all()
        return self.size

    def wait_until_asked(self, times):
        with self.again:
            assert self.again.wait_for(lambda: self.asked >= times, timeout=30)


def arrays(examples):
    return np.arange(examples)


def examples_one_by_one(examples):
    return tf.data.Dataset.range(examples)


SOURCES = pytest.mark.parametrize("source", [arrays, examples_one_by_one])


def sizes_of(batches):
    return [len(batch) for batch in batches]


def growing(batches, controller):
    """Return the sizes of batches, with a size that grows by one after each."""
    found = []
    for batch in batches:
        found.append(len(batch))
        controller.size += 1
    return found


@SOURCES
def test_the_very_next_batch_has_the_size_that_was_set_between_two_calls(source):
    controller = Asked(2)
    batches = iter(cabs_tensorflow.dataset(controller, source(1000)))
    controller.asked = 0
    for size in (3, 17, 300, 2, 90):
        controller.size = size
        assert len(next(batches)) == size
    assert controller.asked == 5


@SOURCES
def test_a_map_and_a_zip_add_no_lag(source):
    controller = Asked(4)
    batches = cabs_tensorflow.dataset(controller, source(400)).map(lambda x: 2 * x)
    numbered = tf.data.Dataset.zip(batches, tf.data.Dataset.range(10)).map(lambda x, _: x)
    assert growing(numbered, controller) == list(range(4, 14))


@SOURCES
@pytest.mark.parametrize("prefetch", [1, 3])
def test_what_is_prefetched_is_the_lag(source, prefetch):
    controller = Asked(4)
    batches = iter(cabs_tensorflow.dataset(controller, source(4000), prefetch=prefetch))
    found, controller.asked = [], 0
    for step in range(12):
        found.append(len(next(batches)))
        # As long as a training step takes: until as much is drawn as ever will be.
        controller.wait_until_asked(step + 1 + prefetch)
        controller.size += 1
    assert found == [4] * (prefetch + 1) + list(range(5, 5 + 11 - prefetch))


@SOURCES
def test_every_epoch_has_each_example_once(source):
    controller = Asked(5)
    batches = cabs_tensorflow.dataset(controller, source(103))
    for _ in range(3):
        drawn = []
        for batch in batches:
            drawn.extend(batch.numpy().tolist())
            controller.size = 1 + controller.size * 5 % 11
        assert sorted(drawn) == list(range(103))


def test_a_dataset_is_cut_as_arrays_are():
    for examples in range(1, 9):
        for size in range(1, 5):
            ways = [
                sizes_of(cabs_tensorflow.dataset(size, source(examples)))
                for source in (arrays, examples_one_by_one)
            ]
            assert ways[0] == ways[1]
            assert examples == 1 or size == 1 or min(ways[0]) > 1


@SOURCES
def test_drop_last_leaves_out_what_fills_no_batch(source):
    assert sizes_of(cabs_tensorflow.dataset(4, source(11), drop_last=True)) == [4, 4]


@SOURCES
def test_a_batch_that_can_never_be_filled_is_an_error(source):
    batches = cabs_tensorflow.dataset(16, source(5), drop_last=True)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="a batch of 16 cannot be drawn from 5"
    ):
        next(iter(batches))


@pytest.mark.parametrize("single", [False, True])
def test_nests_keep_their_structure_types_and_values(single):
    nest = (
        {"pixels": np.arange(24, dtype=np.uint8).reshape(6, 2, 2), "name": list("abcdef")},
        np.linspace(0, 1, 6),
    )
    source = tf.data.Dataset.from_tensor_slices(nest) if single else nest
    options = {} if single else {"shuffle": False}
    batches = cabs_tensorflow.dataset(4, source, **options)
    assert batches.element_spec == (
        {
            "name": tf.TensorSpec([None], tf.string),
            "pixels": tf.TensorSpec([None, 2, 2], tf.uint8),
        },
        tf.TensorSpec([None], tf.float64),
    )
    inputs, numbers = next(iter(batches))
    np.testing.assert_array_equal(inputs["pixels"], nest[0]["pixels"][:4])
    assert inputs["name"].numpy().tolist() == [b"a", b"b", b"c", b"d"]
    np.testing.assert_array_equal(numbers, nest[1][:4])


@SOURCES
def test_one_trace_serves_all_sizes(source):
    controller, traces = Asked(2), []
    batches = cabs_tensorflow.dataset(controller, source(100))

    @tf.function(input_signature=[batches.element_spec])
    def step(batch):
        traces.append(batch.shape)
        return tf.size(batch)

    for batch in batches:
        step(batch)
        controller.size += 3
    assert [shape.as_list() for shape in traces] == [[None]]


def test_the_order_is_that_of_a_sampler_and_goes_on_from_its_state():
    made = cabs.BatchSampler(50, 8, seed=3)
    batches = iter(cabs_tensorflow.dataset(made, np.arange(50) * 10))
    first = [next(batches).numpy().tolist() for _ in range(2)]
    resumed = cabs.BatchSampler(50, 8, seed=3)
    resumed.load_state_dict(made.state_dict())
    rest = [
        batch.numpy().tolist() for batch in cabs_tensorflow.dataset(resumed, np.arange(50) * 10)
    ]
    expected = [(10 * batch).tolist() for batch in cabs.BatchSampler(50, 8, seed=3)]
    assert first + rest == expected
    assert resumed.epoch == 1
    seeded = cabs_tensorflow.dataset(8, np.arange(50) * 10, seed=3)
    assert [batch.numpy().tolist() for batch in seeded] == expected


def test_a_loop_that_was_left_early_goes_on_with_the_rest_of_the_epoch():
    batches = cabs_tensorflow.dataset(4, np.arange(10), shuffle=False)
    for batch in batches:
        assert batch.numpy().tolist() == [0, 1, 2, 3]
        break
    assert [batch.numpy().tolist() for batch in batches] == [[4, 5, 6, 7], [8, 9]]
    assert len(list(batches)) == 3


def test_a_dataset_without_an_end_is_cut_for_ever():
    batches = iter(cabs_tensorflow.dataset(70, tf.data.Dataset.range(3).repeat()))
    assert [next(batches).numpy().sum() for _ in range(3)] == [69, 70, 71]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_keras_draws_no_batch_too_early(prefetch):
    """Its own loop would draw one for each step, and none more than is prefetched."""
    controller, ahead = Asked(8), []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
            controller.wait_until_asked(min(batch + 1 + prefetch, 8))
            ahead.append(controller.asked - batch - 1)

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    data = np.ones((64, 1), np.float32)
    batches = cabs_tensorflow.dataset(controller, (data, data), prefetch=prefetch)
    controller.asked = 0
    model.fit(batches, steps_per_epoch=6, shuffle=False, verbose=0, callbacks=[Watch()])
    assert ahead == [prefetch] * 6


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ((np.arange(3), np.arange(4)), {}, ValueError, "not compatible"),
        (np.float32(3), {}, ValueError, "rank >= 1"),
        (np.zeros((0, 2)), {}, ValueError, "examples must be at least 1"),
        (tf.ragged.constant([[1], [1, 2]]), {}, TypeError, "must hold dense tensors.*densify"),
        (tf.data.Dataset.range(9).batch(3), {}, ValueError, r"call unbatch\(\)"),
        (tf.data.Dataset.range(9).window(3), {}, TypeError, "must hold dense tensors"),
        (tf.data.Dataset.range(9), {"shuffle": True}, ValueError, "order of its own"),
        (tf.data.Dataset.range(9), {"seed": 1}, ValueError, "order of its own"),
        (tf.data.Dataset.range(9), {"drop_last": 1}, TypeError, "drop_last must be a bool"),
        (np.arange(3), {"drop_last": 1}, TypeError, "drop_last must be a bool"),
        (np.arange(3), {"prefetch": -1}, ValueError, "prefetch must be at least 0"),
        (np.arange(3), {"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_what_cannot_be_fed_is_said(source, options, error, message):
    with pytest.raises(error, match=message):
        cabs_tensorflow.dataset(4, source, **options)


@SOURCES
@pytest.mark.parametrize(("size", "error"), [("4", TypeError), (0, ValueError), (True, TypeError)])
def test_what_says_no_size_is_an_error(source, size, error):
    with pytest.raises(error, match="controller must be"):
        cabs_tensorflow.dataset(size, source(9))


def test_a_sampler_must_fit():
    sampler = cabs.BatchSampler(10, 4)
    with pytest.raises(ValueError, match="draws from 10 examples and source holds 9"):
        cabs_tensorflow.dataset(sampler, np.arange(9))
    with pytest.raises(ValueError, match="those of the sampler"):
        cabs_tensorflow.dataset(sampler, np.arange(10), seed=1)
    with pytest.raises(ValueError, match="for arrays"):
        cabs_tensorflow.dataset(sampler, tf.data.Dataset.range(10))
