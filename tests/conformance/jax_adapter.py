"""The JAX adapter as the conformance suite sees it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import cabs_jax
from tests.conformance.adapter import Measured


class Operations:
    einsum, tanh, sin, sqrt, exp = jnp.einsum, jnp.tanh, jnp.sin, jnp.sqrt, jnp.exp
    stack, concatenate, relu = jnp.stack, jnp.concatenate, jax.nn.relu
    sigmoid, softmax, log_softmax = jax.nn.sigmoid, jax.nn.softmax, jax.nn.log_softmax
    reshape, transpose, stop_gradient = jnp.reshape, jnp.transpose, lax.stop_gradient

    @staticmethod
    def mean(x, axes, keepdims=False):
        return jnp.mean(x, axis=axes, keepdims=keepdims)

    @staticmethod
    def total(x, axes, keepdims=False):
        return jnp.sum(x, axis=axes, keepdims=keepdims)

    @staticmethod
    def cross_entropy(scores, labels):
        chances = jax.nn.log_softmax(scores)
        return -jnp.take_along_axis(chances, labels[..., None], axis=-1)[..., 0]

    @staticmethod
    def take(table, numbers):
        return table[numbers]

    @staticmethod
    def convolve(x, kernel, *, stride=1, groups=1):
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    @staticmethod
    def layer_norm(x, scale, offset):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 0.1) * scale + offset


class JaxAdapter:
    draws = 6
    ulps = 64
    operations = Operations

    def __init__(self, *, is_jitted):
        self._wrapped = jax.jit if is_jitted else lambda function: function

    def measure(self, losses_of, parameters, batch, *, sample=None):
        with _precision(parameters):
            measured = cabs_jax.value_and_grad(_one(losses_of), sample=sample)
            (loss, statistics), gradients = self._wrapped(measured)(*_arrays(parameters, batch))
            return Measured(float(loss), jax.device_get(gradients), statistics)

    def plain(self, losses_of, parameters, batch):
        def mean(parameters, batch):
            return jnp.mean(jax.vmap(_one(losses_of), (None, 0))(parameters, batch))

        with _precision(parameters):
            return jax.device_get(self._wrapped(jax.grad(mean))(*_arrays(parameters, batch)))

    def of_group(self, examples, gradients):
        with _precision(gradients):
            return cabs_jax.PartialStatistics.of_group(examples, *_arrays(gradients))

    def complete(self, part, gradients, loss=None):
        with _precision(gradients):
            return part.complete(*_arrays(gradients), loss=loss)


def _one(losses_of):
    """Return the loss of an example, which has no axis of examples."""

    def loss_fn(parameters, example):
        batch = {name: one[None] for name, one in example.items()}
        return losses_of(Operations, parameters, batch)[0]

    return loss_fn


def _precision(arrays):
    return jax.enable_x64(any(one.dtype == np.float64 for one in arrays.values()))


def _arrays(*trees):
    return [{name: jnp.asarray(one) for name, one in tree.items()} for tree in trees]
