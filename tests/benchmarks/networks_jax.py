"""The networks that are measured in JAX, each with parameters, a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

LENGTH, WIDTH, LAYERS, HEADS, CHARACTERS = 128, 256, 4, 4, 65
# In which the residual network's channels are normalized.
GROUPS = 8


class Network(NamedTuple):
    """What is measured."""

    examples: int
    sample: int
    """Over how many examples norms are taken where not over all."""
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


def _perceptron(draw: _Draw) -> list[dict[str, Array]]:
    return _matrices(draw, 784, 1024, 1024, 10)


def _perceptron_loss(parameters: Any, example: Any) -> Array:
    return _cross_entropy(_dense(parameters, example["x"]), example["y"])


def _convolved(h: Array, kernel: Array, stride: int = 1) -> Array:
    layout, margin = ("NHWC", "HWIO", "NHWC"), kernel.shape[0] // 2
    padding = [(margin, margin)] * 2
    return lax.conv_general_dilated(h, kernel, (stride,) * 2, padding, dimension_numbers=layout)


def _images(draw: _Draw) -> dict[str, Any]:
    return {
        "kernels": [draw(5, 5, 3, 64, scale=75**-0.5), draw(5, 5, 64, 64, scale=1600**-0.5)],
        "biases": [jnp.zeros(64), jnp.zeros(64)],
        "dense": _matrices(draw, 64 * 36, 384, 192, 10),
    }


def _images_loss(parameters: Any, example: Any) -> Array:
    h = example["x"][None]
    for kernel, bias in zip(parameters["kernels"], parameters["biases"], strict=True):
        h = jax.nn.relu(_convolved(h, kernel) + bias)
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    return _cross_entropy(_dense(parameters["dense"], h.reshape(-1)), example["y"])


def _standardized(h: Array, axes: int | tuple[int, ...] = -1) -> Array:
    h = h - jnp.mean(h, axis=axes, keepdims=True)
    return h * lax.rsqrt(jnp.mean(jnp.square(h), axis=axes, keepdims=True) + 1e-5)


def _convolution(draw: _Draw, size: int, before: int, width: int) -> dict[str, Array]:
    kernel = draw(size, size, before, width, scale=(2.0 / (size**2 * before)) ** 0.5)
    return {"kernel": kernel, "scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _convolved_and_normalized(h: Array, layer: dict[str, Array], stride: int = 1) -> Array:
    h = _convolved(h, layer["kernel"], stride)
    groups = _standardized(h.reshape(*h.shape[:3], GROUPS, -1), (1, 2, 4))
    return groups.reshape(h.shape) * layer["scale"] + layer["bias"]


def _residual(draw: _Draw) -> dict[str, Any]:
    blocks = []
    for before, width in pairwise([16] * 4 + [32] * 3 + [64] * 3):
        inner = [_convolution(draw, 3, before, width), _convolution(draw, 3, width, width)]
        past = [_convolution(draw, 1, before, width)] if before != width else []
        blocks.append({"inner": inner, "past": past})
    return {
        "first": _convolution(draw, 3, 3, 16),
        "blocks": blocks,
        "dense": _matrices(draw, 64, 10),
    }


def _block(h: Array, block: dict[str, list[dict[str, Array]]]) -> Array:
    (first, second), stride = block["inner"], 2 if block["past"] else 1
    inner = jax.nn.relu(_convolved_and_normalized(h, first, stride))
    for layer in block["past"]:
        h = _convolved_and_normalized(h, layer, stride)
    return jax.nn.relu(_convolved_and_normalized(inner, second) + h)


def _residual_loss(parameters: Any, example: Any) -> Array:
    h = jax.nn.relu(_convolved_and_normalized(example["x"][None], parameters["first"]))
    for block in parameters["blocks"]:
        h = _block(h, block)
    return _cross_entropy(_dense(parameters["dense"], jnp.mean(h, axis=(0, 1, 2))), example["y"])


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


def _layer(h: Array, layer: Any) -> tuple[Array, None]:
    q, k, v = jnp.einsum("td,dchk->chtk", _standardized(h) * layer["scales"][0], layer["qkv"])
    scores = jnp.einsum("htk,hsk->hts", q, k) * (WIDTH // HEADS) ** -0.5
    scores = jnp.where(jnp.tri(len(h), dtype=bool), scores, -1e9)
    mixed = jnp.einsum("hts,hsk->htk", jax.nn.softmax(scores), v)
    h = h + jnp.einsum("htk,hkd->td", mixed, layer["out"])
    inner = (_standardized(h) * layer["scales"][1]) @ layer["up"] + layer["up_bias"]
    return h + jax.nn.gelu(inner, approximate=False) @ layer["down"] + layer["down_bias"], None


def _language_loss(parameters: Any, example: Any) -> Array:
    h = parameters["characters"][example["x"]] + parameters["positions"]
    h, _ = lax.scan(_layer, h, parameters["layers"])
    logits = (_standardized(h) * parameters["scale"]) @ parameters["characters"].T
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
    "MLP": Network(256, 32, 41, lambda: _perceptron(_Draw(0)), _perceptron_loss, _labelled(784)),
    "CIFAR-10 network": Network(
        128, 32, 15, lambda: _images(_Draw(0)), _images_loss, _labelled(24, 24, 3)
    ),
    "ResNet-20, GroupNorm": Network(
        128, 32, 9, lambda: _residual(_Draw(0)), _residual_loss, _labelled(32, 32, 3)
    ),
    "GPT, tied": Network(16, 4, 15, lambda: _language(_Draw(0)), _language_loss, _text),
}
