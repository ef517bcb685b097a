"""``fit`` on several replicas trains as it does on one, and decides the same."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import cabs
import cabs_tensorflow
from tests.tensorflow.reference import draw

INPUTS = draw(1, 150, 6, dtype="float32")
LABELS = np.abs(INPUTS[:, :3]).argmax(axis=1)

RULE = cabs.CABS()


def dense():
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, "tanh", kernel_regularizer="l2"), layers.Dense(3)]
    )


def fit(strategy, arrays, make=dense, *, optimizer=None, validate=True, rule=RULE, **options):
    """Return what two epochs of training have found, and the weights after them."""
    keras.utils.set_random_seed(0)
    controller = cabs.Controller(8, sizes=cabs.BatchSizes.range(8, 40), rule=rule)
    steps = []

    class Steps(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
            steps.append(logs)

    with strategy.scope():
        model = cabs_tensorflow.adaptive(make(), controller, **options)
        model.compile(
            optimizer() if optimizer else keras.optimizers.SGD(2.0, clipnorm=0.2),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    batches = cabs_tensorflow.dataset(controller, arrays, seed=0)
    validation = (arrays[0][:50], arrays[1][:50]) if validate else None
    history = model.fit(
        batches, epochs=2, verbose=0, callbacks=[Steps()], validation_data=validation
    ).history
    return steps, history, [one.numpy() for one in model.weights], controller


def assert_alike(found, expected, rtol=1e-4):
    steps, history, weights, controller = found
    assert len(steps) == len(expected[0]) > 8
    for mine, other in zip(steps, expected[0], strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name], other[name], rtol=rtol, err_msg=name)
    assert history.keys() == expected[1].keys()
    for name in history:
        np.testing.assert_allclose(history[name], expected[1][name], rtol=rtol, err_msg=name)
    for mine, other in zip(weights, expected[2], strict=True):
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=1e-5)
    assert controller.batch_size == expected[3].batch_size


ALONE = tf.distribute.get_strategy()


def test_fit_on_replicas_is_fit_on_one(mirrored):
    weights = np.random.default_rng(0).uniform(0.5, 2, 150).astype("float32")
    arrays = INPUTS, LABELS, weights
    found = fit(mirrored, arrays)
    assert_alike(found, fit(ALONE, arrays))
    assert found[3].batch_size > 8


class Own(cabs_tensorflow.AdaptiveBatchSize, keras.Model):
    """A model that is not built before fit, with losses of its own."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)

    def call(self, x):
        return self.out(self.hidden(x))

    def compute_losses(self, x, y, y_pred, sample_weight=None):  # noqa: ARG002
        return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(y, tf.int32), y_pred)


def test_losses_of_a_models_own_are_those_of_all_replicas(mirrored):
    arrays = INPUTS, LABELS
    assert_alike(fit(mirrored, arrays, Own), fit(ALONE, arrays, Own))


def masked():
    layers = keras.layers
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 4, mask_zero=True)(inputs)
    return keras.Model(inputs, layers.Dense(3)(hidden))


@pytest.mark.parametrize("microbatches", [None, 2, 4])
def test_masks_are_counted_over_all_replicas(mirrored, microbatches):
    words = np.random.default_rng(0).integers(0, 7, (152, 5))
    words[:, 0] = 1
    words[::3, 2:] = 0
    arrays = words, (words + 1) % 3
    found = fit(mirrored, arrays, masked, microbatches=microbatches, validate=False)
    alone = fit(ALONE, arrays, masked, microbatches=microbatches, validate=False)
    assert_alike(found, alone)


def normalized():
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(8), layers.BatchNormalization(), layers.Dense(3)]
    )


def test_a_layer_that_couples_a_share_is_measured_by_shares(mirrored):
    steps, _, _, controller = fit(mirrored, (INPUTS, LABELS), normalized, microbatches=2)
    assert controller.batch_size > 8
    alone = fit(ALONE, (INPUTS, LABELS), normalized, microbatches=2)
    for mine, other in zip(steps, alone[0], strict=True):
        np.testing.assert_allclose(mine["loss"], other["loss"], rtol=1e-3)


@pytest.mark.parametrize("scale", [2.0**5, 2.0**18])
def test_losses_are_scaled_for_half_precision(mirrored, scale):
    def make():
        keras.config.set_dtype_policy("mixed_float16")
        try:
            return dense()
        finally:
            keras.config.set_dtype_policy("float32")

    def optimizer():
        inner = keras.optimizers.SGD(1.0)
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=scale)

    steps, _, _, controller = fit(mirrored, (INPUTS, LABELS), make, optimizer=optimizer)
    alone, _, _, other = fit(ALONE, (INPUTS, LABELS), make, optimizer=optimizer)
    # Steps whose gradients overflow decide nothing, and are not taken.
    assert (controller.held_steps > 0) == (other.held_steps > 0) == (scale > 1000)
    for mine, expected in zip(steps, alone, strict=True):
        np.testing.assert_allclose(mine["loss"], expected["loss"], rtol=0.2)


def test_replicas_that_no_share_can_be_given_to_are_refused(mirrored):
    controller = cabs.Controller(8, sizes=cabs.BatchSizes.range(8, 40))
    batches = cabs_tensorflow.dataset(controller, (INPUTS, LABELS))
    with mirrored.scope():
        model = cabs_tensorflow.adaptive(dense(), controller, microbatches=3)
        model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="multiple of the number of replicas, 2"):
        model.fit(batches, verbose=0)
    model = cabs_tensorflow.adaptive(dense(), controller)
    model.compile("sgd", "sparse_categorical_crossentropy")
    with mirrored.scope(), pytest.raises(ValueError, match=r"with strategy\.scope\(\)"):
        model.fit(batches, verbose=0)
