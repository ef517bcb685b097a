"""A small GPT in JAX, with tied embeddings, and its layers stacked in a scan."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import cabs
import cabs_jax
from training import Shape, Step

# The step is compiled once for each of these sizes, whatever the controller chooses.
GRID = cabs.BatchSizes.geometric(4, 512)


def normalized(hidden: Array, norm: Any) -> Array:
    """Shift and scale each row to what the norm says."""
    hidden = hidden - jnp.mean(hidden, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(hidden), axis=-1, keepdims=True)
    return hidden * lax.rsqrt(variance + 1e-5) * norm["scale"] + norm["shift"]


def block(heads: int, hidden: Array, layer: Any) -> tuple[Array, None]:
    """Attend to what came before, and run a small network at each position; (T, width)."""
    length, width = hidden.shape
    packed = normalized(hidden, layer["first"]) @ layer["query_key_value"]
    query, key, value = packed.reshape(length, 3, heads, -1).transpose(1, 0, 2, 3)
    seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    hidden = hidden + seen.reshape(length, width) @ layer["out"]
    inner = jax.nn.gelu(normalized(hidden, layer["second"]) @ layer["up"] + layer["up_bias"])
    return hidden + inner @ layer["down"] + layer["down_bias"], None


def loss_and_hits(heads: int, parameters: Any, text: Array) -> tuple[Array, Array]:
    """Return the loss of one example, shape (T + 1,), and the share of characters guessed."""
    hidden = parameters["characters"][text[:-1]] + parameters["places"]
    hidden, _ = lax.scan(partial(block, heads), hidden, parameters["layers"])
    # The table of characters is also the matrix at the end.
    scores = normalized(hidden, parameters["norm"]) @ parameters["characters"].T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), text[1:, None], axis=1)
    return -jnp.mean(chosen), jnp.mean(scores.argmax(axis=1) == text[1:])


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(
    heads: int, parameters: Any, text: Array, mask: Array, learning_rate: float
) -> tuple[Any, Step]:
    """Take one step of gradient descent on a padded batch."""
    measured = cabs_jax.value_and_grad(partial(loss_and_hits, heads), has_aux=True)
    (_, statistics, hits), gradients = measured(parameters, text, mask=mask)
    parameters = jax.tree.map(lambda p, g: p - learning_rate * g, parameters, gradients)
    return parameters, Step(statistics, jnp.mean(hits, where=mask))


class Trainer:
    """A GPT, trained by gradient descent."""

    def __init__(self, shape: Shape, seed: int) -> None:
        keys = iter(jax.random.split(jax.random.key(seed), 6))
        width, layers = shape.width, shape.layers

        def matrix(*sizes: int) -> Array:
            return jax.random.normal(next(keys), sizes) * sizes[-2] ** -0.5

        def norm(*sizes: int) -> dict[str, Array]:
            return {"scale": jnp.ones((*sizes, width)), "shift": jnp.zeros((*sizes, width))}

        self.heads = shape.heads
        self.parameters = {
            "characters": 0.02 * jax.random.normal(next(keys), (shape.characters, width)),
            "places": 0.02 * jax.random.normal(next(keys), (shape.length, width)),
            "layers": {
                "first": norm(layers),
                "query_key_value": matrix(layers, width, 3 * width),
                "out": matrix(layers, width, width),
                "second": norm(layers),
                "up": matrix(layers, width, 4 * width),
                "up_bias": jnp.zeros((layers, 4 * width)),
                "down": matrix(layers, 4 * width, width),
                "down_bias": jnp.zeros((layers, width)),
            },
            "norm": norm(),
        }

    def step(self, text: np.ndarray, learning_rate: float) -> Step:
        """Take one step on examples of shape (m, T + 1)."""
        batch, mask = cabs_jax.pad(text, GRID)
        self.parameters, taken = step(self.heads, self.parameters, batch, mask, learning_rate)
        return taken
