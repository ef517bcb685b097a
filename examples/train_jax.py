"""A small convolutional network in JAX: the loss of one example, and a jitted step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import cabs
import cabs_jax
from datasets import Images, Labels
from training import Step, Whole

# The step is compiled once for each of these sizes, whatever the controller chooses.
GRID = cabs.BatchSizes.geometric(16, 2048)


def scores(parameters: Any, image: Array) -> Array:
    """Map an image (channels, height, width) to a score for each class."""
    hidden = image[None]
    for layer in parameters["convolutions"]:
        hidden = lax.conv(hidden, layer["kernel"], (1, 1), "SAME") + layer["bias"][:, None, None]
        hidden = jax.nn.relu(hidden)
        hidden = lax.reduce_window(hidden, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return hidden.reshape(-1) @ parameters["out"]["kernel"] + parameters["out"]["bias"]


def loss_and_hit(parameters: Any, example: Any) -> tuple[Array, Array]:
    """Return the loss of one example, and whether it is classified rightly."""
    found = scores(parameters, example["image"])
    return -jax.nn.log_softmax(found)[example["label"]], found.argmax() == example["label"]


@jax.jit
def step(parameters: Any, batch: Any, mask: Array, learning_rate: float) -> tuple[Any, Step]:
    """Take one step of gradient descent on a padded batch."""
    measured = cabs_jax.value_and_grad(loss_and_hit, has_aux=True)
    (_, statistics, hits), gradients = measured(parameters, batch, mask=mask)
    parameters = jax.tree.map(lambda p, g: p - learning_rate * g, parameters, gradients)
    return parameters, Step(statistics, jnp.mean(hits, where=mask))


class Trainer:
    """Two convolutions and a matrix, trained by gradient descent."""

    def __init__(self, image_shape: tuple[int, ...], classes: int, seed: int) -> None:
        channels, height, width = image_shape
        keys = jax.random.split(jax.random.key(seed), 3)
        uniform = jax.nn.initializers.he_uniform
        kernel = uniform(in_axis=1, out_axis=0)
        flat = 32 * (height // 4) * (width // 4)
        self.parameters = {
            "convolutions": [
                {"kernel": kernel(keys[0], (16, channels, 3, 3)), "bias": jnp.zeros(16)},
                {"kernel": kernel(keys[1], (32, 16, 3, 3)), "bias": jnp.zeros(32)},
            ],
            "out": {"kernel": uniform()(keys[2], (flat, classes)), "bias": jnp.zeros(classes)},
        }

    def step(self, images: Images, labels: Labels, learning_rate: float, whole: Whole) -> Step:
        """Take one step of gradient descent."""
        del whole  # All of it is here, and one controller.
        batch, mask = cabs_jax.pad({"image": images, "label": labels}, GRID)
        self.parameters, taken = step(self.parameters, batch, mask, learning_rate)
        return taken

    def accuracy(self, images: Images, labels: Labels) -> float:
        """Return the share of images that are classified rightly."""
        predict = jax.jit(jax.vmap(lambda image: scores(self.parameters, image).argmax()))
        right = 0
        for start in range(0, len(images), 1000):
            part = slice(start, start + 1000)
            right += int((predict(images[part]) == labels[part]).sum())
        return right / len(images)
