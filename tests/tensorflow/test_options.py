"""What a call can be asked for, what it returns, and what it says when it cannot do it."""

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


def losses_and_weight(seed=0):
    weight = variable(seed, 4, 3, name="weight")
    return lambda x: tf.reduce_sum(tf.tanh(x @ weight), axis=1), weight


@pytest.mark.parametrize("length", [1, 6, 40])
def test_compiled_by_xla_it_is_exact(length):
    first, second = (variable(seed, 5, 5, dtype="float32") for seed in (0, 1))
    table, kernel = variable(2, 9, 5, dtype="float32"), variable(3, 3, 5, 5, dtype="float32")

    def losses_of(ids):
        h = tf.tanh(tf.gather(table, ids) @ first) @ second
        h = tf.nn.conv1d(h, kernel, 1, "SAME")
        return tf.reduce_mean(tf.sin(h @ tf.transpose(table)), axis=(1, 2))

    ids = np.random.default_rng(0).integers(0, 9, (8, length))
    batch, variables = tf.constant(ids), [first, second, table, kernel]
    rows = gradients_one_by_one(losses_of, variables, batch)
    for is_dynamic in (False, True):
        _, found = measured(losses_of, variables, batch, is_dynamic=is_dynamic, jit_compile=True)
        np.testing.assert_allclose(found.group_square_sum, (rows**2).sum(), rtol=1e-4)
        np.testing.assert_allclose(
            found.gradient_norm_squared, (rows.mean(0) ** 2).sum(), rtol=1e-4
        )


def test_sources_keep_their_structure():
    weight, bias = variable(0, 4), variable(1)
    gradients, statistics = measured(
        lambda x: tf.linalg.matvec(x, weight) + bias,
        {"weight": weight, "rest": (bias, weight)},
        draw(2, 3, 4),
    )
    assert set(gradients) == {"weight", "rest"}
    np.testing.assert_array_equal(gradients["weight"], gradients["rest"][1])
    # A variable that is named twice counts once.
    rows = np.c_[draw(2, 3, 4), np.ones(3)]
    np.testing.assert_allclose(statistics.group_square_sum, (rows**2).sum(), rtol=1e-12)


def test_tensors_that_are_watched_are_sources_too():
    @tf.function
    def step(x, scale):
        with cabs_tensorflow.GradientTape() as tape:
            tape.watch([x, scale])
            losses = tf.reduce_sum(tf.square(x * scale), axis=1)
        return tape.gradient(losses, [scale, x])

    x, scale = draw(0, 3, 2), draw(1, 2)
    (of_scale, of_x), statistics = step(x, scale)
    by_scale, by_x = 2 * x**2 * scale, 2 * x * scale**2
    np.testing.assert_allclose(of_scale, by_scale.mean(axis=0))
    np.testing.assert_allclose(of_x, by_x / 3)
    expected = (by_scale**2).sum() + (by_x**2).sum()
    np.testing.assert_allclose(statistics.group_square_sum, expected, rtol=1e-12)


def test_a_loop_inside_of_the_function_can_hold_the_step():
    losses_of, weight = losses_and_weight()
    batches = tf.constant(draw(1, 3, 6, 4))

    @tf.function
    def run():
        parts = cabs_tensorflow.PartialStatistics.zero(tf.float64)
        total = tf.zeros([4, 3], tf.float64)
        for batch in batches:
            with cabs_tensorflow.GradientTape() as tape:
                losses = losses_of(batch)
            gradients, statistics = tape.gradient(losses, [weight])
            parts += statistics.partial
            total += gradients[0] / 3
        return parts.complete([total])

    rows = gradients_one_by_one(losses_of, [weight], tf.reshape(batches, [18, 4]))
    found = run().read()
    assert found.examples == 18
    np.testing.assert_allclose(found.variance_trace, rows.var(0, ddof=1).sum(), rtol=1e-10)


def test_large_batches_are_taken_some_examples_at_a_time():
    weight, kernel = variable(0, 400, 300), variable(1, 3, 3, 4, 8)
    assert_exact(
        lambda x: tf.reduce_sum(tf.sin(x @ weight), axis=(1, 2)), [weight], draw(2, 21, 3, 400)
    )
    assert_exact(
        lambda x: tf.reduce_sum(tf.sin(tf.nn.conv2d(x, kernel, 1, "SAME")), axis=(1, 2, 3)),
        [kernel],
        draw(3, 23, 40, 40, 4),
    )


def test_eager_mode_is_refused_with_the_way_out():
    with pytest.raises(RuntimeError, match=r"decorate the training step with tf\.function"):
        cabs_tensorflow.GradientTape().__enter__()


def test_eager_functions_are_refused_with_the_way_out():
    losses_of, weight = losses_and_weight()
    tf.config.run_functions_eagerly(True)
    try:
        with pytest.raises(RuntimeError, match="run_functions_eagerly at False"):
            measured(losses_of, [weight], tf.constant(draw(0, 3, 4)))
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (tf.reduce_mean, ValueError, "one loss an example, got shape"),
        (lambda losses: losses[:, None], ValueError, "reduction=None"),
        (lambda losses: losses[:1], ValueError, "at least two examples, got 1"),
        (lambda losses: tf.cast(losses, tf.int32), TypeError, "real numbers"),
        (lambda losses: tf.stop_gradient(losses), ValueError, "depend on at least one of the"),
        (lambda _: 1.0, TypeError, r"losses must be a tensor .* got 1\.0"),
    ],
)
def test_losses_of_another_form_are_refused(change, error, message):
    losses_of, weight = losses_and_weight()
    with pytest.raises(error, match=message):
        measured(lambda x: change(losses_of(x)), [weight], tf.constant(draw(0, 3, 4)))


def test_statistics_are_read_outside_of_the_function():
    @tf.function
    def step():
        part = cabs_tensorflow.PartialStatistics.of_group(4, [tf.constant([1.0])])
        return part.complete([tf.constant([1.0])]).read()

    with pytest.raises(TypeError, match="return them from it"):
        step()


def test_verify_finds_a_model_that_mixes_examples():
    weight = variable(0, 4, 3)

    def losses_of(x):
        outputs = x @ weight
        # The constants of a batch cannot be seen: here they differ from those of one example.
        return tf.reduce_sum(outputs * tf.stop_gradient(tf.reduce_mean(outputs)), axis=1)

    assert cabs_tensorflow.verify(losses_of, draw(1, 3, 4)).error > 1e-3


@pytest.mark.parametrize("batch", [np.ones((1, 3)), (np.ones((2, 3)), np.ones((3, 3)))])
def test_verify_refuses_a_batch_that_shows_nothing(batch):
    with pytest.raises(ValueError, match="at least two examples"):
        cabs_tensorflow.verify(lambda x: x, batch)


def test_every_public_name_has_an_example_and_they_are_sorted():
    names = cabs_tensorflow.__all__
    assert names == sorted(names)
    assert [n for n in names if ">>>" not in (getattr(cabs_tensorflow, n).__doc__ or "")] == []


def test_what_the_tape_does_not_watch_counts_nothing():
    weight, frozen = variable(0, 4, 3), tf.Variable(draw(1, 3), trainable=False)

    def losses_of(x):
        return tf.reduce_sum(tf.square(x @ (weight * frozen) + frozen), axis=1)

    batch = tf.constant(draw(2, 5, 4))
    gradients, statistics = measured(losses_of, [weight, frozen], batch)
    assert gradients[1] is None
    rows = gradients_one_by_one(losses_of, [weight], batch)
    np.testing.assert_allclose(statistics.group_square_sum, (rows**2).sum(), rtol=1e-12)


def test_what_was_computed_before_the_tape_counts_nothing():
    weight = variable(0, 4, 3)

    @tf.function
    def step(x):
        turned = tf.transpose(weight)
        with cabs_tensorflow.GradientTape() as tape:
            losses = tf.reduce_sum(tf.square(tf.tanh(x @ weight) @ turned), axis=1)
        return tape.gradient(losses, [weight])[1]

    batch, constant = tf.constant(draw(1, 5, 4)), tf.constant(weight.numpy().T)
    rows = gradients_one_by_one(
        lambda x: tf.reduce_sum(tf.square(tf.tanh(x @ weight) @ constant), axis=1), [weight], batch
    )
    np.testing.assert_allclose(step(batch).group_square_sum, (rows**2).sum(), rtol=1e-12)


def test_a_tensor_that_is_watched_and_what_it_is_made_of_are_refused_together():
    weight = variable(0, 4, 3)

    @tf.function
    def step(x):
        with cabs_tensorflow.GradientTape() as tape:
            made = 2.0 * weight
            tape.watch(made)
            losses = tf.reduce_sum(tf.square(x @ made), axis=1)
        return tape.gradient(losses, [weight, made])

    with pytest.raises(cabs_tensorflow.UncoveredParameterError, match="made of another one"):
        step(draw(1, 5, 4))


def test_the_mean_of_losses_in_half_precision_does_not_overflow():
    weight = tf.Variable(tf.cast(variable(0, 4, 3), tf.float16))
    batch = tf.zeros([4096, 4], tf.float16)
    losses_of = lambda x: tf.reduce_sum(x @ weight, axis=1) + 40.0  # noqa: E731
    _, statistics = measured(losses_of, [weight], batch)
    assert float(statistics.loss) == 40.0
