"""A small convolutional network in TensorFlow: layers of Keras, in a loop of one's own.

Guarantees: the step is traced once, whatever the controller chooses.
"""

from __future__ import annotations

import quiet
from datasets import Images, Labels
from training import Step, Whole

with quiet.loading():
    import keras
    import tensorflow as tf

    import cabs_tensorflow


class Trainer:
    """Two convolutions and a matrix, trained by gradient descent."""

    def __init__(self, image_shape: tuple[int, ...], classes: int, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        channels, height, width = image_shape
        self.model = keras.Sequential(
            [
                # On a CPU, TensorFlow convolves with the channels last only.
                keras.Input((height, width, channels)),
                keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
                keras.layers.MaxPooling2D(),
                keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
                keras.layers.MaxPooling2D(),
                keras.layers.Flatten(),
                keras.layers.Dense(classes),
            ]
        )
        self.optimizer = keras.optimizers.SGD()
        images = tf.TensorSpec([None, *image_shape], tf.float32)
        labels = tf.TensorSpec([None], tf.int64)
        self._traced = tf.function(self._step, input_signature=[images, labels])
        self._scores = tf.function(self._forward, input_signature=[images])

    def step(self, images: Images, labels: Labels, learning_rate: float, whole: Whole) -> Step:
        """Take one step of gradient descent."""
        del whole  # All of it is here, and one controller.
        self.optimizer.learning_rate = learning_rate
        return self._traced(images, labels)

    def accuracy(self, images: Images, labels: Labels) -> float:
        """Return the share of images that are classified rightly."""
        right = 0
        for start in range(0, len(images), 1000):
            outputs = self._scores(images[start : start + 1000]).numpy()
            right += int((outputs.argmax(axis=1) == labels[start : start + 1000]).sum())
        return right / len(images)

    def _forward(self, images: tf.Tensor) -> tf.Tensor:
        return self.model(tf.transpose(images, [0, 2, 3, 1]))

    def _step(self, images: tf.Tensor, labels: tf.Tensor) -> Step:
        with cabs_tensorflow.GradientTape() as tape:
            outputs = self._forward(images)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, outputs)
        variables = self.model.trainable_variables
        gradients, statistics = tape.gradient(losses, variables)
        self.optimizer.apply(gradients, variables)
        accuracy = tf.reduce_mean(tf.cast(tf.argmax(outputs, axis=1) == labels, tf.float32))
        return Step(statistics, accuracy)
