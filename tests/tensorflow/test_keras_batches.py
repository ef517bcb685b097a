"""Every batch of fit is one that was drawn for the controller, and the logs tell its size."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import cabs
import cabs_tensorflow

X = np.random.default_rng(0).normal(size=(90, 6)).astype(np.float32)
LABELS = X[:, :3].argmax(axis=1)
EXAMPLES = tf.data.Dataset.from_tensor_slices((X, LABELS))


def controller(size=16):
    return cabs.Controller(size, sizes=cabs.BatchSizes.range(2, 48))


class Sizes(keras.callbacks.Callback):
    """Keeps what fit says of each step."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
        self.logged.append(logs["batch_size"])


class Log:
    """Keeps how many examples each step was given."""

    def __init__(self):
        self.given = []

    def write(self, decision, *, examples):  # noqa: ARG002
        self.given.append(examples)


class Same:
    """Asks for batches of one size, and is no constant."""

    def __init__(self, size):
        self.batch_size = size


def model_of(made, log=None):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "tanh"), layers.Dense(3)])
    model = cabs_tensorflow.adaptive(model, made, log=log)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(2.0), loss)
    return model


def trained(made, batches, epochs=3):
    """Return how many examples each step was given, and the sizes that were logged."""
    log, sizes = Log(), Sizes()
    model_of(made, log).fit(batches, epochs=epochs, verbose=0, callbacks=[sizes])
    assert len(sizes.logged) == len(log.given) == made.step
    return log.given, sizes.logged


def assert_refused(batches, message):
    """Assert that nothing has changed when the error is raised."""
    made = controller()
    model = model_of(made)
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        model.fit(batches(made), verbose=0)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (made.step, int(model.optimizer.iterations)) == (0, 0)


# Also of the very size that the controller begins with.
@pytest.mark.parametrize("size", [16, 30])
def test_batches_that_were_cut_elsewhere_are_refused_before_anything_moves(size):
    message = r"not made of cabs_tensorflow\.dataset.*x\.unbatch\(\)"
    assert_refused(lambda _: EXAMPLES.batch(size), message)


@pytest.mark.parametrize(
    "change",
    [
        lambda batches: batches.unbatch().batch(30),
        lambda batches: batches.map(lambda x, y: (x[:5], y[:5])),
        lambda batches: batches.map(lambda x, y: (tf.concat([x, x], 0), tf.concat([y, y], 0))),
    ],
)
def test_batches_that_were_changed_after_they_were_drawn_are_refused(change):
    message = r"given \d+ examples, and no batch of \d+ was drawn.*leave its batches whole"
    assert_refused(lambda made: change(cabs_tensorflow.dataset(made, (X, LABELS))), message)


def test_batches_that_are_given_a_second_time_are_refused():
    made = controller()
    batches = cabs_tensorflow.dataset(made, (X, LABELS)).cache()
    with pytest.raises(ValueError, match="no batch of 16 was drawn"):
        model_of(made).fit(batches, epochs=2, verbose=0)


WHOLE = pytest.mark.parametrize(
    "change",
    [
        lambda batches: batches,
        lambda batches: batches.map(lambda x, y: (x + 0.01, y)),
        lambda batches: batches.map(lambda x, y: (x + 0.01, y), num_parallel_calls=2),
        lambda batches: batches.prefetch(3),
        lambda batches: batches.prefetch(tf.data.AUTOTUNE),
        lambda batches: batches.shuffle(4),
    ],
    ids=["plain", "map", "parallel", "prefetch", "autotune", "shuffle"],
)


@WHOLE
@pytest.mark.parametrize("source", [(X, LABELS), EXAMPLES], ids=["arrays", "dataset"])
def test_whole_batches_are_taken_whatever_the_lag(source, change):
    made = controller()
    given, _ = trained(made, change(cabs_tensorflow.dataset(made, source)))
    assert sum(given) == 3 * len(X)
    assert len(set(given)) > 3


@pytest.mark.parametrize("lag", [0, 2])
def test_an_epoch_that_ends_in_a_batch_of_another_size_is_taken(lag):
    batches = cabs_tensorflow.dataset(Same(89), (X, LABELS), prefetch=lag)
    # One is not left alone.
    assert trained(controller(), batches, epochs=2)[0] == [88, 2, 88, 2]


def test_what_is_logged_is_the_size_of_the_batch_that_follows():
    made = controller()
    given, logged = trained(made, cabs_tensorflow.dataset(made, EXAMPLES.repeat(4)), epochs=1)
    assert len(set(given)) > 3
    assert given[1:-2] == logged[:-3]


@pytest.mark.parametrize("size", [30, Same(30)], ids=["constant", "object"])
def test_where_the_controller_decides_for_nobody_the_logs_tell_what_was_used(size):
    made = controller()
    given, logged = trained(made, cabs_tensorflow.dataset(size, (X, LABELS)))
    assert given == logged == [30] * 9
    assert made.batch_size != 30


def test_a_batch_that_is_handed_over_is_trained_on():
    made = controller()
    found = model_of(made).train_on_batch(X, LABELS, return_dict=True)
    assert found["batch_size"] == made.batch_size
    assert made.step == 1
