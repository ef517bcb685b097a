"""A Keras model is trained by fit as ever, and its controller is fed what a loop would find."""

import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import cabs
import cabs_tensorflow

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(96, 6)).astype(np.float32)
LABELS = X[:, :3].argmax(axis=1)
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]
WEIGHTS = RANDOM.uniform(0.2, 2.0, size=96).astype(np.float32)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TOP_TWO = keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")


def controller(size=16, smallest=2, largest=48):
    return cabs.Controller(size, sizes=cabs.BatchSizes.range(smallest, largest))


def network(*more, outputs=3, **options):
    """Return a small network, the same one every time."""
    keras.utils.set_random_seed(1)
    dense = layers.Dense(8, "tanh", **options)
    return keras.Sequential([keras.Input((6,)), dense, *more, layers.Dense(outputs)])


def compiled(model=None, loss=CROSS_ENTROPY, rate=0.3, **options):
    model = network() if model is None else model
    model.compile(keras.optimizers.SGD(rate), loss, **options)
    return model


def fitted(model, source=(X, LABELS), epochs=1, follow=None, options=None):
    """Return a controller, the run log, and the history of a model that was trained."""
    made = controller()
    log = Log(made)
    model = cabs_tensorflow.adaptive(model, made, log=log, **(follow or {}))
    batches = cabs_tensorflow.dataset(made, source)
    history = model.fit(batches, epochs=epochs, verbose=0, **(options or {}))
    return made, log, history.history


class Log:
    """Keeps what a run log would write."""

    def __init__(self, made):
        self.start = made.state_dict()
        self.decisions, self.examples = [], []

    def write(self, decision, *, examples):
        self.decisions.append(decision)
        self.examples.append(examples)


def gradients_one_by_one(model, x, y, sample_weight=None):
    """Return losses, shape (m,), and gradients, shape (m, parameters), from batches of one."""
    losses, rows = [], []
    for index in range(len(keras.tree.flatten(x)[0])):
        one = keras.tree.map_structure(
            lambda array, index=index: None if array is None else tf.constant(array[[index]]),
            (x, y, sample_weight),
        )
        with tf.GradientTape() as tape:
            y_pred = model(one[0], training=True)
            loss = model.compute_loss(x=one[0], y=one[1], y_pred=y_pred, sample_weight=one[2])
        gradients = tape.gradient(loss, model.trainable_variables)
        losses.append(float(loss))
        rows.append(np.concatenate([np.ravel(tf.convert_to_tensor(g)) for g in gradients]))
    return np.array(losses), np.array(rows, np.float64)


def assert_measured(model, x, y, sample_weight=None, **follow):
    """Assert that one step feeds the controller what the loop over the examples finds."""
    expected, rows = gradients_one_by_one(model, x, y, sample_weight)
    made = controller()
    model = cabs_tensorflow.adaptive(model, made, **follow)
    model.train_on_batch(x, y, sample_weight)
    seen = model.decision.observation
    assert seen.loss == pytest.approx(expected.mean(), rel=1e-5)
    assert seen.variance_trace[0] == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-4)
    assert made.step == 1


def mean_fourth_power(y, y_pred):
    return keras.ops.mean((y - y_pred) ** 4, axis=-1)


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


@pytest.mark.parametrize("follow", [{}, {"microbatches": 4}], ids=["exact", "groups"])
def test_each_batch_has_the_size_that_was_just_decided_and_an_epoch_is_one_pass(follow):
    made, log, history = fitted(compiled(rate=2.0), epochs=5, follow=follow)
    assert len(set(log.examples)) > 5, log.examples

    class Replay:
        batch_size = 16

    replay, sizes = Replay(), []
    sampler = cabs.BatchSampler(96, replay)
    while sampler.epoch < 5:
        for indices in sampler:
            replay.batch_size = log.decisions[len(sizes)].batch_size
            sizes.append(len(indices))
    assert log.examples == sizes
    assert history["batch_size"][-1] == made.batch_size


def test_epochs_take_as_many_batches_as_they_need(capsys):
    """Keras would hold each epoch to the number of batches of the first."""
    steps = []

    class Count(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):  # noqa: ARG002
            steps.append(made.step)

    made = controller()
    model = cabs_tensorflow.adaptive(compiled(), made)

    class Sizes:
        @property
        def batch_size(self):
            return 8 if steps else 48

    batches = cabs_tensorflow.dataset(Sizes(), (X, LABELS))
    model.fit(batches, epochs=2, verbose=2, callbacks=[Count()])
    assert steps == [2, 2 + 12]
    shown = capsys.readouterr().out
    assert "\n2/2 - " in shown
    assert "\n12/12 - " in shown


@pytest.mark.parametrize("follow", [{}, {"microbatches": 3}], ids=["exact", "groups"])
def test_no_size_is_traced_but_the_first(follow):
    traces, first = [], []

    class Net(cabs_tensorflow.AdaptiveBatchSize, keras.Model):
        def __init__(self):
            super().__init__()
            self.network = network()

        def call(self, x):
            return self.network(x)

        def train_step(self, data):
            traces.append(data[0].shape.as_list())
            return super().train_step(data)

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
            first.append(len(traces))

    model = Net()
    made = controller()
    model.follow(made, **follow)
    compiled(model, rate=2.0)
    batches = cabs_tensorflow.dataset(made, (X, LABELS))
    for _ in range(2):
        model.fit(batches, epochs=3, verbose=0, validation_data=(X, LABELS), callbacks=[Count()])
    assert len({batch.shape[0] for batch, _ in batches}) > 1
    assert traces == [[None, 6]]
    # The metrics of Keras are made in the first trace, and a second one makes none.
    compiled(model, rate=2.0, metrics=["accuracy"])
    del first[:], traces[:]
    model.fit(batches, epochs=3, verbose=0, callbacks=[Count()])
    assert set(first) == {2}
    assert traces == [[None, 6]] * 2


def test_a_functional_model_can_have_the_mixin():
    class Net(cabs_tensorflow.AdaptiveBatchSize, keras.Model):
        pass

    inputs = keras.Input((6,))
    model = Net(inputs, layers.Dense(3)(inputs))
    made = controller()
    model.follow(made)
    compiled(model).fit(cabs_tensorflow.dataset(made, (X, LABELS)), verbose=0)
    assert made.step > 0


def test_the_learning_rate_is_the_one_that_the_step_used():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.4, 3, 0.5, staircase=True)
    _, log, _ = fitted(compiled(rate=schedule))
    rates = [decision.observation.learning_rate[0] for decision in log.decisions]
    assert rates == pytest.approx([float(schedule(step)) for step in range(len(rates))])
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))
    _, log, _ = fitted(compiled(), epochs=2, options={"callbacks": [scheduler]})
    rates = {round(decision.observation.learning_rate[0], 6) for decision in log.decisions}
    assert rates == {0.1, 0.05}


def test_metrics_validation_and_callbacks_are_those_of_keras(tmp_path, capsys):
    made = controller()
    model = cabs_tensorflow.adaptive(
        compiled(metrics=["accuracy"], weighted_metrics=[TOP_TWO]), made
    )
    path = tmp_path / "best.keras"
    callbacks = [
        keras.callbacks.ModelCheckpoint(path, monitor="val_loss", save_best_only=True),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.EarlyStopping("batch_size", patience=1, mode="max", min_delta=1000),
    ]
    history = model.fit(
        cabs_tensorflow.dataset(made, (X, LABELS)),
        epochs=9,
        validation_data=(X, LABELS),
        validation_freq=[1, 2],
        callbacks=callbacks,
    )
    assert history.epoch == [0, 1]
    names = ["accuracy", "batch_size", "loss", "noise_scale", "top"]
    validation = ["val_accuracy", "val_loss", "val_top"]
    assert sorted(history.history) == names + validation
    assert history.history["val_loss"][-1] == pytest.approx(
        model.evaluate(X, LABELS, verbose=0, return_dict=True)["loss"], rel=1e-5
    )
    shown = capsys.readouterr().out
    for name in names + validation:
        assert f"- {name}: " in shown
    assert (tmp_path / "log.csv").read_text().startswith("epoch,accuracy,batch_size,loss")
    loaded = keras.models.load_model(path)
    np.testing.assert_allclose(loaded.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-5)


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002
            if epoch == 2:
                raise KeyboardInterrupt

    def train(*callbacks):
        made = controller()
        model = cabs_tensorflow.adaptive(compiled(), made)
        backup = keras.callbacks.BackupAndRestore(tmp_path)
        batches = cabs_tensorflow.dataset(made, (X, LABELS))
        return model.fit(batches, epochs=4, verbose=0, callbacks=[backup, *callbacks])

    with pytest.raises(KeyboardInterrupt):
        train(Stop())
    assert train().epoch == [2, 3]


def test_epochs_of_so_many_steps_go_on_where_the_last_one_ended():
    made = controller(10, 10, 11)
    model = cabs_tensorflow.adaptive(compiled(rate=0.0), made)
    sampler = cabs.BatchSampler(96, made)
    batches = cabs_tensorflow.dataset(sampler, (X, LABELS))
    history = model.fit(batches, epochs=3, steps_per_epoch=3, verbose=0)
    assert made.step == 9
    assert (sampler.epoch, sampler.position) == (0, 90)
    assert len(history.epoch) == 3


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


def test_the_noise_scale_divides_averages():
    _, rows = gradients_one_by_one(compiled(), X, LABELS)
    made = controller(96, 96, 97)
    model = cabs_tensorflow.adaptive(compiled(rate=0.0), made)
    batches = cabs_tensorflow.dataset(made, (X, LABELS))
    history = model.fit(batches, epochs=2, verbose=0)
    trace = rows.var(axis=0, ddof=1).sum()
    expected = trace / ((rows.mean(axis=0) ** 2).sum() - trace / 96)
    assert history.history["noise_scale"] == pytest.approx([expected] * 2, rel=1e-3)


def test_an_end_of_the_data_moves_nothing_on():
    """In a step of Keras it can count one more step, and draw a seed."""
    dropout = layers.Dropout(0.5, seed=0)
    made, _, _ = fitted(compiled(model := network(dropout)), epochs=4)
    assert int(model.optimizer.iterations) == made.step
    assert int(dropout.seed_generator.state.value[1]) == made.step


def test_a_run_log_holds_every_decision(tmp_path):
    made = controller()
    with cabs.RunLog(tmp_path / "run.jsonl", made) as log:
        model = cabs_tensorflow.adaptive(compiled(), made, log=log)
        model.fit(cabs_tensorflow.dataset(made, (X, LABELS)), epochs=2, verbose=0)
    run = cabs.read_run(tmp_path / "run.jsonl")
    assert len(run.decisions) == made.step
    assert sum(numbers["examples"] for numbers in run.measurements) == 2 * 96
    assert run.decisions[-1] == model.decision


def test_the_model_stays_what_it_was_and_so_do_its_files(tmp_path):
    model = compiled()
    names = [layer.name for layer in model.layers]
    made = controller()
    assert cabs_tensorflow.adaptive(model, made) is model
    assert isinstance(model, keras.Sequential)
    assert [layer.name for layer in model.layers] == names
    model.fit(cabs_tensorflow.dataset(made, (X, LABELS)), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is keras.Sequential
    assert int(loaded.optimizer.iterations) == made.step
    np.testing.assert_array_equal(loaded.get_weights()[0], model.get_weights()[0])
    again = cabs_tensorflow.adaptive(loaded, made)
    again.fit(cabs_tensorflow.dataset(made, (X, LABELS)), verbose=0)


def test_a_model_that_is_followed_twice_feeds_the_last_controller():
    first, second = controller(), controller()
    model = cabs_tensorflow.adaptive(compiled(), first)
    cabs_tensorflow.adaptive(model, second)
    model.fit(cabs_tensorflow.dataset(second, (X, LABELS)), verbose=0)
    assert (first.step, second.step > 0) == (0, True)
    assert [base.__name__ for base in type(model).__mro__].count("AdaptiveBatchSize") == 1


class Own(keras.Model):
    def train_step(self, data):
        raise NotImplementedError(data)


class Halved(cabs_tensorflow.AdaptiveBatchSize, keras.Sequential):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) / 2


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: compiled(run_eagerly=True), ValueError, "run_eagerly=True.*without both"),
        (lambda: compiled(steps_per_execution=2), ValueError, "steps_per_execution=2.*without"),
        (network, ValueError, r"call compile\(\) before fit"),
        (
            lambda: compiled(loss=keras.losses.MeanSquaredError("sum")),
            ValueError,
            "reduction='sum'",
        ),
        (lambda: compiled(loss=None), ValueError, "compiled without a loss.*microbatches=8"),
        (
            lambda: compiled(network(activity_regularizer="l2")),
            ValueError,
            "losses of a whole batch.*microbatches=8",
        ),
        (lambda: compiled(loss=lambda y, p: keras.ops.mean(p - y)), ValueError, "each example"),
        (lambda: compiled(Halved(network().layers)), ValueError, "Halved overrides compute_loss,"),
        (lambda: compiled(network(layers.BatchNormalization())), RuntimeError, "groups"),
        (Own, TypeError, "Own has a train_step of its own"),
        (lambda: "model", TypeError, "must be a keras.Model"),
    ],
)
def test_what_cannot_be_measured_is_said(model, error, message):
    made = controller()
    batches = cabs_tensorflow.dataset(made, (X, LABELS))
    with pytest.raises(error, match=message):
        cabs_tensorflow.adaptive(model(), made).fit(batches, verbose=0)
    assert made.step == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": X}, TypeError, r"got ndarray; pass cabs_tensorflow.dataset\(controller, \(x, y\)\)"),
        ({"y": LABELS}, ValueError, "are for arrays"),
        ({"batch_size": 32}, ValueError, "are for arrays"),
        ({"validation_split": 0.1}, ValueError, "are for arrays"),
        ({"sample_weight": WEIGHTS}, ValueError, "are for arrays"),
        ({"steps_per_epoch": 3, "epochs": 9}, ValueError, "no batch in epoch"),
    ],
)
def test_what_fit_cannot_be_given_is_said(options, error, message):
    made = controller(48, 47, 48)
    model = cabs_tensorflow.adaptive(compiled(), made)
    source = tf.data.Dataset.from_tensor_slices((X, LABELS)).take(0 if len(options) == 2 else 96)
    batches = cabs_tensorflow.dataset(made, source)
    with pytest.raises(error, match=message):
        model.fit(**{"x": batches, "verbose": 0, **options})


@pytest.mark.parametrize(
    ("follow", "error", "message"),
    [
        ({"controller": 32}, TypeError, "must be a cabs.Controller"),
        ({"controller": cabs.Controller(16, every=2)}, ValueError, "leave every out"),
        ({"sample": 4, "microbatches": 2}, ValueError, "leave out microbatches"),
        ({"microbatches": 1}, ValueError, "microbatches must be at least 2"),
        ({"sample": 0}, ValueError, "sample must be at least 1"),
    ],
)
def test_what_cannot_be_followed_is_said(follow, error, message):
    with pytest.raises(error, match=message):
        cabs_tensorflow.adaptive(compiled(), **{"controller": controller(), **follow})


def test_a_model_without_a_controller_says_so():
    class Net(cabs_tensorflow.AdaptiveBatchSize, keras.Sequential):
        pass

    with pytest.raises(ValueError, match=r"call follow\(controller\) before fit"):
        compiled(Net(network().layers)).fit(cabs_tensorflow.dataset(8, (X, LABELS)))
