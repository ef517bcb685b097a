"""A plain loop over the examples, in NumPy and float64, against which everything is held."""

import numpy as np
import tensorflow as tf

import cabs_tensorflow

ROUNDED = 2**12
"""By how many units in the last place sums in another order differ, at most."""


def draw(seed, *shape, dtype="float64"):
    """Return an array of normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def variable(seed, *shape, name=None, dtype="float64"):
    return tf.Variable(draw(seed, *shape, dtype=dtype), name=name)


def flat(gradients):
    """Return all elements in float64; gradients that are None count nothing."""
    dense = [tf.convert_to_tensor(one).numpy() for one in gradients if one is not None]
    return np.concatenate([one.astype(np.float64).ravel() for one in dense])


def gradients_one_by_one(losses_of, variables, batch):
    """Return each example's gradient, shape (m, parameters)."""
    rows = []
    for index in range(len(tf.nest.flatten(batch)[0])):
        one = tf.nest.map_structure(lambda array, at=index: array[at : at + 1], batch)
        with tf.GradientTape() as tape:
            loss = losses_of(one)
        unconnected = tf.UnconnectedGradients.ZERO
        rows.append(flat(tape.gradient(loss, variables, unconnected_gradients=unconnected)))
    return np.stack(rows)


def spec_of(batch, is_dynamic):
    """Return the signature of a function of one batch, with its size known or not."""

    def one(tensor):
        return tf.TensorSpec(
            [None, *tensor.shape[1:]] if is_dynamic else tensor.shape, tensor.dtype
        )

    return [tf.nest.map_structure(one, batch)]


def measured(losses_of, variables, batch, *, is_dynamic=False, jit_compile=None, **options):
    """Return gradients and statistics, from a function that is traced for any size, or for one."""

    @tf.function(input_signature=spec_of(batch, is_dynamic), jit_compile=jit_compile)
    def step(batch):
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of(batch)
        return tape.gradient(losses, variables, **options)

    return step(batch)


def plain(losses_of, variables, batch, *, is_dynamic=False, jit_compile=None):
    """Return the gradients of the mean loss."""

    @tf.function(input_signature=spec_of(batch, is_dynamic), jit_compile=jit_compile)
    def step(batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(losses_of(batch))
        return tape.gradient(loss, variables)

    return step(batch)


def assert_exact(losses_of, variables, batch, *, rtol=None, ulps=0, jit_compile=None):
    """Assert that statistics are the loop's, and gradients those of TensorFlow.

    To rounding, or to the bit where that is asked for. ``ulps`` is for variables that are used
    three times and more, whose gradients TensorFlow adds up in an order that depends on which
    buffer is free.
    """
    batch = tf.nest.map_structure(tf.convert_to_tensor, batch)
    rows = gradients_one_by_one(losses_of, variables, batch)
    is_double = tf.as_dtype(variables[0].dtype) == tf.float64
    rtol = rtol or (1e-10 if is_double else 2e-5)
    square_sum, gradient_norm_squared = (rows**2).sum(), (rows.mean(axis=0) ** 2).sum()
    expected = plain(losses_of, variables, batch, is_dynamic=True, jit_compile=jit_compile)
    for is_dynamic, bitwise in ((False, False), (True, False), (True, True)):
        gradients, statistics = measured(
            *(losses_of, variables, batch),
            is_dynamic=is_dynamic, bitwise=bitwise, jit_compile=jit_compile,
        )  # fmt: skip
        for one, other in zip(gradients, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                one, other = tf.convert_to_tensor(one).numpy(), tf.convert_to_tensor(other).numpy()
                eps = np.finfo(one.dtype).eps
                slack = (ulps if bitwise else max(ulps, ROUNDED)) * eps
                # Some are zero but for rounding, as that of a bias of keys in attention.
                floor = 0.0 if bitwise else 16 * eps * abs(rows).max()
                atol = slack * abs(other).max() + floor
                np.testing.assert_allclose(one, other, rtol=slack, atol=atol)
        found = statistics.read()
        assert (found.examples, found.groups) == (len(rows), len(rows))
        np.testing.assert_allclose(found.group_square_sum, square_sum, rtol=rtol, atol=1e-30)
        # Where gradients nearly cancel, the batch's own gradient carries their rounding errors.
        slack = (
            rtol * (gradient_norm_squared * square_sum / len(rows)) ** 0.5 + rtol**2 * square_sum
        )
        np.testing.assert_allclose(
            found.gradient_norm_squared, gradient_norm_squared, rtol=rtol, atol=slack + 1e-30
        )
