"""The TensorFlow adapter as the conformance suite sees it."""

import numpy as np
import tensorflow as tf

import cabs_tensorflow
from tests.conformance.adapter import Measured


class Operations:
    einsum, tanh, sin, sqrt, exp = tf.einsum, tf.tanh, tf.sin, tf.sqrt, tf.exp
    stack, concatenate, relu, sigmoid = tf.stack, tf.concat, tf.nn.relu, tf.sigmoid
    softmax, log_softmax, take = tf.nn.softmax, tf.nn.log_softmax, tf.gather
    reshape, transpose, stop_gradient = tf.reshape, tf.transpose, tf.stop_gradient

    @staticmethod
    def mean(x, axes, keepdims=False):
        return tf.reduce_mean(x, axes, keepdims=keepdims)

    @staticmethod
    def total(x, axes, keepdims=False):
        return tf.reduce_sum(x, axes, keepdims=keepdims)

    @staticmethod
    def cross_entropy(scores, labels):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, scores)

    @staticmethod
    def convolve(x, kernel, *, stride=1, groups=1):
        # TensorFlow has no gradient of a grouped convolution on a CPU, but for depthwise ones.
        if groups == x.shape[-1] == kernel.shape[-1]:
            kernel = tf.transpose(kernel, (0, 1, 3, 2))
            return tf.nn.depthwise_conv2d(x, kernel, [1, stride, stride, 1], "VALID")
        pieces = zip(tf.split(x, groups, -1), tf.split(kernel, groups, -1), strict=True)
        found = [tf.nn.conv2d(one, weights, stride, "VALID") for one, weights in pieces]
        return tf.concat(found, -1)

    @staticmethod
    def layer_norm(x, scale, offset):
        x = x - tf.reduce_mean(x, axis=-1, keepdims=True)
        return x * tf.math.rsqrt(tf.reduce_mean(x * x, -1, keepdims=True) + 0.1) * scale + offset


class TensorflowAdapter:
    draws = 8
    # Sums of the examples' gradients are those of another order.
    ulps = 2**14
    operations = Operations

    def __init__(self, *, is_size_known):
        self._is_size_known = is_size_known

    def _call(self, function, batch):
        batch = {name: tf.constant(one) for name, one in batch.items()}
        specs = {
            name: tf.TensorSpec(
                one.shape if self._is_size_known else [None, *one.shape[1:]], one.dtype
            )
            for name, one in batch.items()
        }
        return tf.function(function, input_signature=[specs])(batch)

    def measure(self, losses_of, parameters, batch, *, sample=None):
        variables = {name: tf.Variable(one) for name, one in parameters.items()}

        def step(batch):
            with cabs_tensorflow.GradientTape() as tape:
                losses = losses_of(Operations, variables, batch)
            return tape.gradient(losses, [*variables.values()], sample=sample)

        gradients, statistics = self._call(step, batch)
        return Measured(float(statistics.loss), _dense(variables, gradients), statistics)

    def plain(self, losses_of, parameters, batch):
        variables = {name: tf.Variable(one) for name, one in parameters.items()}

        def step(batch):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(losses_of(Operations, variables, batch))
            return tape.gradient(loss, [*variables.values()])

        return _dense(variables, self._call(step, batch))

    def of_group(self, examples, gradients):
        return cabs_tensorflow.PartialStatistics.of_group(examples, _tensors(gradients))

    def complete(self, part, gradients, loss=None):
        return part.complete(_tensors(gradients), loss=loss)


def _tensors(gradients):
    return [tf.constant(one) for one in gradients.values()]


def _dense(variables, gradients):
    return {
        name: np.zeros(one.shape) if found is None else tf.convert_to_tensor(found).numpy()
        for (name, one), found in zip(variables.items(), gradients, strict=True)
    }
