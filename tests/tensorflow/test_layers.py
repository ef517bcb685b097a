"""Every layer of Keras that has weights, and those that move examples about."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import cabs_tensorflow
from tests.tensorflow.reference import assert_exact, draw

IMAGE, SEQUENCE, VECTOR = (7, 6, 4), (6, 4), (5,)


def residual(layer):
    return lambda given: given + layer(given)


def twice(layer):
    return lambda given: layer(keras.ops.tanh(layer(given)))


def attention(**options):
    return lambda given: layers.MultiHeadAttention(2, 3, **options)(given, given)


LAYERS = {
    "Dense": (layers.Dense(3), VECTOR),
    "Dense over positions": (layers.Dense(3, activation="gelu"), SEQUENCE),
    "Dense with a custom gradient": (layers.Dense(3, activation="silu"), VECTOR),
    "Dense twice": (twice(layers.Dense(4)), SEQUENCE),
    "Dense with low-rank updates": (layers.Dense(4, lora_rank=2), SEQUENCE),
    "EinsumDense": (layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"), SEQUENCE),
    "EinsumDense over all": (layers.EinsumDense("abc,bcde->ade", (3, 2), bias_axes="de"), SEQUENCE),
    "Conv1D": (layers.Conv1D(3, 3, padding="same", dilation_rate=2), SEQUENCE),
    "Conv1D causal": (layers.Conv1D(3, 3, padding="causal"), SEQUENCE),
    "Conv1D twice": (twice(layers.Conv1D(4, 3, padding="same")), SEQUENCE),
    "Conv2D": (layers.Conv2D(3, 3, strides=2, padding="same"), IMAGE),
    "Conv2D in pairs": (layers.Conv2D(30, (5, 4)), (6, 5, 30)),
    "Conv2D in groups": (layers.Conv2D(6, 3, groups=2), IMAGE),
    "Conv2D of frames": (layers.TimeDistributed(layers.Conv2D(3, 2)), (3, *IMAGE)),
    "Conv3D": (layers.Conv3D(3, 2, padding="same"), (3, *IMAGE)),
    "Conv1DTranspose": (layers.Conv1DTranspose(3, 3, strides=2), SEQUENCE),
    "Conv2DTranspose": (layers.Conv2DTranspose(3, 3, strides=2, padding="same"), IMAGE),
    "Conv3DTranspose": (layers.Conv3DTranspose(2, 2, strides=2), (3, *IMAGE)),
    "DepthwiseConv1D": (layers.DepthwiseConv1D(3, strides=2, padding="same"), SEQUENCE),
    "DepthwiseConv2D": (layers.DepthwiseConv2D(3, depth_multiplier=2), IMAGE),
    "SeparableConv1D": (layers.SeparableConv1D(3, 3), SEQUENCE),
    "SeparableConv2D": (layers.SeparableConv2D(3, 3, padding="same"), IMAGE),
    "MultiHeadAttention": (attention(), SEQUENCE),
    "MultiHeadAttention of images": (attention(attention_axes=(1, 2)), IMAGE),
    "GroupQueryAttention": (
        lambda given: layers.GroupQueryAttention(3, 4, 2)(given, given),
        SEQUENCE,
    ),
    "AdditiveAttention": (
        lambda given: layers.AdditiveAttention()([layers.Dense(4)(given), given]),
        SEQUENCE,
    ),
    "Attention with a scale": (
        lambda given: layers.Attention(use_scale=True)([layers.Dense(4)(given), given]),
        SEQUENCE,
    ),
    "LayerNormalization": (residual(layers.LayerNormalization()), SEQUENCE),
    "GroupNormalization": (residual(layers.GroupNormalization(2)), IMAGE),
    "RMSNormalization": (residual(layers.RMSNormalization()), SEQUENCE),
    "UnitNormalization": (
        lambda given: layers.UnitNormalization()(layers.Dense(3)(given)),
        SEQUENCE,
    ),
    "BatchNormalization that is frozen": (
        lambda given: layers.BatchNormalization(trainable=False)(layers.Dense(3)(given)),
        SEQUENCE,
    ),
    "PReLU": (layers.PReLU(alpha_initializer="ones"), SEQUENCE),
    "PReLU along axes": (
        layers.PReLU(alpha_initializer="glorot_normal", shared_axes=[1, 2]),
        IMAGE,
    ),
    "LSTM without a loop": (layers.LSTM(3, unroll=True), SEQUENCE),
    "GRU without a loop": (layers.GRU(3, unroll=True, return_sequences=True), SEQUENCE),
    "Bidirectional without a loop": (
        layers.Bidirectional(layers.SimpleRNN(3, unroll=True)),
        SEQUENCE,
    ),
    "moved about": (
        lambda given: layers.Dense(2)(
            layers.Reshape((2, -1))(layers.Permute((2, 1))(layers.Dense(3)(given)))
        ),
        SEQUENCE,
    ),
    "upsampled": (
        lambda given: layers.Cropping2D(2)(
            layers.UpSampling2D(interpolation="bilinear")(layers.Conv2D(2, 2)(given))
        ),
        IMAGE,
    ),
    "pooled": (
        lambda given: layers.Concatenate()(
            [
                layers.GlobalMaxPooling2D()(layers.ZeroPadding2D()(layers.Dense(3)(given))),
                layers.GlobalAveragePooling2D()(layers.AveragePooling2D(2)(layers.Dense(2)(given))),
            ]
        ),
        IMAGE,
    ),
}

# Used at three places and more, where TensorFlow adds gradients as buffers become free.
REUSED = {"Conv2D of frames", *(name for name in LAYERS if "without a loop" in name)}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_exact(name):
    layer, shape = LAYERS[name]
    given = keras.Input(shape)
    model = keras.Model(given, layer(given))

    def losses_of(batch):
        outputs = model(batch, training=True)
        return tf.reduce_sum(tf.reshape(tf.sin(outputs), [tf.shape(outputs)[0], -1]), axis=1)

    batch = draw(1, 5, *shape, dtype="float32")
    ulps = 8 if name in REUSED else 0
    assert_exact(losses_of, model.trainable_variables, batch, ulps=ulps, rtol=1e-4)


def test_an_embedding_counts_rows_that_are_looked_up_twice_together():
    model = keras.Sequential([layers.Embedding(9, 4), layers.Dense(3, activation="tanh")])
    ids = np.array([[1, 1, 1, 2], [0, 8, 8, 0], [3, 4, 5, 6]])
    assert_exact(
        lambda batch: tf.reduce_sum(model(batch), axis=(1, 2)), _built(model, ids), ids, rtol=1e-4
    )


def test_positions_that_all_examples_share_are_exact():
    class Positions(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = layers.Embedding(9, 4), layers.Embedding(12, 4)

        def call(self, ids):
            return self.tokens(ids) + self.places(keras.ops.arange(keras.ops.shape(ids)[1]))

    model = keras.Sequential([Positions(), layers.Dense(3, activation="tanh")])
    ids = np.array([[1, 1, 1, 2], [0, 8, 8, 0], [3, 4, 5, 6]])
    assert_exact(
        lambda batch: tf.reduce_sum(model(batch), axis=(1, 2)), _built(model, ids), ids, rtol=1e-4
    )


def _built(model, batch):
    model(batch)
    return model.trainable_variables


def test_mixed_precision_is_as_exact_as_its_rounding():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Sequential([layers.Dense(16, activation="relu"), layers.Dense(3)])
    finally:
        keras.config.set_dtype_policy("float32")
    batch = draw(0, 6, 5, dtype="float32")
    variables = _built(model, batch)

    def losses_of(batch):
        return tf.reduce_sum(tf.square(tf.cast(model(batch), tf.float32)), axis=1)

    # Each gradient of the loop is rounded to eight bits.
    assert_exact(losses_of, variables, batch, rtol=2e-2)


def test_verify_shows_the_rules_by_the_names_of_keras():
    model = keras.Sequential([layers.Dense(4, name="inner"), layers.Dense(2, name="outer")])
    model(draw(0, 3, 5))
    found = cabs_tensorflow.verify(
        lambda batch: tf.reduce_sum(tf.square(model(batch)), axis=1), draw(0, 3, 5, dtype="float32")
    )
    assert found.error < 1e-5
    rules = {row.name.split("/", 1)[1]: row.rule for row in found.rows}
    assert rules == {
        "inner/kernel": "matrix",
        "inner/bias": "added",
        "outer/kernel": "matrix",
        "outer/bias": "added",
    }
