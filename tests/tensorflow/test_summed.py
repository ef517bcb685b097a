"""Gradients that are sums of the per-example gradients, against those of float64 loops."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import cabs_tensorflow
from cabs_tensorflow import measure
from cabs_tensorflow.norms import reductions
from tests.tensorflow.reference import draw, flat, gradients_one_by_one, plain, spec_of, variable

CHANNELS, SIZE = 3, 7


@pytest.fixture
def chosen(monkeypatch):
    """Sum wherever it can be done, whatever it saves; the variables of each trace's sums."""
    monkeypatch.setattr("cabs.gradients.outer_products.ADDED", -(10**9))
    monkeypatch.setattr("cabs_tensorflow.norms.convolution.ADDED", -(10**9))
    found, sum_up = [], measure.Measurement.sum_up

    def noted(self, *given, **options):
        made = sum_up(self, *given, **options)
        found.append(sorted(self.names[leaf].split("'")[1] for leaf in made))
        return made

    monkeypatch.setattr(measure.Measurement, "sum_up", noted)
    return found


def convolved(name, stride=1, padding="SAME", shape=(3, 2, CHANNELS, 4), dtype="float64"):
    kernel = variable(0, *shape, name=name, dtype=dtype)
    return lambda x: tf.nn.conv2d(x, kernel, stride, padding), [kernel]


def transposed(name):
    kernel = variable(0, 3, 2, 4, CHANNELS, name=name)

    def apply(x):
        sizes = [tf.shape(x)[0], 2 * SIZE, 2 * SIZE, 4]
        return tf.nn.conv2d_transpose(x, kernel, sizes, 2)

    return apply, [kernel]


def depthwise(name):
    kernel = variable(0, 3, 2, CHANNELS, 2, name=name)
    return lambda x: tf.nn.depthwise_conv2d(x, kernel, [1, 2, 2, 1], "SAME"), [kernel]


def matrix(name, rearrange=lambda weight: weight, shape=(CHANNELS, 5)):
    weight = variable(0, *shape, name=name)
    return lambda x: x @ rearrange(weight), [weight]


def many(name):
    weight = variable(0, SIZE, CHANNELS, 2, name=name)
    return lambda x: tf.einsum("bijc,jch->bijh", x, weight), [weight]


def normalized(name):
    scale, shift = variable(0, CHANNELS, name=f"{name} scale"), variable(1, 1, name=f"{name} shift")
    return lambda x: tf.tanh(x) * scale + shift, [scale, shift]


def kernel_of_frames(name):
    kernel = variable(0, 2, 3, 2, CHANNELS, 2, name=name)
    return lambda x: tf.nn.conv3d(
        x[:, None] * tf.ones([1, 3, 1, 1, 1], x.dtype), kernel, [1] * 5, "SAME"
    ), [kernel]


KINDS = {
    "kernel": convolved,
    "kernel without padding": lambda name: convolved(name, padding="VALID"),
    "kernel with stride": lambda name: convolved(name, stride=(2, 3)),
    "kernel of one place with stride": lambda name: convolved(name, 2, shape=(1, 1, CHANNELS, 4)),
    "kernel of frames": kernel_of_frames,
    "transposed kernel": transposed,
    "depthwise kernel": depthwise,
    "matrix": matrix,
    "matrices side by side": many,
    "rearranged": lambda name: matrix(
        name, lambda one: tf.transpose(tf.reshape(one, [5, CHANNELS])), (CHANNELS, 5)
    ),
    "cut": lambda name: matrix(name, lambda one: one[1:, ::2], (CHANNELS + 1, 9)),
    "cast": lambda name: matrix(name, lambda one: tf.cast(tf.cast(one, tf.float32), tf.float64)),
    "scale and shift": normalized,
}


def losses_through(apply):
    def losses_of(x):
        h = tf.sin(apply(x))
        return tf.reduce_sum(tf.reshape(h, [tf.shape(x)[0], -1]), axis=1)

    return losses_of


def taken(losses_of, variables, batch, *, is_dynamic, jit_compile=None, **options):
    """Return the flat gradient of a step, and its statistics."""

    @tf.function(input_signature=spec_of(batch, is_dynamic), jit_compile=jit_compile)
    def step(batch):
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of(batch)
        return tape.gradient(losses, variables, **options)

    gradients, statistics = step(batch)
    for one, leaf in zip(gradients, variables, strict=True):
        assert (one.dtype, one.shape) == (leaf.dtype, leaf.shape)
    return flat(gradients), statistics.read()


def assert_as_loops(found, rows, rtol=1e-9):
    gradient, statistics = found
    mean = rows.mean(axis=0)
    np.testing.assert_allclose(gradient, mean, rtol=rtol, atol=rtol * abs(mean).max())
    np.testing.assert_allclose(statistics.group_square_sum, (rows**2).sum(), rtol=rtol)
    norm = (mean**2).sum()
    np.testing.assert_allclose(statistics.gradient_norm_squared, norm, rtol=10 * rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_gradient_is_that_of_a_loop(kind, chosen, monkeypatch):
    apply, variables = KINDS[kind]("one")
    batch = tf.constant(draw(1, 5, SIZE, SIZE, CHANNELS))
    losses_of = losses_through(apply)
    rows = gradients_one_by_one(losses_of, variables, batch)
    rtol = 1e-6 if kind == "cast" else 1e-9
    names = sorted(one.name.removesuffix(":0") for one in variables)
    # Chunks of two examples and of one leave a rest, or not.
    for is_dynamic, chunk in ((True, 2**20), (False, 2**10), (True, 2**10), (True, 1)):
        monkeypatch.setattr(reductions, "_CHUNK", chunk)
        found = taken(losses_of, variables, batch, is_dynamic=is_dynamic)
        assert_as_loops(found, rows, rtol)
        assert chosen.pop() == names
    metric = lambda gradient, _: 1.0 / (tf.abs(gradient) + 0.1)  # noqa: E731
    _, statistics = taken(losses_of, variables, batch, is_dynamic=True, optimizer=metric)
    weights = 1.0 / (abs(rows.mean(axis=0)) + 0.1)
    expected = (weights * rows**2).sum()
    np.testing.assert_allclose(statistics.group_square_sum, expected, rtol=rtol)
    assert chosen.pop() == names


@pytest.mark.parametrize("kind", ["kernel with stride", "matrix"])
def test_to_the_bit_or_over_a_sample_the_tape_computes_all(kind, chosen):
    apply, variables = KINDS[kind]("one")
    batch = tf.constant(draw(1, 5, SIZE, SIZE, CHANNELS))
    losses_of = losses_through(apply)
    rows = gradients_one_by_one(losses_of, variables, batch)
    expected = flat(plain(losses_of, variables, batch, is_dynamic=True))
    gradient, statistics = taken(losses_of, variables, batch, is_dynamic=True, bitwise=True)
    np.testing.assert_array_equal(gradient, expected)
    assert_as_loops((gradient, statistics), rows)
    gradient, statistics = taken(losses_of, variables, batch, is_dynamic=True, sample=3)
    np.testing.assert_array_equal(gradient, expected)
    np.testing.assert_allclose(statistics.group_square_sum, (rows[:3] ** 2).sum() * 5 / 3)
    assert chosen == []


def test_a_variable_with_two_uses_is_left_to_the_tape(chosen):
    kernel, scale = variable(0, 1, 1, 4, 4, name="kernel"), variable(1, 4, name="scale")

    def losses_of(x):
        h = tf.tanh(tf.nn.conv2d(x, kernel, 1, "SAME")) * scale
        # The same as a matrix.
        return tf.reduce_sum(tf.sin(h @ kernel[0, 0]), axis=(1, 2, 3))

    batch = tf.constant(draw(2, 4, 3, 3, 4))
    rows = gradients_one_by_one(losses_of, [kernel, scale], batch)
    assert_as_loops(taken(losses_of, [kernel, scale], batch, is_dynamic=True), rows)
    assert chosen == [["scale"]]


def test_what_is_looked_up_or_made_of_variables_is_left_to_the_tape(chosen):
    table, low = variable(0, 9, 4, name="table"), variable(1, 4, 2, name="low")

    def losses_of(ids):
        h = tf.gather(table, ids) @ (low @ tf.transpose(low))
        return tf.reduce_sum(tf.sin(h), axis=(1, 2))

    ids = np.random.default_rng(0).integers(0, 9, (4, 6))
    batch = tf.constant(ids)
    rows = gradients_one_by_one(losses_of, [table, low], batch)

    @tf.function(input_signature=spec_of(batch, True))
    def step(batch):
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of(batch)
        return tape.gradient(losses, [table, low])

    gradients, statistics = step(batch)
    assert isinstance(gradients[0], tf.IndexedSlices)
    assert_as_loops((flat(gradients), statistics.read()), rows)
    assert chosen == [[]]


def test_what_the_tape_does_not_watch_has_no_gradient(chosen):
    frozen = tf.Variable(draw(0, CHANNELS, 5), trainable=False, name="frozen")
    weight = variable(1, 5, 2, name="weight")
    batch = tf.constant(draw(2, 4, 6, CHANNELS))

    @tf.function(input_signature=spec_of(batch, True))
    def step(batch):
        with cabs_tensorflow.GradientTape() as tape:
            h = tf.tanh(batch @ frozen) @ weight
            losses = tf.reduce_sum(tf.sin(h), axis=(1, 2))
        return tape.gradient(losses, [frozen, weight])

    assert step(batch)[0][0] is None
    assert chosen == [["weight"]]


def network():
    """Return the variables and losses of a small convolutional network in single precision."""
    first, kernels = convolved("first", dtype="float32")
    second, more = convolved("second", stride=2, shape=(3, 3, 4, 6), dtype="float32")
    out = variable(3, 6, 2, name="out", dtype="float32")

    def losses_of(x):
        return tf.reduce_sum(tf.sin(tf.tanh(second(tf.tanh(first(x)))) @ out), axis=(1, 2, 3))

    return [*kernels, *more, out], losses_of


@pytest.mark.parametrize("examples", [2, 5])
def test_compiled_by_xla_the_gradients_are_those_of_a_loop(examples, chosen, monkeypatch):
    monkeypatch.setattr(reductions, "_CHUNK", 2**11)
    variables, losses_of = network()
    batch = tf.constant(draw(1, examples, SIZE, SIZE, CHANNELS, dtype="float32"))
    rows = gradients_one_by_one(losses_of, variables, batch)
    for is_dynamic in (True, False):
        found = taken(losses_of, variables, batch, is_dynamic=is_dynamic, jit_compile=True)
        assert_as_loops(found, rows, 2e-4)
        assert chosen.pop() == ["first", "out", "second"]


def test_replicas_with_shares_of_different_sizes_have_the_gradient_of_a_loop(mirrored, chosen):
    with mirrored.scope():
        variables, losses_of = network()
    batch = draw(1, 5, SIZE, SIZE, CHANNELS, dtype="float32")
    alone, losses_alone = network()
    rows = gradients_one_by_one(losses_alone, alone, tf.constant(batch))

    @tf.function(input_signature=spec_of(tf.constant(batch), True))
    def step(batch):
        def replica(batch):
            share = cabs_tensorflow.share_of(batch)
            with cabs_tensorflow.GradientTape() as tape:
                losses = losses_of(share)
            return tape.gradient(losses, variables, all_reduce=True)

        return mirrored.run(replica, (batch,))

    gradients, statistics = step(batch)
    for at in range(2):
        found = [mirrored.experimental_local_results(one)[at] for one in gradients]
        one = mirrored.experimental_local_results(statistics)[at]
        assert_as_loops((flat(found), one.read()), rows, 1e-4)
    assert chosen == [["first", "out", "second"]] * 2


def test_in_half_precision_gradients_round_as_those_of_the_tape(chosen):
    layer = keras.layers.Conv2D(4, 3, dtype="mixed_float16", name="half")
    layer.build((None, SIZE, SIZE, CHANNELS))
    batch = tf.constant(draw(1, 4, SIZE, SIZE, CHANNELS, dtype="float32"))

    def losses_of(x):
        return tf.reduce_sum(tf.tanh(tf.cast(layer(x), tf.float32)), axis=(1, 2, 3))

    rows = gradients_one_by_one(losses_of, [one.value for one in layer.trainable_variables], batch)
    variables = layer.trainable_variables
    found = taken(losses_of, variables, batch, is_dynamic=True, loss_scale=64.0)
    assert_as_loops((found[0] / 64.0, found[1]), rows, 1e-2)
    # As the operation took the kernel: in half precision.
    kernel = found[0][: 9 * CHANNELS * 4].astype(np.float32)
    np.testing.assert_array_equal(kernel, kernel.astype(np.float16).astype(np.float32))
    assert len(chosen[0]) == 2


def test_by_itself_it_sums_where_that_is_cheaper():
    wide, narrow = variable(0, 64, 64, name="wide"), variable(1, 64, 64, name="narrow")
    made = []

    def losses_of(x):
        many = tf.reduce_sum(tf.tanh(x @ wide), axis=1)
        return tf.reduce_sum(tf.sin(many @ narrow), axis=1)

    @tf.function
    def step(batch):
        with tf.GradientTape() as tape:
            losses = losses_of(batch)
        measurement = measure.Measurement(losses, [wide, narrow], None)
        measurement.see(tape.gradient(losses, measurement.targets))
        made[:] = measurement.sum_up({0, 1}, is_elementwise=False)

    step(tf.constant(draw(2, 3, 64, 64)))
    # Of 64 positions, and of one.
    assert made == [0]
