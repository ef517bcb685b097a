"""A small GPT in TensorFlow, with tied embeddings: layers of Keras, in a loop of one's own.

Guarantees: the step is traced once, whatever the controller chooses.
"""

from __future__ import annotations

import numpy as np

import quiet
from training import Shape, Step

with quiet.loading():
    import keras
    import tensorflow as tf
    from keras import layers

    import cabs_tensorflow


def normalization() -> layers.Layer:
    """Return a layer norm; the epsilon of Keras would drown embeddings as small as these."""
    return layers.LayerNormalization(epsilon=1e-5)


class Block(layers.Layer):
    """Attention to what came before, and a small network at each position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = normalization(), normalization()
        self.attention = layers.MultiHeadAttention(heads, width // heads)
        self.up, self.down = layers.Dense(4 * width, activation="gelu"), layers.Dense(width)

    def call(self, hidden: tf.Tensor) -> tf.Tensor:
        """Map (m, T, width) to the same shape."""
        given = self.first(hidden)
        hidden += self.attention(given, given, use_causal_mask=True)
        return hidden + self.down(self.up(self.second(hidden)))


class GPT(keras.Model):
    """Predicts the next character; the table of characters is also the matrix at the end."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        normal = keras.initializers.RandomNormal(stddev=0.02)
        self.table = self.add_weight((shape.characters, shape.width), normal, name="characters")
        self.places = self.add_weight((shape.length, shape.width), normal, name="places")
        self.blocks = [Block(shape.width, shape.heads) for _ in range(shape.layers)]
        self.norm = normalization()

    def call(self, text: tf.Tensor) -> tf.Tensor:
        """Map (m, T) characters to (m, T, characters) scores of the next ones."""
        hidden = tf.gather(self.table, text) + self.places
        for block in self.blocks:
            hidden = block(hidden)
        return tf.matmul(self.norm(hidden), self.table, transpose_b=True)


class Trainer:
    """A GPT, trained by gradient descent."""

    def __init__(self, shape: Shape, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        self.model = GPT(shape)
        self.optimizer = keras.optimizers.SGD()
        text = tf.TensorSpec([None, shape.length + 1], tf.int64)
        self._traced = tf.function(self._step, input_signature=[text])

    def step(self, text: np.ndarray, learning_rate: float) -> Step:
        """Take one step on examples of shape (m, T + 1)."""
        self.optimizer.learning_rate = learning_rate
        return self._traced(text)

    def _step(self, text: tf.Tensor) -> Step:
        targets = text[:, 1:]
        with cabs_tensorflow.GradientTape() as tape:
            scores = self.model(text[:, :-1])
            each = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, scores)
            losses = tf.reduce_mean(each, axis=1)
        variables = self.model.trainable_variables
        gradients, statistics = tape.gradient(losses, variables)
        self.optimizer.apply(gradients, variables)
        accuracy = tf.reduce_mean(tf.cast(tf.argmax(scores, axis=2) == targets, tf.float32))
        return Step(statistics, accuracy)
