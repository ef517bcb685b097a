"""What is wrong is said first, and briefly, however large a model is."""

import keras
import pytest
import tensorflow as tf

import cabs_tensorflow
from tests.tensorflow.reference import draw, measured, variable


def layers_of(count):
    return [variable(seed, 4, 4, name=f"weight_{seed}") for seed in range(count)]


def said(losses_of, variables, batch):
    with pytest.raises(cabs_tensorflow.UncoveredParameterError) as caught:
        measured(losses_of, variables, tf.constant(batch))
    # AutoGraph says first where in the code of the user it is.
    return str(caught.value).split("UncoveredParameterError: ")[-1]


def through(weights, x):
    for weight in weights:
        x = tf.tanh(x @ weight)
    return x


@pytest.mark.parametrize("count", [1, 3, 4, 40])
def test_the_reason_comes_first_then_three_names_and_how_many_more(count):
    weights = layers_of(count)
    found = said(
        lambda x: tf.reduce_sum(tf.cumsum(through(weights, x), axis=0), axis=1),
        weights,
        draw(1, 5, 4),
    )
    assert found.startswith("Cumsum (operation 'Cumsum') runs along the axis that holds the")
    assert ("; behind it lies variable" in found) == (count == 1)
    assert [f"'weight_{at}'" in found for at in range(count)] == [at < 3 for at in range(count)]
    assert (f" and {count - 3} more. Estimate the variance from groups" in found) == (count > 3)


@pytest.mark.parametrize("count", [2, 30])
def test_what_is_wrong_with_the_whole_function_comes_first_too(count):
    weights = layers_of(count)
    found = said(
        lambda x: tf.map_fn(lambda row: tf.reduce_sum(through(weights, row[None])), x),
        weights,
        draw(1, 5, 4),
    )
    assert found.startswith("the function cannot be measured by examples: ")
    assert "a loop or a branch" in found
    assert (f"and {count - 3} more" in found) == (count > 3)


def test_the_message_of_a_large_model_fits_on_a_screen():
    blocks = [
        layer
        for _ in range(60)
        for layer in (keras.layers.Dense(4), keras.layers.BatchNormalization())
    ]
    model = keras.Sequential([keras.Input((4,)), *blocks])
    found = said(
        lambda x: tf.reduce_sum(model(x, training=True), axis=1),
        model.trainable_variables,
        draw(0, 6, 4, dtype="float32"),
    )
    assert len(found) < 700
