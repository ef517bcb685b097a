"""Masks of outputs and classes that are ignored: the gradient of fit is that of Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import cabs
import cabs_tensorflow

RANDOM = np.random.default_rng(0)
EXAMPLES, LENGTH, WORDS = 12, 7, 9
# Sentences of 1 to 7 words, the rest of which is padded.
LENGTHS = np.arange(EXAMPLES) % LENGTH + 1
IS_WORD = np.arange(LENGTH)[None] < LENGTHS[:, None]
IDS = np.where(IS_WORD, RANDOM.integers(1, WORDS, (EXAMPLES, LENGTH)), 0)
NEXT = np.roll(IDS, -1, axis=1)
WEIGHTS = RANDOM.uniform(0.2, 2.0, size=(EXAMPLES, LENGTH)).astype(np.float32)
IGNORED = np.where(RANDOM.uniform(size=NEXT.shape) < 0.3, -1, NEXT)
IGNORED[5] = -1


def cross_entropy(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def language_model(loss=None, *, mask_zero=True, dtype="float32"):
    """Return a compiled model of words, the same one every time."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(WORDS, 4, mask_zero=mask_zero, dtype=dtype),
            layers.Dense(WORDS, dtype=dtype),
        ]
    )
    model.compile(keras.optimizers.SGD(1.0), cross_entropy() if loss is None else loss)
    return model


def moved(model, x, y, sample_weight=None):
    """Return the loss of a step, and how far it moved the weights: the gradient."""
    before = model.get_weights()
    loss = model.train_on_batch(x, y, sample_weight, return_dict=True)["loss"]
    after = model.get_weights()
    parts = [np.ravel(a - b) for a, b in zip(before, after, strict=True)]
    return float(loss), np.concatenate(parts)


def followed(model, **options):
    made = cabs.Controller(EXAMPLES, sizes=[EXAMPLES])
    return cabs_tensorflow.adaptive(model, made, **options)


def assert_trained_as_by_keras(make, x, y, sample_weight=None, **options):
    loss, gradient = moved(make(), x, y, sample_weight)
    found_loss, found = moved(followed(make(), **options), x, y, sample_weight)
    assert np.linalg.norm(gradient) > 1e-3
    np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-6)
    assert found_loss == pytest.approx(loss, rel=1e-6)


def assert_variance_is_that_of_examples(make, counted, x, y, sample_weight=None):
    """Compare with a loop over batches of one, whose loss Keras divides by what each counts."""
    model, rows, losses = make(), [], []
    for index in range(len(x)):
        one = [None if array is None else array[[index]] for array in (x, y, sample_weight)]
        with tf.GradientTape() as tape:
            y_pred = model(one[0], training=True)
            loss = model.compute_loss(x=one[0], y=one[1], y_pred=y_pred, sample_weight=one[2])
        gradients = tape.gradient(loss, model.trainable_variables)
        own = counted[index] * len(x) / sum(counted)
        dense = [np.ravel(tf.convert_to_tensor(g)).astype(np.float64) for g in gradients]
        rows.append(own * np.concatenate(dense))
        losses.append(own * float(loss))
    model = followed(make())
    model.train_on_batch(x, y, sample_weight)
    seen = model.decision.observation
    assert seen.loss == pytest.approx(np.mean(losses), rel=1e-5)
    trace = np.var(rows, axis=0, ddof=1).sum()
    assert seen.variance_trace[0] == pytest.approx(trace, rel=1e-4)


OPTIONS = pytest.mark.parametrize("options", [{}, {"microbatches": 3}], ids=["exact", "groups"])
PLACES = pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])


@OPTIONS
@PLACES
def test_masked_positions_count_nothing_as_in_keras(weights, options):
    assert_trained_as_by_keras(language_model, IDS, NEXT, weights, **options)


@PLACES
def test_the_loss_of_a_masked_example_is_its_sum_over_its_share_of_all_positions(weights):
    assert_variance_is_that_of_examples(language_model, LENGTHS, IDS, NEXT, weights)


def ignoring(**options):
    return language_model(cross_entropy(ignore_class=-1), **options)


@OPTIONS
@PLACES
@pytest.mark.parametrize("mask_zero", [False, True])
def test_a_class_that_is_ignored_counts_nothing_as_in_keras(mask_zero, weights, options):
    assert_trained_as_by_keras(
        lambda: ignoring(mask_zero=mask_zero), IDS, IGNORED, weights, **options
    )


def test_the_variance_leaves_out_what_is_ignored():
    counted = ((IGNORED != -1) & IS_WORD).sum(axis=1)
    assert 0 in counted
    assert_variance_is_that_of_examples(ignoring, counted, IDS, IGNORED)


def test_a_class_that_is_ignored_now_and_then_is_measured_at_every_step():
    labels = NEXT.copy()
    labels[7, 0] = -1
    made = cabs.Controller(4, sizes=[4])
    model = cabs_tensorflow.adaptive(ignoring(mask_zero=False), made)
    plain = ignoring(mask_zero=False)
    batches = cabs_tensorflow.dataset(made, (IDS, labels), shuffle=False)
    model.fit(batches, epochs=3, verbose=0)
    plain.fit(IDS, labels, batch_size=4, shuffle=False, epochs=3, verbose=0)
    assert made.step == 9
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@OPTIONS
def test_a_batch_of_nothing_but_padding_moves_nothing(options):
    model = followed(language_model(), **options)
    loss, gradient = moved(model, np.zeros_like(IDS), NEXT)
    assert loss == 0.0
    assert not gradient.any()


@OPTIONS
def test_outputs_with_masks_of_their_own_are_weighted_as_in_keras(options):
    def make():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((LENGTH,), dtype="int32")
        hidden = layers.Embedding(WORDS, 4, mask_zero=True)(inputs)
        words = layers.Dense(WORDS, name="words")(hidden)
        topic = layers.Dense(3, kernel_regularizer="l2", name="topic")(
            layers.GlobalAveragePooling1D()(hidden)
        )
        model = keras.Model(inputs, [words, topic])
        losses = [cross_entropy(ignore_class=-1), cross_entropy()]
        model.compile(keras.optimizers.SGD(1.0), losses, loss_weights=[0.7, 2.0])
        return model

    assert_trained_as_by_keras(make, IDS, [IGNORED, LENGTHS % 3], **options)


def test_masks_are_honoured_in_a_trace_for_all_sizes():
    made = cabs.Controller(4, sizes=cabs.BatchSizes.range(3, 5))
    model = cabs_tensorflow.adaptive(language_model(), made)
    plain = language_model()
    batches = cabs_tensorflow.dataset(made, (IDS, NEXT), shuffle=False)
    sizes = []

    class Keep:
        def write(self, decision, *, examples):
            assert decision is not None
            sizes.append(examples)

    model.follow(made, log=Keep())
    model.fit(batches, epochs=4, verbose=0)
    assert len(set(sizes)) > 1
    at = 0
    for size in sizes:
        plain.train_on_batch(IDS[at : at + size], NEXT[at : at + size])
        at = (at + size) % EXAMPLES
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_groups_of_a_masked_recurrent_network_have_the_gradient_of_the_batch():
    def make():
        keras.utils.set_random_seed(1)
        words = [keras.Input((LENGTH,), dtype="int32"), layers.Embedding(WORDS, 4, mask_zero=True)]
        model = keras.Sequential(
            [*words, layers.LSTM(5, return_sequences=True), layers.Dense(WORDS)]
        )
        model.compile(keras.optimizers.SGD(1.0), cross_entropy())
        return model

    assert_trained_as_by_keras(make, IDS, NEXT, microbatches=4)


class Counting(keras.layers.Layer):
    """Counts its calls, in training and out of it."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.calls.assign_add(1.0)
        return inputs


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (lambda: layers.Dropout(0.7, noise_shape=(None, LENGTH, 1)), "depends on .*Random"),
        (lambda: layers.Dense(4), "depends on ReadVariableOp"),
        (Counting, "a layer changes a variable in it"),
    ],
    ids=["dropped", "learned", "counted"],
)
def test_groups_with_masks_that_training_changes_are_refused_before_anything_moves(first, message):
    keras.utils.set_random_seed(1)
    inputs = np.random.default_rng(0).normal(size=(EXAMPLES, LENGTH, 4)).astype("float32")
    masking = [layers.Masking(), first()] if first is Counting else [first(), layers.Masking()]
    model = keras.Sequential([keras.Input((LENGTH, 4)), *masking, layers.Dense(WORDS)])
    model.compile(keras.optimizers.SGD(1.0), cross_entropy())
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        followed(model, microbatches=2).train_on_batch(inputs, NEXT)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_mask_that_would_meet_another_examples_values_is_refused_before_anything_moves():
    def make():
        keras.utils.set_random_seed(1)
        words = [keras.Input((LENGTH,), dtype="int32"), layers.Embedding(WORDS, 4, mask_zero=True)]
        model = keras.Sequential([*words, layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1.0), "mse")
        return model

    model = followed(make())
    before = model.get_weights()
    # As many examples as positions, with which Keras broadcasts one along the other.
    with pytest.raises(ValueError, match="those of one example meet another"):
        model.train_on_batch(IDS[:LENGTH], NEXT[:LENGTH].astype(np.float32))
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(model.optimizer.iterations) == 0
