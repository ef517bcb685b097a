"""What a step of fit feeds the controller is what a loop over the examples finds."""

import itertools
import math

import keras
import numpy as np
import pytest
from keras import layers

import cabs
import cabs_tensorflow
from tests.tensorflow.fitted import (
    CROSS_ENTROPY,
    LABELS,
    ONE_HOT,
    RANDOM,
    WEIGHTS,
    Log,
    X,
    assert_measured,
    compiled,
    controller,
    fitted,
    gradients_one_by_one,
    mean_fourth_power,
    network,
)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (CROSS_ENTROPY, LABELS),
        (CROSS_ENTROPY, LABELS[:, None]),
        ("mse", ONE_HOT),
        ("MeanAbsoluteError", ONE_HOT),
        (keras.losses.Huber(reduction="mean"), ONE_HOT),
        (mean_fourth_power, ONE_HOT),
        ([keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)], ONE_HOT),
    ],
    ids=["classes", "a class in a row", "squares", "by name", "huber", "a function", "in a list"],
)
def test_any_loss_is_measured_as_a_loop_over_the_examples_would(loss, y, weights):
    assert_measured(compiled(loss=loss), X, y, weights)


def test_targets_without_the_axis_of_a_single_output_are_measured():
    assert_measured(compiled(network(outputs=1), "mse"), X, WEIGHTS)


def test_losses_at_every_position_are_averaged():
    model = keras.Sequential([keras.Input((4, 6)), layers.Dense(5, "tanh"), layers.Dense(3)])
    x = RANDOM.normal(size=(9, 4, 6)).astype(np.float32)
    weights = RANDOM.uniform(size=(9, 4)).astype(np.float32)
    for sample_weight in (None, weights):
        assert_measured(compiled(model), x, x[:, :, :3].argmax(-1), sample_weight)


def test_penalties_of_weights_belong_to_each_example():
    model = network(kernel_regularizer="l2", bias_regularizer=keras.regularizers.L1(0.1))
    assert_measured(compiled(model), X, LABELS)


@pytest.mark.parametrize("named", [False, True])
def test_several_outputs_with_weights_of_their_own_are_measured(named):
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, "tanh")(inputs)
    outputs = layers.Dense(3, name="kind")(hidden), layers.Dense(1, name="size")(hidden)
    losses, weights, y = (CROSS_ENTROPY, "mse"), (0.5, 2.0), (LABELS, X[:, :1])
    if named:
        losses, weights, y = (
            dict(zip(("kind", "size"), values, strict=True)) for values in (losses, weights, y)
        )
    else:
        losses, weights = list(losses), list(weights)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), losses, loss_weights=weights)
    assert_measured(model, X, y)


def test_an_embedding_is_measured():
    words = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 4),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    assert_measured(compiled(words), RANDOM.integers(0, 7, size=(20, 5)), LABELS[:20])


def test_a_sample_takes_fewer_norms():
    _, rows = gradients_one_by_one(compiled(), X, LABELS)
    made = controller()
    model = cabs_tensorflow.adaptive(compiled(), made, sample=10)
    model.train_on_batch(X, LABELS)
    squares = (rows[:10] ** 2).sum() * 96 / 10
    expected = (squares - 96 * (rows.mean(axis=0) ** 2).sum()) / 95
    assert model.decision.observation.variance_trace[0] == pytest.approx(expected, rel=1e-4)


def shares(examples, groups):
    edges = [examples * index // groups for index in range(groups + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


@pytest.mark.parametrize(("examples", "groups"), [(96, 4), (23, 4), (7, 3), (3, 2), (2, 2), (1, 1)])
def test_groups_take_the_variance_from_microbatches(examples, groups):
    x, y = X[:examples], LABELS[:examples]
    _, rows = gradients_one_by_one(compiled(), x, y)
    parts = [rows[share] for share in shares(examples, groups)]
    squares = sum(len(part) * (part.mean(axis=0) ** 2).sum() for part in parts)
    expected = cabs.GradientStatistics(
        examples, groups, squares, (rows.mean(axis=0) ** 2).sum()
    ).variance_trace
    model = cabs_tensorflow.adaptive(compiled(), controller(), microbatches=4)
    model.train_on_batch(x, y)
    found = model.decision.observation.variance_trace[0]
    assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("groups", [None, 4])
def test_training_is_that_of_keras(groups):
    plain = compiled(metrics=["accuracy"])
    followed = cabs_tensorflow.adaptive(
        compiled(metrics=["accuracy"]), controller(16, 16, 17), microbatches=groups
    )
    for share in shares(96, 6):
        logs = [
            model.train_on_batch(X[share], LABELS[share], WEIGHTS[share], return_dict=True)
            for model in (plain, followed)
        ]
        assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-6)
        assert logs[0]["accuracy"] == logs[1]["accuracy"]
    for one, other in zip(plain.get_weights(), followed.get_weights(), strict=True):
        if groups is None:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_class_weights_are_weights_of_examples():
    weights = {0: 0.5, 1: 3.0}
    per_example = np.array([0.5, 3.0, 1.0], np.float32)[LABELS]
    _, expected, _ = fitted(compiled(), (X, LABELS, per_example))
    options = {"options": {"class_weight": weights}}
    assert fitted(compiled(), **options)[1].decisions == expected.decisions
    one_hot = keras.losses.CategoricalCrossentropy(from_logits=True)
    _, found, _ = fitted(compiled(loss=one_hot), (X, ONE_HOT), **options)
    for one, other in zip(found.decisions, expected.decisions, strict=True):
        assert one.average_loss == pytest.approx(other.average_loss, rel=1e-5)


def test_half_precision_scales_the_gradients_and_not_the_statistics():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled()
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    _, rows = gradients_one_by_one(compiled(), X, LABELS)
    before = model.get_weights()
    for follow in ({}, {"microbatches": 4}):
        model.set_weights(before)
        cabs_tensorflow.adaptive(model, controller(), **follow)
        model.train_on_batch(X, LABELS)
        if not follow:
            seen = model.decision.observation
            assert seen.variance_trace[0] == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=0.02)
            assert seen.learning_rate[0] == pytest.approx(0.3)
        moved = np.concatenate(
            [np.ravel(a - b) for a, b in zip(before, model.get_weights(), strict=True)]
        )
        np.testing.assert_allclose(moved / 0.3, rows.mean(axis=0), atol=2e-3)


@pytest.mark.parametrize("follow", [{}, {"microbatches": 3}], ids=["exact", "groups"])
def test_xla_compiles_the_step(follow):
    _, expected, _ = fitted(compiled(), follow=follow)
    _, found, _ = fitted(compiled(jit_compile=True), follow=follow)
    for one, other in zip(found.decisions, expected.decisions, strict=True):
        assert one.average_loss == pytest.approx(other.average_loss, rel=1e-4)
        assert one.average_variance_trace == pytest.approx(other.average_variance_trace, rel=1e-3)


@pytest.mark.parametrize(
    "more",
    [layers.BatchNormalization(), layers.Dropout(0.3), layers.ActivityRegularization(0.01)],
    ids=lambda layer: type(layer).__name__,
)
def test_groups_measure_any_model(more):
    made, log, history = fitted(compiled(network(more)), epochs=2, follow={"microbatches": 4})
    assert made.held_steps == 0
    assert all(math.isfinite(decision.raw) for decision in log.decisions)
    assert history["loss"][1] < history["loss"][0]


def test_groups_measure_a_recurrent_network():
    model = keras.Sequential([keras.Input((4, 6)), layers.LSTM(8), layers.Dense(3)])
    x = RANDOM.normal(size=(64, 4, 6)).astype(np.float32)
    made, _, _ = fitted(compiled(model), (x, LABELS[:64]), follow={"microbatches": 4})
    assert made.held_steps == 0


def test_momentum_is_in_the_rate_that_the_controller_is_told():
    model = network()
    model.compile(keras.optimizers.SGD(0.125, momentum=0.75), CROSS_ENTROPY)
    _, log, _ = fitted(model)
    assert {decision.observation.learning_rate for decision in log.decisions} == {(0.5,)}


def test_what_is_done_between_epochs_is_in_no_step():
    now = [0.0]

    def between(epoch, logs):
        del epoch, logs
        now[0] += 1.0

    made = cabs.Controller(16, sizes=cabs.BatchSizes.range(16, 48), rule=cabs.Progress())
    log = Log(made)
    model = cabs_tensorflow.adaptive(compiled(), made, log=log)
    model._feed._watch = cabs.Stopwatch(lambda: now[0])
    slow = keras.callbacks.LambdaCallback(on_epoch_end=between)
    model.fit(cabs_tensorflow.dataset(made, (X, LABELS)), epochs=3, verbose=0, callbacks=[slow])
    assert now == [3.0]
    assert {decision.observation.seconds for decision in log.decisions} == {0.0}


def test_the_noise_scale_divides_averages():
    _, rows = gradients_one_by_one(compiled(), X, LABELS)
    made = controller(96, 96, 97)
    model = cabs_tensorflow.adaptive(compiled(rate=0.0), made)
    batches = cabs_tensorflow.dataset(made, (X, LABELS))
    history = model.fit(batches, epochs=2, verbose=0)
    trace = rows.var(axis=0, ddof=1).sum()
    expected = trace / ((rows.mean(axis=0) ** 2).sum() - trace / 96)
    assert history.history["noise_scale"] == pytest.approx([expected] * 2, rel=1e-3)
