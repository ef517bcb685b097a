"""The networks that are measured, each with a batch and its losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Network(NamedTuple):
    """What is measured."""

    examples: int
    input_shape: tuple[int, ...]
    pairs: int
    """How often on and off are measured in turns."""
    build: Callable[[], nn.Module]


class Sentences(nn.Module):
    """A transformer encoder as PyTorch makes it, and a class for each sentence."""

    def __init__(self, dropout: float, hidden: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            256, 4, dim_feedforward=hidden, dropout=dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (m, T, 256) to (m, 10)."""
        return self.head(self.encoder(inputs).mean(dim=1))


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


NETWORKS = {
    "MLP 784-1024-1024-10": Network(256, (784,), 41, perceptron),
    "the paper's CIFAR-10 network": Network(128, (3, 24, 24), 15, convolutions),
    "transformer encoder, as PyTorch makes it": Network(
        16, (128, 256), 9, lambda: Sentences(dropout=0.1, hidden=2048)
    ),
    "transformer encoder, hidden width 1024, no dropout": Network(
        16, (128, 256), 11, lambda: Sentences(dropout=0.0, hidden=1024)
    ),
}


class Batch(NamedTuple):
    """A network, and what it is trained on."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def losses(self, part: slice = slice(None)) -> Tensor:
        """Return the losses of a part of the batch, shape (m,)."""
        return cross_entropy(self.model(self.inputs[part]), self.targets[part], reduction="none")


def batch(name: str, device: str = "cpu") -> Batch:
    """Return a network by name, built with a fixed seed, and a batch of noise."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    inputs = torch.randn(network.examples, *network.input_shape, device=device)
    targets = torch.randint(10, (network.examples,), device=device)
    return Batch(network.build().to(device), inputs, targets)
