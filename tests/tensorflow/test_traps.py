"""Mistakes that are easily made, by others and here: one test each, named after it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import cabs
import cabs_tensorflow
from tests.tensorflow.reference import (
    assert_exact,
    draw,
    gradients_one_by_one,
    measured,
    variable,
)


@pytest.mark.parametrize("scale", [1024.0, 2.0**-8])
def test_loss_scaling_scales_gradients_and_not_statistics(scale):
    weight, batch = variable(0, 4, 3), draw(1, 6, 4)

    def losses_of(x):
        return tf.reduce_sum(tf.tanh(x @ weight), axis=1)

    (plain,), statistics = measured(losses_of, [weight], batch)
    (scaled,), same = measured(losses_of, [weight], batch, loss_scale=scale)
    np.testing.assert_allclose(scaled, scale * plain, rtol=1e-12)
    for name in ("group_square_sum", "gradient_norm_squared", "variance_trace"):
        np.testing.assert_allclose(getattr(same, name), getattr(statistics, name), rtol=1e-10)


def test_loss_scaling_by_keras_in_half_precision():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    weight = tf.Variable(draw(0, 4, 3, dtype="float32"))
    optimizer.build([weight])
    batch = tf.constant(draw(1, 6, 4, dtype="float32"))

    @tf.function
    def step(x):
        with cabs_tensorflow.GradientTape() as tape:
            half = tf.cast(x, tf.float16) @ tf.cast(weight, tf.float16)
            losses = tf.reduce_sum(tf.tanh(tf.cast(half, tf.float32)), axis=1)
        scale = optimizer.scale_loss(1.0)
        gradients, statistics = tape.gradient(losses, [weight], loss_scale=scale)
        optimizer.apply(gradients, [weight])
        return statistics

    before = weight.numpy()
    rows = gradients_one_by_one(
        lambda x: tf.reduce_sum(tf.tanh(x @ weight), axis=1), [weight], batch
    )
    statistics = step(batch)
    np.testing.assert_allclose(statistics.group_square_sum, (rows**2).sum(), rtol=1e-2)
    np.testing.assert_allclose(
        weight.numpy(), before - 0.1 * rows.mean(0).reshape(4, 3), rtol=1e-2, atol=1e-3
    )


def test_frozen_variables_are_left_out():
    frozen = tf.Variable(draw(0, 4, 4), trainable=False)
    weight = variable(1, 4, 2)
    assert_exact(
        lambda x: tf.reduce_sum(tf.tanh(x @ frozen) @ weight, axis=1), [weight], draw(2, 6, 4)
    )


def test_variables_that_are_not_used_count_nothing():
    used, unused = variable(0, 3), variable(1, 5)
    gradients, statistics = measured(
        lambda x: tf.linalg.matvec(x, used), [used, unused], draw(2, 4, 3)
    )
    assert gradients[1] is None
    np.testing.assert_allclose(statistics.group_square_sum, (draw(2, 4, 3) ** 2).sum())
    found = cabs_tensorflow.verify(
        lambda x: tf.linalg.matvec(x, used), draw(2, 4, 3), [used, unused]
    )
    assert found.error < 1e-12
    assert found.rows[1].rule == "no gradient"


def test_activation_checkpointing_is_refused_by_name():
    weight = variable(0, 4, 4, name="kept")
    block = tf.recompute_grad(lambda h: tf.tanh(h @ weight))
    with pytest.raises(cabs_tensorflow.UncoveredParameterError, match=r"recompute_grad.*'kept'"):
        measured(lambda x: tf.reduce_sum(block(x), axis=1), [weight], draw(1, 6, 4))


def test_padding_ids_add_to_no_row():
    table = variable(0, 5, 3)
    ids = np.array([[1, 2, 0, 0], [3, 3, 3, 0], [4, 0, 0, 0]])

    def losses_of(ids):
        mask = tf.cast(ids != 0, tf.float64)[..., None]
        return tf.reduce_sum(tf.sin(tf.nn.embedding_lookup(table, ids)) * mask, axis=(1, 2))

    assert_exact(losses_of, [table], ids)


@pytest.mark.parametrize("layout", ["NHWC", "explicit padding", "VALID"])
def test_depthwise_convolutions_are_exact(layout):
    kernel = variable(0, 3, 2, 4, 2)
    padding = {"NHWC": "SAME", "VALID": "VALID"}.get(layout, [[0, 0], [2, 1], [0, 2], [0, 0]])

    def losses_of(x):
        found = tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], padding)
        return tf.reduce_sum(tf.sin(found), axis=(1, 2, 3))

    assert_exact(losses_of, [kernel], draw(1, 4, 5, 6, 4))


def test_grouped_convolutions_are_exact():
    layer = keras.layers.Conv2D(6, 3, groups=3, padding="same", dtype="float64")
    layer.build((None, 5, 5, 6))
    assert_exact(
        lambda x: tf.reduce_sum(tf.sin(layer(x)), axis=(1, 2, 3)),
        layer.trainable_variables,
        draw(1, 4, 5, 5, 6),
    )


def test_dropout_has_the_same_mask_in_both_passes():
    weight = variable(0, 4, 50)
    batch = draw(1, 6, 4)
    kept = []

    @tf.function
    def step(x):
        with cabs_tensorflow.GradientTape() as tape:
            hidden = tf.nn.dropout(tf.ones([6, 50], tf.float64), 0.5) * (x @ weight)
            losses = tf.reduce_sum(hidden, axis=1)
        kept.append(hidden)
        gradients, statistics = tape.gradient(losses, [weight])
        return gradients[0], statistics, hidden

    gradient, statistics, hidden = step(batch)
    masks = 2.0 * (hidden.numpy() != 0)
    rows = batch[:, :, None] * masks[:, None, :]
    np.testing.assert_allclose(statistics.group_square_sum, (rows**2).sum(), rtol=1e-12)
    np.testing.assert_allclose(gradient, rows.mean(axis=0), rtol=1e-12)


def test_slices_of_a_gradient_that_name_a_row_twice_are_added_before_they_are_squared():
    table = variable(0, 4, 2)
    ids = np.array([[1, 1], [1, 2], [1, 1]])
    gradients, statistics = measured(
        lambda ids: tf.reduce_sum(tf.nn.embedding_lookup(table, ids), axis=(1, 2)), [table], ids
    )
    assert isinstance(gradients[0], tf.IndexedSlices)
    dense = tf.convert_to_tensor(gradients[0]).numpy()
    np.testing.assert_allclose(statistics.gradient_norm_squared, (dense**2).sum(), rtol=1e-12)


def test_one_trace_serves_all_sizes_of_a_run():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(3000, 6)).astype(np.float32)
    targets = (inputs @ rng.normal(size=6) + 2.0 * rng.normal(size=3000)).astype(np.float32)
    controller = cabs.Controller(8, sizes=cabs.BatchSizes.range(8, 512))
    sampler = cabs.BatchSampler(len(inputs), controller, seed=0)
    weight, traces = tf.Variable(tf.zeros([6])), []

    @tf.function(input_signature=[tf.TensorSpec([None, 6]), tf.TensorSpec([None])])
    def step(x, y):
        traces.append(x.shape)
        with cabs_tensorflow.GradientTape() as tape:
            losses = 0.5 * tf.square(tf.linalg.matvec(x, weight) - y)
        gradients, statistics = tape.gradient(losses, [weight])
        weight.assign_sub(0.05 * gradients[0])
        return tf.reduce_mean(losses), statistics.variance_trace

    sizes = set()
    while sampler.epoch < 6:
        for indices in sampler:
            loss, trace = step(inputs[indices], targets[indices])
            # A rate that moves takes the rule through many sizes.
            rate = 3.0 * (1.0 + np.sin(len(sizes) / 5.0))
            controller.update(learning_rate=rate, variance_trace=trace, loss=loss)
            sizes.add(len(indices))
    assert len(sizes) > 10
    assert len(traces) == 1


def test_batch_normalization_in_training_mode_is_refused_by_name():
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.BatchNormalization()])
    model(draw(0, 4, 5))
    with pytest.raises(
        cabs_tensorflow.UncoveredParameterError, match=r"batch normalization.*dense\S*/kernel"
    ):
        measured(
            lambda x: tf.reduce_sum(model(x, training=True), axis=1),
            model.trainable_variables,
            draw(0, 4, 5, dtype="float32"),
        )


def test_a_deep_network_is_refused_as_a_shallow_one_is():
    weight, scale = variable(0, 4, 4, name="first"), variable(1, 4)

    def losses_of(x):
        h = x @ weight
        for _ in range(1500):
            h = tf.tanh(h)
        h = h * scale
        return tf.reduce_sum(h - tf.reduce_mean(h, axis=0), axis=1)

    with pytest.raises(cabs_tensorflow.UncoveredParameterError, match="'first'"):
        measured(losses_of, [weight, scale], tf.constant(draw(2, 3, 4)))
