"""Models of Keras drawn layer by layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tests.tensorflow.reference import assert_exact

LENGTH, WIDTH = 3, 4


BLOCKS = {
    "dense": lambda h: layers.Dense(WIDTH, activation="tanh")(h),
    "attention": lambda h: h + layers.MultiHeadAttention(2, 2)(h, h),
    "convolution": lambda h: layers.Conv1D(WIDTH, 2, padding="same", activation="gelu")(h),
    "depthwise": lambda h: layers.SeparableConv1D(WIDTH, 3, padding="same")(h),
    "layer norm": lambda h: layers.LayerNormalization()(h) + h,
    "group norm": lambda h: layers.GroupNormalization(2)(h) + h,
    "slopes": lambda h: layers.PReLU(alpha_initializer="ones")(h),
    "recurrence": lambda h: layers.GRU(WIDTH, return_sequences=True, unroll=True)(h),
    "dropout that sleeps": lambda h: layers.Dropout(0.0)(h),
}


@pytest.mark.slow
@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4))
@settings(max_examples=5)
def test_random_models_of_keras_are_exact(names):
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float64")
    try:
        inputs = keras.Input((LENGTH,), dtype="int32")
        h = layers.Embedding(7, WIDTH)(inputs)
        for name in names:
            h = BLOCKS[name](h)
        model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(h)))
    finally:
        keras.config.set_dtype_policy("float32")

    def losses_of(ids):
        return tf.reduce_sum(tf.square(model(ids, training=True)), axis=1)

    ids = np.random.default_rng(0).integers(0, 7, (6, LENGTH))
    assert_exact(losses_of, model.trainable_variables, ids, ulps=64)
