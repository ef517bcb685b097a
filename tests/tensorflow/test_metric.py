"""Norms in the metric of an optimizer's step, against loops over the examples and the steps."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import cabs_tensorflow
import cabs_tensorflow.optimizers
from cabs import BatchSizes, Controller, Progress
from tests.programs import largest

M = 5


def model_of(seed=0):
    keras.utils.set_random_seed(seed)
    table = keras.layers.Embedding(9, 4)
    inside = keras.Sequential(
        [
            *(table, keras.layers.Conv1D(6, 3, padding="same", activation="tanh")),
            *(keras.layers.LayerNormalization(), keras.layers.Dense(4, activation="tanh")),
            *(keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(9)),
        ]
    )
    inside.build((None, 7))
    return inside


def losses_of(model, ids, labels):
    scores = model(ids)
    return keras.losses.sparse_categorical_crossentropy(labels, scores, from_logits=True)


def data(examples=M):
    random = np.random.default_rng(1)
    ids = tf.constant(random.integers(0, 9, (examples, 7)), tf.int32)
    return ids, tf.constant(random.integers(0, 9, examples), tf.int32)


def one_by_one(model, ids, labels):
    """Return the gradients of each example, by variable, dense."""
    rows = []
    for at in range(len(labels)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(losses_of(model, ids[at : at + 1], labels[at : at + 1]))
        found = tape.gradient(loss, model.trainable_variables)
        rows.append([tf.convert_to_tensor(one).numpy().astype(np.float64) for one in found])
    return [np.stack(some) for some in zip(*rows, strict=True)]


# Settings that go with each, besides those that all have; momentum is not in P.
OPTIMIZERS = {
    "Adam": {"beta_1": st.just(0.0), "beta_2": st.floats(0.3, 0.999), "amsgrad": st.booleans()},
    "AdamW": {
        "beta_1": st.just(0.0),
        "beta_2": st.floats(0.3, 0.999),
        "amsgrad": st.booleans(),
        "weight_decay": st.just(0.0),
    },
    "Nadam": {"beta_1": st.just(0.0), "beta_2": st.floats(0.3, 0.999)},
    "RMSprop": {"rho": st.floats(0.3, 0.99), "centered": st.booleans()},
    "Adagrad": {"initial_accumulator_value": st.floats(0.0, 1.0)},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=15)
@given(options=st.data(), seed=st.integers(0, 2**31), epsilon=st.floats(1e-4, 1e-1))
def test_p_is_what_the_step_multiplies_the_gradient_with(name, options, seed, epsilon):
    given_options = options.draw(st.fixed_dictionaries(OPTIMIZERS[name]))
    variable = keras.Variable(np.zeros((2, 3)), dtype="float32")
    optimizer = getattr(keras.optimizers, name)(0.1, epsilon=epsilon, **given_options)
    optimizer.build([variable])
    metric, random = cabs_tensorflow.optimizers.metric_of(optimizer), np.random.default_rng(seed)
    for _ in range(3):
        sizes = random.lognormal(0.0, 1.0, (2, 3))
        gradient = tf.constant(sizes * random.choice([-1.0, 0.0, 1.0], (2, 3)), tf.float32)
        expected = metric(gradient, variable).numpy() * gradient.numpy()
        variable.assign(np.zeros((2, 3)))
        optimizer.apply([gradient], [variable])
        # Without momentum, a step is the rate times P times the gradient.
        np.testing.assert_allclose(variable.numpy() / -0.1, expected, rtol=1e-4)


def test_plain_gradient_descent_has_no_metric():
    assert cabs_tensorflow.optimizers.metric_of(keras.optimizers.SGD(0.1, momentum=0.9)) is None


@pytest.mark.parametrize("is_known", [True, False])
def test_norms_are_those_of_a_loop(is_known):
    model, (ids, labels) = model_of(), data()
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    shapes = [(M, 7), (M,)] if is_known else [(None, 7), (None,)]

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.int32) for shape in shapes])
    def step(ids, labels):
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of(model, ids, labels)
        gradients, statistics = tape.gradient(
            losses, model.trainable_variables, optimizer=optimizer
        )
        dense = [tf.convert_to_tensor(one) for one in gradients]
        metric = cabs_tensorflow.optimizers.metric_of(optimizer)
        pairs = zip(dense, model.trainable_variables, strict=True)
        return dense, [metric(*pair) for pair in pairs], statistics

    for _ in range(2):
        rows = one_by_one(model, ids, labels)
        gradients, weights, statistics = step(ids, labels)
        squares = sum((w.numpy() * row**2).sum() for w, row in zip(weights, rows, strict=True))
        norm = sum(
            (w.numpy() * row.mean(axis=0) ** 2).sum() for w, row in zip(weights, rows, strict=True)
        )
        read = statistics.read()
        assert read.group_square_sum == pytest.approx(squares, rel=1e-4)
        assert read.gradient_norm_squared == pytest.approx(norm, rel=1e-4)
        optimizer.apply(gradients, model.trainable_variables)


def test_uses_and_scales_and_samples_go_with_a_metric():
    weight = tf.Variable(np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32))
    inputs = tf.constant(np.random.default_rng(1).standard_normal((6, 3)), tf.float32)
    metric = lambda gradient, _: 1.0 / (tf.abs(gradient) + 0.1)  # noqa: E731

    def losses_of_rows(rows):
        # Used twice, and once transposed; T = 1.
        return tf.reduce_sum(
            tf.tanh(tf.tanh(rows @ weight) @ weight) @ tf.transpose(weight), axis=1
        )

    @tf.function
    def step(inputs, scale, sample):
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of_rows(inputs)
        return tape.gradient(losses, [weight], optimizer=metric, loss_scale=scale, sample=sample)

    rows = []
    for at in range(6):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(losses_of_rows(inputs[at : at + 1]))
        rows.append(tape.gradient(loss, weight).numpy())
    rows = np.stack(rows)
    weights = 1.0 / (np.abs(rows.mean(axis=0)) + 0.1)
    for scale in (None, 64.0):
        for sample in (None, 4):
            _, statistics = step(inputs, scale, sample)
            some = rows[:sample]
            expected = (weights * some**2).sum() * len(rows) / len(some)
            assert float(statistics.group_square_sum) == pytest.approx(expected, rel=1e-4)
            norm = (weights * rows.mean(axis=0) ** 2).sum()
            assert float(statistics.gradient_norm_squared) == pytest.approx(norm, rel=1e-4)


FORMS = {
    "negated": lambda weight, x: tf.tanh(x @ -weight),
    "negated, and as it is": lambda weight, x: tf.tanh(tf.tanh(x @ weight) @ -weight),
    "split": lambda weight, x: tf.concat([tf.tanh(x @ some) for some in halves(weight)], -1),
    "split, and whole": lambda weight, x: tf.tanh(tf.tanh(x @ weight) @ halves(weight)[0]),
    "one half twice": lambda weight, x: tf.tanh(x @ halves(weight)[1]) + x @ halves(weight)[1],
    "sliced with overlap": lambda weight, x: tf.tanh(x @ weight[:, :4]) + x @ weight[:, 2:],
    "scaled": lambda weight, x: tf.tanh(x @ (2.0 * weight)),
    "tied": lambda weight, x: tf.tanh(tf.gather(weight, ids_of(x)) @ weight) + x,
    "looked up, negated": lambda weight, x: tf.tanh(tf.gather(-weight, ids_of(x))) * x,
}


def halves(weight):
    return tf.split(weight, 2, axis=1)


def ids_of(x):
    return tf.cast(tf.round(10.0 * x[..., 0]), tf.int32) % 6


@pytest.mark.parametrize("positions", [1, 40])
@pytest.mark.parametrize("name", FORMS)
def test_whatever_lies_between_a_variable_and_its_uses(name, positions):
    random = np.random.default_rng(0)
    weight = tf.Variable(random.standard_normal((6, 6)).astype(np.float32))
    inputs = tf.constant(random.standard_normal((4, positions, 6)), tf.float32)
    metric = lambda gradient, _: tf.abs(gradient) + 0.1  # noqa: E731

    def losses_of_rows(inputs):
        return tf.reduce_sum(tf.square(FORMS[name](weight, inputs)), [1, 2])

    @tf.function
    def step(optimizer):
        with cabs_tensorflow.GradientTape() as tape:
            losses = losses_of_rows(inputs)
        return tape.gradient(losses, [weight], optimizer=optimizer)

    rows = []
    for at in range(4):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(losses_of_rows(inputs[at : at + 1]))
        rows.append(tf.convert_to_tensor(tape.gradient(loss, weight)).numpy())
    squares = np.stack(rows).astype(np.float64) ** 2
    _, plain = step(None)
    assert float(plain.group_square_sum) == pytest.approx(squares.sum(), rel=1e-4)
    (gradient,), weighted = step(metric)
    expected = (np.abs(tf.convert_to_tensor(gradient).numpy()) + 0.1) * squares
    assert float(weighted.group_square_sum) == pytest.approx(expected.sum(), rel=1e-4)


@pytest.mark.parametrize("how", ["whole", "split", "sliced"])
@pytest.mark.parametrize("size", [1e-5, 1000.0])
def test_squares_of_a_cut_in_half_precision_neither_overflow_nor_vanish(how, size):
    weight = tf.Variable(tf.ones((4, 6)))
    inputs = tf.constant(size, tf.float16, (3, 4))

    @tf.function
    def step():
        with cabs_tensorflow.GradientTape() as tape:
            half = tf.cast(weight, tf.float16)
            cut = {"whole": [half], "split": halves(half), "sliced": [half[:, :4], half[:, 4:]]}
            scores = tf.concat([inputs @ part for part in cut[how]], axis=1)
            losses = tf.reduce_sum(tf.cast(scores, tf.float32), axis=1)
        return tape.gradient(losses, [weight], optimizer=lambda gradient, _: tf.ones_like(gradient))

    expected = 3 * 24 * float(inputs[0, 0]) ** 2
    assert float(step()[1].group_square_sum) == pytest.approx(expected, rel=2e-2)


def test_an_optimizer_that_scales_the_loss_has_the_metric_of_the_one_inside():
    variable = keras.Variable(np.array([1.0, -2.0]), dtype="float32")
    inner = keras.optimizers.Adam(0.1)
    outer = keras.optimizers.LossScaleOptimizer(inner)
    outer.build([variable])
    gradient = tf.constant([0.3, -0.2])
    one, other = (
        cabs_tensorflow.optimizers.metric_of(some)(gradient, variable) for some in (inner, outer)
    )
    np.testing.assert_array_equal(one, other)


def test_one_product_an_example_is_not_materialized():
    examples, inputs, outputs = 16, 40, 30
    weight, rows = tf.Variable(tf.fill((inputs, outputs), 0.01)), tf.ones((examples, inputs))
    metric = lambda gradient, _: tf.abs(gradient) + 0.1  # noqa: E731

    @tf.function(jit_compile=True)
    def measured(rows):
        with cabs_tensorflow.GradientTape() as tape:
            losses = tf.reduce_sum(tf.tanh(rows @ weight), axis=1)
        return tape.gradient(losses, [weight], optimizer=metric)

    @tf.function(jit_compile=True)
    def formed(rows):
        cotangents = 1.0 - tf.square(tf.tanh(rows @ weight))
        return rows[:, :, None] * cotangents[:, None, :]

    def elements(step):
        return largest(step.experimental_get_compiler_ir(rows)(stage="optimized_hlo"))

    assert elements(measured) == inputs * outputs
    assert elements(formed) == examples * inputs * outputs


def test_one_product_an_example_is_exact():
    dense, inputs = keras.layers.Dense(3), tf.constant(np.eye(4, 5) + 0.5, tf.float32)
    dense.build((None, 5))
    metric = lambda gradient, _: tf.abs(gradient) + 0.1  # noqa: E731

    @tf.function
    def step(inputs):
        with cabs_tensorflow.GradientTape() as tape:
            losses = tf.reduce_sum(tf.square(dense(inputs)), axis=1)
        return tape.gradient(losses, dense.trainable_variables, optimizer=metric)

    gradients, statistics = step(inputs)
    outputs = dense(inputs).numpy()
    kernels = 2.0 * inputs.numpy()[:, :, None] * outputs[:, None, :]
    expected = ((np.abs(gradients[0].numpy()) + 0.1) * kernels**2).sum()
    expected += ((np.abs(gradients[1].numpy()) + 0.1) * (2.0 * outputs) ** 2).sum()
    assert float(statistics.group_square_sum) == pytest.approx(expected, rel=1e-5)
    controller = Controller(16, rule=Progress(overhead=100, adaptive=True))
    assert not controller.update(statistics, learning_rate=1e-3).held
    with pytest.raises(ValueError, match="statistics are in the metric"):
        Controller(16, rule=Progress(overhead=100)).update(statistics, learning_rate=1e-3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_rate_is_how_far_a_gradient_moves_a_variable_in_the_end(nesterov):
    optimizer = keras.optimizers.SGD(0.5, momentum=0.75, nesterov=nesterov)
    weight = tf.Variable([0.0, 0.0], dtype=tf.float32)
    optimizer.build([weight])
    rate = float(cabs_tensorflow.learning_rate(optimizer))
    for step in range(60):
        optimizer.apply([tf.constant([1.0, -2.0]) * float(step == 0)], [weight])
    np.testing.assert_allclose(weight.numpy(), [-rate, 2.0 * rate], rtol=1e-5)
    assert rate == 2.0


def test_the_rate_of_others_is_their_own():
    made = keras.optimizers
    schedule = made.schedules.ExponentialDecay(0.25, 10, 0.5)
    scaled = made.LossScaleOptimizer(made.SGD(0.5, momentum=0.5))
    for optimizer, rate in (
        *((made.SGD(0.25), 0.25), (made.SGD(schedule, momentum=0.5), 0.5), (made.Adam(0.25), 0.25)),
        *((made.RMSprop(0.25, momentum=0.5), 0.5), (made.AdamW(0.25), 0.25), (scaled, 1.0)),
    ):
        assert float(cabs_tensorflow.learning_rate(optimizer)) == rate


def test_what_is_not_known_is_refused():
    variable = tf.Variable([1.0, 2.0])

    def step(optimizer):
        @tf.function
        def traced():
            with cabs_tensorflow.GradientTape() as tape:
                losses = tf.ones([3, 1]) @ tf.reshape(variable, [1, 2])
                losses = tf.reduce_sum(losses, axis=1)
            return tape.gradient(losses, [variable], optimizer=optimizer)

        return traced()

    with pytest.raises(TypeError, match="optimizer must be one of Keras' SGD, Adam"):
        step(keras.optimizers.Ftrl())
    with pytest.raises(ValueError, match=r"optimizer must be built.*optimizer\.build"):
        step(keras.optimizers.Adam())
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2; leave it out"):
        step(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match="P in the shape of the gradient"):
        step(lambda gradient, _: gradient[:1])


@pytest.mark.parametrize("rule", [Progress(adaptive=True), Progress(overhead=64)])
def test_fit_follows_the_rule_for_the_least_time(rule):
    random = np.random.default_rng(0)
    inputs = random.standard_normal((512, 10)).astype(np.float32)
    labels = inputs[:, :3].argmax(axis=1)
    layers = [keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(3)]
    controller = Controller(sizes=BatchSizes.range(16, 128), rule=rule)
    model = cabs_tensorflow.adaptive(keras.Sequential(layers), controller)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
    batches = cabs_tensorflow.dataset(controller, (inputs, labels), seed=0)
    history = model.fit(batches, epochs=6, verbose=0)
    assert controller.held_steps == 0
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert (controller.step_cost is not None) == (rule.overhead is None)
