"""A Keras model is trained by fit as ever: epochs, callbacks, files, and what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import cabs
import cabs_tensorflow
from tests.tensorflow.fitted import (
    LABELS,
    TOP_TWO,
    WEIGHTS,
    X,
    compiled,
    controller,
    fitted,
    network,
)


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
