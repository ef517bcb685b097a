"""Derivatives of gradients and of statistics, by a tape around the statistics' own."""

import numpy as np
import pytest
import tensorflow as tf

import cabs_tensorflow
from cabs_tensorflow.norms import reductions
from tests.tensorflow.reference import draw, spec_of, variable


def chained(is_compiled, monkeypatch):
    """Return variables, losses and a batch, of which kernel and matrix gradients are summed."""
    monkeypatch.setattr("cabs.gradients.outer_products.ADDED", -(10**9))
    monkeypatch.setattr("cabs_tensorflow.norms.convolution.ADDED", -(10**9))
    # In chunks, so that what is differentiated is a loop; of one XLA refuses the derivative.
    monkeypatch.setattr(reductions, "_CHUNK", 10**9 if is_compiled else 64)
    variables = [variable(0, 3, 3, 2, 3, name="kernel"), variable(1, 3, 2, name="matrix")]

    def losses_of(x):
        kernel, matrix = variables
        seen = tf.tanh(tf.nn.conv2d(x, kernel, 1, "SAME"))
        return tf.reduce_sum(tf.sin(seen @ matrix), axis=(1, 2, 3))

    return variables, losses_of, tf.constant(draw(2, 5, 4, 4, 2))


def squares_and_norm(variables, losses_of, batch, values):
    """Return the sum of squared norms and that of the mean gradient at some values, by a loop."""
    for one, value in zip(variables, values, strict=True):
        one.assign(value)
    rows = []
    for at in range(len(batch)):
        with tf.GradientTape() as tape:
            loss = losses_of(batch[at : at + 1])
        found = tape.gradient(loss, variables)
        rows.append(np.concatenate([one.numpy().ravel() for one in found]))
    return np.square(rows).sum(), np.square(np.mean(rows, axis=0)).sum()


@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_derivatives_of_gradients_and_of_statistics_are_those_of_a_loop(
    bitwise, is_compiled, monkeypatch
):
    variables, losses_of, batch = chained(is_compiled, monkeypatch)

    @tf.function(input_signature=spec_of(batch, not is_compiled), jit_compile=is_compiled)
    def step(x):
        with tf.GradientTape(persistent=True) as outer:
            with cabs_tensorflow.GradientTape() as tape:
                losses = losses_of(x)
            gradients, statistics = tape.gradient(losses, variables, bitwise=bitwise)
            norm = tf.add_n([tf.reduce_sum(tf.square(one)) for one in gradients])
        return [
            outer.gradient(one, variables)
            for one in (statistics.group_square_sum, statistics.gradient_norm_squared, norm)
        ]

    found = step(batch)
    start = [one.numpy() for one in variables]
    way = [draw(3 + at, *one.shape) for at, one in enumerate(start)]
    ends = [
        squares_and_norm(
            variables, losses_of, batch, [a + h * b for a, b in zip(start, way, strict=True)]
        )
        for h in (1e-4, -1e-4)
    ]
    squares, norm = (np.subtract(*ends) / 2e-4).tolist()
    along = [
        sum(np.vdot(one, other) for one, other in zip(each, way, strict=True)) for each in found
    ]
    np.testing.assert_allclose(along, [squares, norm, norm], rtol=1e-5)


def test_a_tape_that_has_given_its_gradients_gives_no_others():
    weight = variable(0, 3, 2, name="matrix")

    @tf.function
    def step(x):
        with cabs_tensorflow.GradientTape() as tape:
            losses = tf.reduce_sum(tf.sin(x @ weight), axis=1)
        tape.gradient(losses, [weight])
        return tape.gradient(losses, [weight])

    with pytest.raises(RuntimeError, match="non-persistent"):
        step(tf.constant(draw(1, 4, 3)))
