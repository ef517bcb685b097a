"""A small Keras model, fit that follows a controller, and a loop over the examples beside it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import cabs
import cabs_tensorflow

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(96, 6)).astype(np.float32)
LABELS = X[:, :3].argmax(axis=1)
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]
WEIGHTS = RANDOM.uniform(0.2, 2.0, size=96).astype(np.float32)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TOP_TWO = keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")


def controller(size=16, smallest=2, largest=48):
    return cabs.Controller(size, sizes=cabs.BatchSizes.range(smallest, largest))


def network(*more, outputs=3, **options):
    """Return a small network, the same one every time."""
    keras.utils.set_random_seed(1)
    dense = layers.Dense(8, "tanh", **options)
    return keras.Sequential([keras.Input((6,)), dense, *more, layers.Dense(outputs)])


def compiled(model=None, loss=CROSS_ENTROPY, rate=0.3, **options):
    model = network() if model is None else model
    model.compile(keras.optimizers.SGD(rate), loss, **options)
    return model


def fitted(model, source=(X, LABELS), epochs=1, follow=None, options=None):
    """Return a controller, the run log, and the history of a model that was trained."""
    made = controller()
    log = Log(made)
    model = cabs_tensorflow.adaptive(model, made, log=log, **(follow or {}))
    batches = cabs_tensorflow.dataset(made, source)
    history = model.fit(batches, epochs=epochs, verbose=0, **(options or {}))
    return made, log, history.history


class Log:
    """Keeps what a run log would write."""

    def __init__(self, made):
        self.start = made.state_dict()
        self.decisions, self.examples = [], []

    def write(self, decision, *, examples):
        self.decisions.append(decision)
        self.examples.append(examples)


def gradients_one_by_one(model, x, y, sample_weight=None):
    """Return losses, shape (m,), and gradients, shape (m, parameters), from batches of one."""
    losses, rows = [], []
    for index in range(len(keras.tree.flatten(x)[0])):
        one = keras.tree.map_structure(
            lambda array, index=index: None if array is None else tf.constant(array[[index]]),
            (x, y, sample_weight),
        )
        with tf.GradientTape() as tape:
            y_pred = model(one[0], training=True)
            loss = model.compute_loss(x=one[0], y=one[1], y_pred=y_pred, sample_weight=one[2])
        gradients = tape.gradient(loss, model.trainable_variables)
        losses.append(float(loss))
        rows.append(np.concatenate([np.ravel(tf.convert_to_tensor(g)) for g in gradients]))
    return np.array(losses), np.array(rows, np.float64)


def assert_measured(model, x, y, sample_weight=None, **follow):
    """Assert that one step feeds the controller what the loop over the examples finds."""
    expected, rows = gradients_one_by_one(model, x, y, sample_weight)
    made = controller()
    model = cabs_tensorflow.adaptive(model, made, **follow)
    model.train_on_batch(x, y, sample_weight)
    seen = model.decision.observation
    assert seen.loss == pytest.approx(expected.mean(), rel=1e-5)
    assert seen.variance_trace[0] == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-4)
    assert made.step == 1


def mean_fourth_power(y, y_pred):
    return keras.ops.mean((y - y_pred) ** 4, axis=-1)
