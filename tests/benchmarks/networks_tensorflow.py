"""The networks that are measured in TensorFlow, as Keras models, each with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import layers

LENGTH, WIDTH, LAYERS, HEADS = 128, 256, 4, 4


class Network(NamedTuple):
    """What is measured."""

    examples: int
    input_shape: tuple[int, ...]
    pairs: int
    """How often on and off are measured in turns."""
    build: Callable[[Any], Any]
    """From an input to scores of ten classes."""


def perceptron(h: Any) -> Any:
    """Apply three matrices."""
    for _ in range(2):
        h = layers.Dense(1024, activation="relu")(h)
    return layers.Dense(10)(h)


def convolutions(h: Any) -> Any:
    """Apply the network with which the paper learns CIFAR-10, on 24 x 24 crops."""
    for _ in range(2):
        h = layers.Conv2D(64, 5, padding="same", activation="relu")(h)
        h = layers.MaxPooling2D(3, 2, padding="same")(h)
    h = layers.Flatten()(h)
    h = layers.Dense(384, activation="relu")(h)
    h = layers.Dense(192, activation="relu")(h)
    return layers.Dense(10)(h)


def encoder(hidden: int, dropout: float) -> Callable[[Any], Any]:
    """Return a transformer encoder, and a class for each sequence."""

    def build(h: Any) -> Any:
        for _ in range(LAYERS):
            seen = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, dropout=dropout)(h, h)
            h = layers.LayerNormalization()(h + layers.Dropout(dropout)(seen))
            inner = layers.Dense(WIDTH)(layers.Dense(hidden, activation="relu")(h))
            h = layers.LayerNormalization()(h + layers.Dropout(dropout)(inner))
        return layers.Dense(10)(layers.GlobalAveragePooling1D()(h))

    return build


NETWORKS = {
    "MLP 784-1024-1024-10": Network(256, (784,), 41, perceptron),
    "the paper's CIFAR-10 network": Network(128, (24, 24, 3), 15, convolutions),
    "transformer encoder, hidden width 2048, dropout": Network(
        16, (LENGTH, WIDTH), 9, encoder(hidden=2048, dropout=0.1)
    ),
    "transformer encoder, hidden width 1024, no dropout": Network(
        16, (LENGTH, WIDTH), 11, encoder(hidden=1024, dropout=0.0)
    ),
}


class Batch(NamedTuple):
    """A network, and what it is trained on."""

    model: Any
    inputs: Any
    targets: Any

    def losses(self, inputs: Any, targets: Any) -> Any:
        """Return the losses of a part of the batch, shape (m,)."""
        scores = self.model(inputs, training=True)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, scores)


def batch(name: str) -> Batch:
    """Return a network by name, built with a fixed seed, and a batch of noise."""
    keras.utils.set_random_seed(0)
    network = NETWORKS[name]
    given = keras.Input(network.input_shape)
    inputs = tf.random.normal((network.examples, *network.input_shape))
    targets = tf.random.uniform((network.examples,), maxval=10, dtype=tf.int32)
    return Batch(keras.Model(given, network.build(given)), inputs, targets)
