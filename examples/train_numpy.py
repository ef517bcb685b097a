"""Softmax regression in NumPy, its gradients written out: any training loop will do."""

from __future__ import annotations

import numpy as np

import cabs
from datasets import Images, Labels
from training import Step, Whole


class Trainer:
    """A linear classifier, trained by gradient descent."""

    def __init__(self, image_shape: tuple[int, ...], classes: int, seed: int) -> None:
        del seed  # Nothing is random: the weights start at zero.
        self.weight = np.zeros((int(np.prod(image_shape)), classes))
        self.bias = np.zeros(classes)

    def step(self, images: Images, labels: Labels, learning_rate: float, whole: Whole) -> Step:
        """Take one step of gradient descent."""
        del whole  # All of it is here, and one controller.
        inputs = images.reshape(len(images), -1)
        probabilities = self._probabilities(inputs)
        losses = -np.log(probabilities[np.arange(len(labels)), labels] + 1e-300)
        accuracy = float(np.mean(probabilities.argmax(axis=1) == labels))

        # The gradient of example i is the outer product of (x_i, 1) and this row.
        errors = probabilities
        errors[np.arange(len(labels)), labels] -= 1.0
        weight_gradient = inputs.T @ errors / len(inputs)
        bias_gradient = errors.mean(axis=0)
        example_squares = ((inputs**2).sum(axis=1) + 1.0) * (errors**2).sum(axis=1)
        statistics = cabs.GradientStatistics(
            examples=len(inputs),
            groups=len(inputs),
            group_square_sum=float(example_squares.sum()),
            gradient_norm_squared=float((weight_gradient**2).sum() + (bias_gradient**2).sum()),
            loss=float(losses.mean()),
        )
        self.weight -= learning_rate * weight_gradient
        self.bias -= learning_rate * bias_gradient
        return Step(statistics, accuracy)

    def accuracy(self, images: Images, labels: Labels) -> float:
        """Return the share of images that are classified rightly."""
        predicted = self._probabilities(images.reshape(len(images), -1)).argmax(axis=1)
        return float(np.mean(predicted == labels))

    def _probabilities(self, inputs: Images) -> np.ndarray:
        logits = inputs @ self.weight + self.bias
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)
