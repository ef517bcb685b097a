"""What is measured is what the optimizer minimizes and updates with, known before it moves."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import cabs
import cabs_tensorflow

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(24, 6)).astype(np.float32)
LABELS = X[:, :3].argmax(axis=1)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def controller(size=24):
    return cabs.Controller(size, sizes=[size])


def parts(outputs=3):
    keras.utils.set_random_seed(1)
    return [keras.Input((6,)), layers.Dense(8, "tanh"), layers.Dense(outputs)]


def compiled(model, loss=CROSS_ENTROPY, optimizer=None):
    model.compile(keras.optimizers.SGD(1.0) if optimizer is None else optimizer, loss)
    return model


def assert_refused(model, message, x=X, y=LABELS, **options):
    """Assert that nothing has changed when the error is raised."""
    made = controller(len(x))
    model = cabs_tensorflow.adaptive(model, made, **options)
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        model.fit(cabs_tensorflow.dataset(made, (x, y)), verbose=0)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (made.step, int(model.optimizer.iterations)) == (0, 0)


class Squared(cabs_tensorflow.AdaptiveBatchSize, keras.Sequential):
    """Minimizes something that compile was not told of."""

    def compute_losses(self, x, y, y_pred, sample_weight=None):
        losses = super().compute_losses(x, y, y_pred, sample_weight)
        return losses + tf.reduce_mean(tf.square(y_pred), axis=1)


class PlainlySquared(keras.Sequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
        return loss + tf.reduce_mean(tf.square(y_pred))


@pytest.mark.parametrize("options", [{}, {"microbatches": 3}], ids=["exact", "groups"])
def test_the_mean_of_losses_of_ones_own_is_what_is_minimized_and_evaluated(options):
    made = controller()
    model = compiled(Squared(parts()))
    model.follow(made, **options)
    plain = compiled(PlainlySquared(parts()))
    for name in ("evaluate", "train_on_batch", "evaluate"):
        more = {"verbose": 0} if name == "evaluate" else {}
        found, expected = (
            getattr(one, name)(X, LABELS, return_dict=True, **more)["loss"]
            for one in (model, plain)
        )
        assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_loss_of_the_batch_of_ones_own_is_measured_in_groups_alone():
    assert_refused(compiled(PlainlySquared(parts())), "PlainlySquared overrides compute_loss,")
    made = controller()
    model = cabs_tensorflow.adaptive(compiled(PlainlySquared(parts())), made, microbatches=4)
    model.fit(cabs_tensorflow.dataset(made, (X, LABELS)), verbose=0)
    assert (made.step, made.held_steps) == (1, 0)


def test_two_losses_of_ones_own_are_one_too_many():
    class Both(Squared):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    model = compiled(Both(parts()))
    assert_refused(model, "beside compute_losses, whose mean is what fit.*drop compute_loss")


def test_losses_of_a_class_that_would_be_hidden_are_said():
    class Hidden(keras.Sequential):
        def compute_losses(self, x, y, y_pred, sample_weight=None):
            raise NotImplementedError((x, y, y_pred, sample_weight))

    with pytest.raises(TypeError, match="Hidden has compute_losses, which this would hide"):
        cabs_tensorflow.adaptive(compiled(Hidden(parts())), controller())


def test_a_loss_that_is_assigned_to_the_model_is_seen():
    model = compiled(keras.Sequential(parts()))
    model.compute_loss = lambda **_: tf.constant(0.0)
    assert_refused(model, "overrides compute_loss,")


class Doubled(keras.losses.Loss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return 2.0 * super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true, y_pred):
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)


def test_a_loss_that_reduces_itself_is_refused_before_anything_moves():
    assert_refused(compiled(keras.Sequential(parts()), Doubled()), "has a __call__ of its own")


@pytest.mark.parametrize("options", [{}, {"microbatches": 3}], ids=["exact", "groups"])
@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight", "none"])
def test_a_loss_that_is_not_reduced_to_its_mean_is_refused(reduction, options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model = compiled(keras.Sequential(parts()), loss)
    assert_refused(model, f"got reduction='{reduction}'", **options)


class Spread(keras.losses.Loss):
    """Squares whose targets are not squeezed, so that every example meets every target."""

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_pred - y_true), axis=-1)


def test_targets_are_squeezed_for_those_losses_only_for_which_keras_does_it():
    plain = compiled(keras.Sequential(parts(1)), Spread())
    model = cabs_tensorflow.adaptive(compiled(keras.Sequential(parts(1)), Spread()), controller())
    for one in (plain, model):
        one.train_on_batch(X, X[:, 0])
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_losses_in_a_row_for_outputs_by_name_are_refused():
    inputs = keras.Input((6,))
    outputs = {"b": layers.Dense(3)(inputs), "a": layers.Dense(3)(inputs)}
    model = compiled(keras.Model(inputs, outputs), [CROSS_ENTROPY, CROSS_ENTROPY])
    assert_refused(model, "loss must be one, or one for each output", y={"a": LABELS, "b": LABELS})


@pytest.mark.parametrize("options", [{}, {"microbatches": 3}], ids=["exact", "groups"])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_gradients_that_are_accumulated_are_refused_before_anything_moves(is_scaled, options):
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=4)
    if is_scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = compiled(keras.Sequential(parts()), optimizer=optimizer)
    message = "gradient_accumulation_steps=4 in SGD; leave it out.*microbatches=4"
    assert_refused(model, message, **options)
