"""The networks that are measured in TensorFlow, as Keras models, each with a batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import layers

LENGTH, WIDTH, LAYERS, HEADS, CHARACTERS = 128, 256, 4, 4, 65


class Network(NamedTuple):
    """What is measured."""

    examples: int
    sample: int
    """Over how many examples norms are taken where not over all."""
    pairs: int
    """How often on and off are measured in turns."""
    draw: Callable[[int], tuple[Any, Any]]
    """From a number of examples to inputs and targets."""
    build: Callable[[Any], Any]
    """From inputs to scores."""


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


def normalized(h: Any, width: int, size: int, stride: int = 1) -> Any:
    """Apply a convolution without a bias, and normalize in groups."""
    h = layers.Conv2D(width, size, stride, padding="same", use_bias=False)(h)
    return layers.GroupNormalization(groups=8)(h)


def block(h: Any, before: int, width: int) -> Any:
    """Apply two convolutions, each normalized in groups, beside a way past them."""
    stride = 1 if before == width else 2
    inner = layers.ReLU()(normalized(h, width, 3, stride))
    inner = normalized(inner, width, 3)
    past = h if stride == 1 else normalized(h, width, 1, stride)
    return layers.ReLU()(inner + past)


def residual(h: Any) -> Any:
    """Apply a residual network of 20 layers for 32 x 32 images, normalized in groups."""
    h = layers.ReLU()(normalized(h, 16, 3))
    for pair in pairwise([16] * 4 + [32] * 3 + [64] * 3):
        h = block(h, *pair)
    return layers.Dense(10)(layers.GlobalAveragePooling2D()(h))


class Layer(layers.Layer):
    """Attention to what came before, and two matrices, each on what was normalized."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention = layers.LayerNormalization(center=False)
        self.attention = layers.MultiHeadAttention(heads, width // heads, use_bias=False)
        self.before_matrices = layers.LayerNormalization(center=False)
        self.up = layers.Dense(4 * width, activation="gelu")
        self.down = layers.Dense(width)

    def call(self, h: Any) -> Any:
        """Map (m, T, d) to the same."""
        seen = self.before_attention(h)
        h = h + self.attention(seen, seen, use_causal_mask=True)
        return h + self.down(self.up(self.before_matrices(h)))


class GPT(layers.Layer):
    """A transformer that scores the next character, with one table for inputs and outputs."""

    def __init__(self, count: int, width: int, heads: int, length: int, characters: int) -> None:
        super().__init__()
        normal = keras.initializers.RandomNormal(stddev=width**-0.5)
        self.characters = layers.Embedding(characters, width, embeddings_initializer=normal)
        self.positions = self.add_weight(shape=(length, width), initializer=normal)
        self.inner = [Layer(width, heads) for _ in range(count)]
        self.last = layers.LayerNormalization(center=False)

    def call(self, inputs: Any) -> Any:
        """Map (m, T) to scores, (m, T, characters)."""
        h = self.characters(inputs) + self.positions
        for layer in self.inner:
            h = layer(h)
        return tf.matmul(self.last(h), self.characters.embeddings, transpose_b=True)


def transformer(inputs: Any) -> Any:
    """Apply a transformer to characters."""
    return GPT(LAYERS, WIDTH, HEADS, LENGTH, CHARACTERS)(inputs)


def images(*shape: int) -> Callable[[int], tuple[Any, Any]]:
    """Return what draws noise of a shape, and classes."""

    def draw(examples: int) -> tuple[Any, Any]:
        targets = tf.random.uniform((examples,), maxval=10, dtype=tf.int32)
        return tf.random.normal((examples, *shape)), targets

    return draw


def text(examples: int) -> tuple[Any, Any]:
    """Return characters, and those that follow them, both (m, T)."""
    drawn = tf.random.uniform((examples, LENGTH + 1), maxval=CHARACTERS, dtype=tf.int32)
    return drawn[:, :-1], drawn[:, 1:]


NETWORKS = {
    "MLP": Network(256, 32, 41, images(784), perceptron),
    "CIFAR-10 network": Network(128, 32, 15, images(24, 24, 3), convolutions),
    "ResNet-20, GroupNorm": Network(128, 32, 9, images(32, 32, 3), residual),
    "GPT, tied": Network(16, 4, 15, text, transformer),
}


class Batch(NamedTuple):
    """A network, and what it is trained on."""

    model: Any
    inputs: Any
    targets: Any
    sample: int
    """Over how many examples norms are taken where not over all."""

    def losses(self, inputs: Any, targets: Any) -> Any:
        """Return the losses of a part of the batch, shape (m,)."""
        scores = self.model(inputs, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, scores)
        return losses if losses.shape.rank == 1 else tf.reduce_mean(losses, axis=1)


def batch(name: str) -> Batch:
    """Return a network by name, built with a fixed seed, and a batch of noise."""
    keras.utils.set_random_seed(0)
    network = NETWORKS[name]
    inputs, targets = network.draw(network.examples)
    given = keras.Input(inputs.shape[1:], dtype=inputs.dtype)
    return Batch(keras.Model(given, network.build(given)), inputs, targets, network.sample)
