"""Networks drawn block by block, with variables that are tied and used again."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tests.tensorflow.reference import assert_exact, draw, measured, variable

LENGTH, WIDTH = 5, 4


def normalized(h, p):
    h = h - tf.reduce_mean(h, axis=-1, keepdims=True)
    return h * tf.math.rsqrt(tf.reduce_mean(h * h, axis=-1, keepdims=True) + 0.1) * p["v"] + p["w"]


def attention(h, p):
    packed = tf.einsum("btd,de->bte", h, p["packed"])
    packed = tf.reshape(packed, [-1, LENGTH, 3, 2, WIDTH // 2])
    q, k, v = tf.unstack(tf.transpose(packed, [2, 0, 3, 1, 4]))
    weights = tf.nn.softmax(tf.matmul(q, k, transpose_b=True))
    mixed = tf.transpose(tf.matmul(weights, v), [0, 2, 1, 3])
    return h + tf.reshape(mixed, [-1, LENGTH, WIDTH]) @ p["n"]


def heads_in_the_batch(h, p):
    split = tf.transpose(tf.reshape(h @ p["m"], [-1, LENGTH, 2, 2]), [0, 2, 1, 3])
    folded = tf.reshape(split, [-1, LENGTH, 2])
    mixed = tf.nn.softmax(folded @ tf.transpose(folded, [0, 2, 1])) @ folded
    back = tf.transpose(tf.reshape(mixed, [-1, 2, LENGTH, 2]), [0, 2, 1, 3])
    return tf.reshape(back, [-1, LENGTH, WIDTH])


def sequence_first(h, p):
    turned = tf.transpose(h, [1, 0, 2])
    rows = tf.reshape(turned, [-1, WIDTH]) @ p["m"]
    return tf.transpose(tf.reshape(rows, tf.shape(turned)), [1, 0, 2])


def recurrent(h, p):
    state, states = tf.zeros_like(h[:, 0]), []
    for row in tf.unstack(h, axis=1):
        state = tf.tanh(row @ p["m"] + state @ p["n"] + p["v"])
        states.append(state)
    return tf.stack(states, axis=1)


def convolved(h, p):
    return tf.nn.conv1d(h, p["kernel"], 1, "SAME")


def weight_normalized(h, p):
    return h @ (p["m"] / tf.norm(p["m"], axis=0) * p["v"])


@tf.function
def called(h, m):
    return tf.nn.gelu(h @ m)


BLOCKS = {
    "matrix": lambda h, p: tf.tanh(h @ p["m"]),
    "twice the same matrix": lambda h, p: tf.tanh(h @ p["m"]) @ tf.transpose(p["m"]),
    "bias": lambda h, p: tf.nn.bias_add(h, p["v"]),
    "scale": lambda h, p: h * p["v"] - p["w"],
    "power": lambda h, p: tf.sigmoid(h) ** p["v"] / (1.0 + p["w"] ** 2),
    "slope": lambda h, p: tf.maximum(h, p["v"] * h),
    "normalization": normalized,
    "attention": attention,
    "heads in the batch": heads_in_the_batch,
    "sequence first": sequence_first,
    "recurrence": recurrent,
    "convolution": convolved,
    "weight normalization": weight_normalized,
    "called": lambda h, p: called(h, p["m"]),
    "halves of a matrix": lambda h, p: (h[..., :2] @ p["m"][:2]) * (h[..., 2:] @ p["m"][2:]),
    "positions": lambda h, p: h + p["places"][:LENGTH],
}


def parameters(index):
    return {
        "m": variable(10 * index, WIDTH, WIDTH, name=f"m{index}"),
        "n": variable(10 * index + 1, WIDTH, WIDTH),
        "v": tf.Variable(1.0 + 0.3 * draw(10 * index + 2, WIDTH)),
        "w": variable(10 * index + 3, WIDTH),
        "kernel": variable(10 * index + 4, 3, WIDTH, WIDTH),
        "packed": variable(10 * index + 5, WIDTH, 3 * WIDTH),
        "places": variable(10 * index + 6, LENGTH + 2, WIDTH),
    }


@pytest.mark.slow
@given(
    names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    is_shared=st.booleans(),
    examples=st.sampled_from([2, LENGTH, 7]),
)
@settings(max_examples=12)
def test_random_networks_are_exact(names, is_shared, examples):
    table = variable(99, 6, WIDTH, name="table")
    blocks = [parameters(index) for index in range(1 if is_shared else len(names))]

    def losses_of(batch):
        ids, scale = batch
        h = tf.gather(table, ids) * scale[:, None, None]
        for index, name in enumerate(names):
            h = BLOCKS[name](h, blocks[0 if is_shared else index])
        scores = tf.tanh(h) @ tf.transpose(table)
        return -tf.reduce_mean(tf.nn.log_softmax(scores)[..., 1], axis=1)

    ids = np.random.default_rng(1).integers(0, 6, (examples, LENGTH))
    variables = [table, *(one for block in blocks for one in block.values())]
    # Blocks that share variables use some of them three times and more.
    assert_exact(losses_of, variables, (ids, draw(2, examples)), ulps=64)


@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    examples=st.integers(2, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=5)
def test_a_perceptron_is_exact_against_gradients_written_out_in_numpy(widths, examples, seed):
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=pair) for pair in itertools.pairwise(widths)]
    biases = [rng.normal(size=width) for width in widths[1:]]
    inputs = rng.normal(size=(examples, widths[0]))

    squares, mean = 0.0, 0.0
    for x in inputs:
        outputs = [x]
        for weight, bias in zip(weights, biases, strict=True):
            outputs.append(np.tanh(outputs[-1] @ weight + bias))
        cotangent, rows = outputs[-1], []
        backward = reversed(list(zip(weights, outputs, outputs[1:], strict=False)))
        for weight, before, after in backward:
            cotangent = cotangent * (1 - after**2)
            rows += [np.outer(before, cotangent).ravel(), cotangent]
            cotangent = weight @ cotangent
        gradient = np.concatenate(rows)
        squares, mean = squares + gradient @ gradient, mean + gradient / examples

    pairs = [(tf.Variable(w), tf.Variable(b)) for w, b in zip(weights, biases, strict=True)]

    def losses_of(x):
        for weight, bias in pairs:
            x = tf.tanh(x @ weight + bias)
        return 0.5 * tf.reduce_sum(x**2, axis=1)

    variables = [one for pair in pairs for one in pair]
    _, statistics = measured(losses_of, variables, tf.constant(inputs), is_dynamic=True)
    np.testing.assert_allclose(statistics.group_square_sum, squares, rtol=1e-12)
    np.testing.assert_allclose(statistics.gradient_norm_squared, mean @ mean, rtol=1e-9, atol=1e-18)


KERAS_BLOCKS = {
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
@given(names=st.lists(st.sampled_from(sorted(KERAS_BLOCKS)), min_size=1, max_size=4))
@settings(max_examples=8)
def test_random_models_of_keras_are_exact(names):
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float64")
    try:
        inputs = keras.Input((LENGTH,), dtype="int32")
        h = layers.Embedding(7, WIDTH)(inputs)
        for name in names:
            h = KERAS_BLOCKS[name](h)
        model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(h)))
    finally:
        keras.config.set_dtype_policy("float32")

    def losses_of(ids):
        return tf.reduce_sum(tf.square(model(ids, training=True)), axis=1)

    ids = np.random.default_rng(0).integers(0, 7, (6, LENGTH))
    assert_exact(losses_of, model.trainable_variables, ids, ulps=64)
