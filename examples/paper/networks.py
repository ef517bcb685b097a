"""The networks of the paper's study, in PyTorch.

The shapes are those of the authors' code; weights start as PyTorch's layers have them.
"""

from __future__ import annotations

from torch import nn


def two_dense(inputs: int) -> nn.Module:
    """Return a network with 64 hidden units, not of the paper: small enough for many runs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 10))


def three_convolutions(channels: int) -> nn.Module:
    """Return a network of three convolutions and a mean over places, as small."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def two_convolutions_and_two_dense(channels: int, side: int) -> nn.Module:
    """Return the network for MNIST and Fashion-MNIST, for square images of that side."""
    places = (side // 4) ** 2
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * places, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )


def two_convolutions_and_three_dense(channels: int, side: int) -> nn.Module:
    """Return the network for CIFAR-10, for square crops of that side."""
    places = (side // 4) ** 2
    return nn.Sequential(
        *(nn.Conv2d(channels, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Flatten(), nn.Linear(64 * places, 384), nn.ReLU()),
        *(nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, 10)),
    )
