"""The networks that are measured in JAX, each with parameters, a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

LENGTH, WIDTH, LAYERS, HEADS, CHARACTERS = 128, 256, 4, 4, 65


class Network(NamedTuple):
    """What is measured."""

    examples: int
    pairs: int
    """How often on and off are measured in turns."""
    parameters: Callable[[], Any]
    loss: Callable[[Any, Any], Array]
    batch: Callable[[int], Any]


class _Draw:
    """Draws arrays, each with a key of its own."""

    def __init__(self, seed: int) -> None:
        self.key = jax.random.key(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Array:
        self.key, key = jax.random.split(self.key)
        return scale * jax.random.normal(key, shape)

    def integers(self, *shape: int, below: int) -> Array:
        self.key, key = jax.random.split(self.key)
        return jax.random.randint(key, shape, 0, below)


def _cross_entropy(logits: Array, label: Array) -> Array:
    return -jax.nn.log_softmax(logits)[label]


def _matrices(draw: _Draw, *widths: int) -> list[dict[str, Array]]:
    return [{"w": draw(a, b, scale=a**-0.5), "b": jnp.zeros(b)} for a, b in pairwise(widths)]


def _dense(layers: list[dict[str, Array]], h: Array) -> Array:
    for layer in layers[:-1]:
        h = jax.nn.relu(h @ layer["w"] + layer["b"])
    return h @ layers[-1]["w"] + layers[-1]["b"]


def _perceptron_loss(parameters: Any, example: Any) -> Array:
    return _cross_entropy(_dense(parameters, example["x"]), example["y"])


def _images(draw: _Draw) -> dict[str, Any]:
    return {
        "kernels": [draw(5, 5, 3, 64, scale=75**-0.5), draw(5, 5, 64, 64, scale=1600**-0.5)],
        "biases": [jnp.zeros(64), jnp.zeros(64)],
        "dense": _matrices(draw, 64 * 36, 384, 192, 10),
    }


def _images_loss(parameters: Any, example: Any) -> Array:
    h = example["x"][None]
    for kernel, bias in zip(parameters["kernels"], parameters["biases"], strict=True):
        layout = ("NHWC", "HWIO", "NHWC")
        h = lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=layout)
        h = jax.nn.relu(h + bias)
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    return _cross_entropy(_dense(parameters["dense"], h.reshape(-1)), example["y"])


def _language(draw: _Draw) -> dict[str, Any]:
    scale = WIDTH**-0.5
    return {
        "characters": draw(CHARACTERS, WIDTH, scale=scale),
        "positions": draw(LENGTH, WIDTH, scale=scale),
        "layers": {
            "qkv": draw(LAYERS, WIDTH, 3, HEADS, WIDTH // HEADS, scale=scale),
            "out": draw(LAYERS, HEADS, WIDTH // HEADS, WIDTH, scale=scale),
            "up": draw(LAYERS, WIDTH, 4 * WIDTH, scale=scale),
            "down": draw(LAYERS, 4 * WIDTH, WIDTH, scale=scale / 2),
            "up_bias": jnp.zeros((LAYERS, 4 * WIDTH)),
            "down_bias": jnp.zeros((LAYERS, WIDTH)),
            "scales": jnp.ones((LAYERS, 2, WIDTH)),
        },
        "scale": jnp.ones(WIDTH),
    }


def _normalized(h: Array, scale: Array) -> Array:
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-5) * scale


def _layer(h: Array, layer: Any) -> tuple[Array, None]:
    q, k, v = jnp.einsum("td,dchk->chtk", _normalized(h, layer["scales"][0]), layer["qkv"])
    scores = jnp.einsum("htk,hsk->hts", q, k) * (WIDTH // HEADS) ** -0.5
    scores = jnp.where(jnp.tri(len(h), dtype=bool), scores, -1e9)
    mixed = jnp.einsum("hts,hsk->htk", jax.nn.softmax(scores), v)
    h = h + jnp.einsum("htk,hkd->td", mixed, layer["out"])
    inner = _normalized(h, layer["scales"][1]) @ layer["up"] + layer["up_bias"]
    return h + jax.nn.gelu(inner) @ layer["down"] + layer["down_bias"], None


def _language_loss(parameters: Any, example: Any, unroll: bool = False) -> Array:
    h = parameters["characters"][example["x"]] + parameters["positions"]
    h, _ = lax.scan(_layer, h, parameters["layers"], unroll=unroll)
    logits = _normalized(h, parameters["scale"]) @ parameters["characters"].T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), example["y"][:, None], axis=1)
    return -jnp.mean(chosen)


def _labelled(*shape: int) -> Callable[[int], Any]:
    def batch(examples: int) -> Any:
        draw = _Draw(1)
        return {"x": draw(examples, *shape), "y": draw.integers(examples, below=10)}

    return batch


def _text(examples: int) -> Any:
    draw = _Draw(1)
    drawn = draw.integers(examples, LENGTH + 1, below=CHARACTERS)
    return {"x": drawn[:, :-1], "y": drawn[:, 1:]}


NETWORKS = {
    "MLP 784-1024-1024-10": Network(
        256, 41, lambda: _matrices(_Draw(0), 784, 1024, 1024, 10), _perceptron_loss, _labelled(784)
    ),
    "the paper's CIFAR-10 network": Network(
        128, 11, lambda: _images(_Draw(0)), _images_loss, _labelled(24, 24, 3)
    ),
    "GPT, 4 layers in a scan, d = 256, T = 128": Network(
        16, 11, lambda: _language(_Draw(0)), _language_loss, _text
    ),
    "GPT, the same 4 layers one after the other": Network(
        16,
        11,
        lambda: _language(_Draw(0)),
        lambda parameters, example: _language_loss(parameters, example, unroll=True),
        _text,
    ),
}
