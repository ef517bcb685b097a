"""Pairs that go through a model in one pass, one part after another, are one example each."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import cabs_tensorflow
from tests.tensorflow.reference import (
    assert_exact,
    draw,
    gradients_one_by_one,
    measured,
    variable,
)

M, K = 6, 4


def halves_at_the_size_of_one(z, a):
    return z[: tf.shape(a)[0]], z[tf.shape(a)[0] :]


def halves_at_the_middle(z, _):
    return z[: tf.shape(z)[0] // 2], z[tf.shape(z)[0] // 2 :]


def halves_from_behind(z, a):
    return z[: -tf.shape(a)[0]], z[-tf.shape(a)[0] :]


def with_all_axes(z, a):
    m = tf.shape(a)[0]
    return z[0:m, :], z[m : 2 * m, :]


def split_by_sizes(z, a):
    m = tf.shape(a)[0]
    return tf.split(z, [m, m])


def unstacked(z, _):
    return tf.unstack(tf.reshape(z, [2, -1, z.shape[1]]))


CUTS = {
    "slices": halves_at_the_size_of_one,
    "middle": halves_at_the_middle,
    "behind": halves_from_behind,
    "axes": with_all_axes,
    "split": lambda z, _: tf.split(z, 2),
    "unstack": unstacked,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_pairs_in_one_pass_are_measured_as_pairs(cut):
    first, bias, second = variable(0, K, 5), variable(1, 5), variable(2, 5, 3)

    def losses_of(pair):
        a, b = pair
        z = tf.tanh(tf.concat([a, b], 0) @ first + bias) @ second
        one, other = cut(z, a)
        return tf.reduce_sum(tf.square(one - other), axis=1)

    assert_exact(losses_of, [first, bias, second], (draw(1, M, K), draw(2, M, K)))


def test_three_parts_of_which_one_meets_two_are_measured():
    weight = variable(0, K, 3)

    def losses_of(triple):
        z = tf.tanh(tf.concat(triple, 0) @ weight)
        anchor, near, far = tf.split(z, 3)
        return tf.nn.softplus(tf.reduce_sum(anchor * (near - far), axis=1))

    assert_exact(losses_of, [weight], tuple(draw(seed, M, K) for seed in range(3)))


def test_sequences_and_tables_of_pairs_are_measured():
    table, matrix, scale = variable(0, 9, K), variable(1, K, 9), variable(2, K)

    def losses_of(pair):
        chosen, refused = pair
        h = tf.gather(table, tf.concat([chosen, refused], 0)) * scale
        h += tf.nn.softmax(tf.matmul(h, h, transpose_b=True)) @ h
        scores = tf.reduce_sum(tf.nn.log_softmax(h @ matrix)[..., 0], axis=1)
        good, bad = tf.split(scores, 2)
        return -tf.math.log_sigmoid(good - bad)

    ids = np.random.default_rng(0).integers(0, 9, (2, M, 5))
    assert_exact(losses_of, [table, matrix, scale], (ids[0], ids[1]), ulps=4)


def test_images_of_pairs_are_measured():
    kernel, bias = variable(0, 3, 3, 2, 4), variable(1, 4)

    def losses_of(pair):
        a, b = pair
        z = tf.nn.bias_add(tf.nn.conv2d(tf.concat([a, b], 0), kernel, 2, "SAME"), bias)
        z = tf.reduce_mean(tf.tanh(z), axis=(1, 2))
        one, other = z[: tf.shape(a)[0]], z[tf.shape(a)[0] :]
        return tf.reduce_sum(one * other, axis=1)

    assert_exact(losses_of, [kernel, bias], (draw(2, M, 6, 6, 2), draw(3, M, 6, 6, 2)))


def test_a_part_that_no_loss_depends_on_counts_nothing():
    weight = variable(0, K, 3)

    def losses_of(pair):
        z = tf.tanh(tf.concat(pair, 0) @ weight)
        return tf.reduce_sum(z[: tf.shape(pair[0])[0]], axis=1)

    assert_exact(losses_of, [weight], (draw(1, M, K), draw(2, M, K)))


def test_a_layer_of_keras_takes_pairs():
    layer = keras.layers.Dense(3, "tanh", dtype="float64")
    layer.build((None, K))

    def losses_of(pair):
        one, other = tf.split(layer(tf.concat(pair, 0)), 2)
        return tf.reduce_sum(one * other, axis=1)

    assert_exact(losses_of, layer.trainable_variables, (draw(1, M, K), draw(2, M, K)))


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_a_sample_of_pairs_takes_both_parts_of_the_first_ones(is_dynamic):
    weight = variable(0, K, 3)

    def losses_of(pair):
        one, other = tf.split(tf.tanh(tf.concat(pair, 0) @ weight), 2)
        return tf.reduce_sum(one * other, axis=1)

    pair = tuple(tf.constant(draw(seed, M, K)) for seed in range(2))
    rows = gradients_one_by_one(losses_of, [weight], pair)
    _, found = measured(losses_of, [weight], pair, sample=2, is_dynamic=is_dynamic)
    np.testing.assert_allclose(found.group_square_sum, (rows[:2] ** 2).sum() * M / 2, rtol=1e-12)


MIXING = {
    "not at the middle": lambda z, _: (z[1:], z[:-1]),
    "at a number that is a size by chance": lambda z, _: (z[:M], z[M:]),
    "at the larger of two": lambda z, a: (z[: tf.maximum(tf.shape(a)[0], 3)],) * 2,
    "every second": lambda z, _: (z[::2], z[1::2]),
    "reversed": lambda z, _: (tf.split(z, 2)[0][::-1], tf.split(z, 2)[1]),
}


@pytest.mark.parametrize("cut", MIXING.values(), ids=MIXING)
def test_what_does_not_follow_for_every_size_is_refused(cut):
    weight = variable(0, K, 3, name="weight")

    def losses_of(pair):
        one, other = cut(tf.tanh(tf.concat(pair, 0) @ weight), pair[0])
        m = tf.shape(pair[0])[0]
        return tf.reduce_sum(one[:m] + other[:m], axis=1)

    pair = tuple(tf.constant(draw(seed, M, K)) for seed in range(2))
    with pytest.raises(cabs_tensorflow.UncoveredParameterError, match=r".*'weight'"):
        measured(losses_of, [weight], pair, is_dynamic=True)
