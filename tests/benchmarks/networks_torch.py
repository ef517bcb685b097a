"""The networks that are measured in PyTorch, each with a batch and its losses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, relu, scaled_dot_product_attention

LENGTH, WIDTH, LAYERS, HEADS, CHARACTERS = 128, 256, 4, 4, 65


class Network(NamedTuple):
    """What is measured."""

    examples: int
    sample: int
    """Over how many examples norms are taken where not over all."""
    input_shape: tuple[int, ...]
    pairs: int
    """How often on and off are measured in turns."""
    build: Callable[[], nn.Module]


def perceptron() -> nn.Module:
    """Return three matrices."""
    return nn.Sequential(
        *(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    )


def convolutions() -> nn.Module:
    """Return the network with which the paper learns CIFAR-10, on 24 x 24 crops."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Flatten(), nn.Linear(64 * 6 * 6, 384), nn.ReLU()),
        *(nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, 10)),
    )


class Residual(nn.Module):
    """Two convolutions, each normalized in groups, beside a way past them."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = 1 if before == width else 2
        self.inner = nn.Sequential(
            *(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.GroupNorm(8, width)),
            *(nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width)),
        )
        self.past = nn.Sequential()
        if stride == 2:
            self.past.append(nn.Conv2d(before, width, 1, stride, bias=False))
            self.past.append(nn.GroupNorm(8, width))

    def forward(self, h: Tensor) -> Tensor:
        """Map (m, before, s, s) to (m, width, s / stride, s / stride)."""
        return relu(self.inner(h) + self.past(h))


def residual() -> nn.Module:
    """Return a residual network of 20 layers for 32 x 32 images, normalized in groups."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Residual(*pair) for pair in pairwise(widths)]
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU(), *blocks),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


class Layer(nn.Module):
    """Attention to what came before, and two matrices, each on what was normalized."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.before_matrices = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Map (m, T, d) to the same."""
        qkv = self.qkv(self.before_attention(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.down(gelu(self.up(self.before_matrices(h))))


class GPT(nn.Module):
    """A transformer that scores the next character, with one table for inputs and outputs."""

    def __init__(self, layers: int, width: int, heads: int, length: int, characters: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(torch.randn(length, width) * width**-0.5)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.last = nn.LayerNorm(width, bias=False)
        nn.init.normal_(self.characters.weight, std=width**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (m, T) to scores, (m, T, characters)."""
        h = self.layers(self.characters(inputs) + self.positions)
        return linear(self.last(h), self.characters.weight)


NETWORKS = {
    "MLP": Network(256, 32, (784,), 41, perceptron),
    "CIFAR-10 network": Network(128, 32, (3, 24, 24), 15, convolutions),
    "ResNet-20, GroupNorm": Network(128, 32, (3, 32, 32), 9, residual),
    "GPT, tied": Network(
        16, 4, (LENGTH,), 15, lambda: GPT(LAYERS, WIDTH, HEADS, LENGTH, CHARACTERS)
    ),
}


class Batch(NamedTuple):
    """A network, and what it is trained on."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    sample: int
    """Over how many examples norms are taken where not over all."""

    def losses(self, part: slice = slice(None)) -> Tensor:
        """Return the losses of a part of the batch, shape (m,)."""
        return losses_of(self.model(self.inputs[part]), self.targets[part])


def losses_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the losses, (m,), from scores of classes, (m, C), or of characters, (m, T, C)."""
    losses = cross_entropy(scores.movedim(-1, 1), targets, reduction="none")
    return losses if losses.ndim == 1 else losses.mean(dim=1)


def text(examples: int, length: int, characters: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return characters, and those that follow them, both (m, T)."""
    drawn = torch.randint(characters, (examples, length + 1), device=device)
    return drawn[:, :-1], drawn[:, 1:]


def batch(name: str, device: str = "cpu") -> Batch:
    """Return a network by name, built with a fixed seed, and a batch of noise."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.build().to(device)
    if isinstance(model, GPT):
        return Batch(model, *text(network.examples, LENGTH, CHARACTERS, device), network.sample)
    inputs = torch.randn(network.examples, *network.input_shape, device=device)
    targets = torch.randint(10, (network.examples,), device=device)
    return Batch(model, inputs, targets, network.sample)
