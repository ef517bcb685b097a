"""The problems of the study: examples, a network for them, and its losses.

Guarantees: images are standardised; crops of CIFAR-10 are 24 wide, at a random place and flipped or
not where it is trained, in the middle where it is tested; every run measures its final loss on the
same examples of the training set.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import networks

# What the other examples read and train.
sys.path.append(str(Path(__file__).parents[1]))
from datasets import load
from language_torch import GPT
from shakespeare import windows
from training import Shape

IMAGES = ("mnist", "fashion-mnist", "cifar10", "digits")
# Side of the crops of CIFAR-10's images.
CROP = 24
# How many examples a final loss and a final accuracy are taken over, and an accuracy on the way.
FINAL, ON_THE_WAY = 3000, 500
# The share of a label that all classes have together, and characters in an example of text.
SMOOTHED, LENGTH = 0.1, 32


class Problem(Protocol):
    """What a run is trained on."""

    examples: int

    def network(self) -> nn.Module:
        """Return a new network."""

    def batch(self, indices: npt.NDArray[np.int64], random: torch.Generator) -> tuple[Tensor, Any]:
        """Return inputs and targets of these examples, on the device."""

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return one loss for each example."""

    def final_loss(self, model: nn.Module) -> float:
        """Return the mean loss over fixed examples of the training set."""

    def accuracy(self, model: nn.Module, examples: int) -> float:
        """Return the share of so many examples of the test set that is classified rightly."""


def problem(name: str, data_dir: Path | None, device: str) -> Problem:
    """Return a problem by name: a data set's, ``... smoothed``, or ``tinyshakespeare``."""
    if name == "tinyshakespeare":
        if data_dir is None:
            raise SystemExit(f"{name} needs --data-dir, the folder that holds its folder")
        return Text(data_dir / name / "input.txt", device)
    data, _, smoothed = name.partition(" ")
    return Images(data, data_dir, device, SMOOTHED if smoothed else 0.0)


class Images:
    """Classification of images by the authors' networks."""

    def __init__(self, name: str, data_dir: Path | None, device: str, smoothing: float) -> None:
        data = load(name, data_dir and data_dir / name)
        self.examples = len(data.train_labels)
        self._device, self._smoothing = device, smoothing
        self._is_cropped = name == "cifar10"
        self._train = (torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels))
        self._test = (torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels))

    def network(self) -> nn.Module:
        """Return a new network."""
        channels, side = self._train[0].shape[1:3]
        made = (
            networks.two_convolutions_and_three_dense(channels, CROP)
            if self._is_cropped
            else networks.two_convolutions_and_two_dense(channels, side)
        )
        return made.to(self._device, memory_format=torch.channels_last)

    def batch(
        self, indices: npt.NDArray[np.int64], random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return images and labels."""
        chosen = torch.from_numpy(indices)
        images, labels = (part[chosen] for part in self._train)
        if self._is_cropped:
            images = cropped(images, random)
        return self._placed(images), labels.to(self._device)

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropies."""
        return cross_entropy(scores, targets, reduction="none", label_smoothing=self._smoothing)

    def final_loss(self, model: nn.Module) -> float:
        """Return the mean loss over the first examples of the training set."""
        parts = [
            self.losses(scores, labels).double() for scores, labels in self._run(model, self._train)
        ]
        return float(torch.cat(parts).mean())

    def accuracy(self, model: nn.Module, examples: int) -> float:
        """Return the share that is classified rightly."""
        parts = [
            scores.argmax(dim=1) == labels
            for scores, labels in self._run(model, [part[:examples] for part in self._test])
        ]
        return float(torch.cat(parts).double().mean())

    @torch.no_grad()
    def _run(self, model: nn.Module, data: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(*(part[:FINAL].split(500) for part in data), strict=True):
            edge = (images.shape[-1] - CROP) // 2 if self._is_cropped else 0
            middle = images[:, :, edge : images.shape[2] - edge, edge : images.shape[3] - edge]
            yield model(self._placed(middle)), labels.to(self._device)

    def _placed(self, images: Tensor) -> Tensor:
        return images.to(self._device).contiguous(memory_format=torch.channels_last)


def cropped(images: Tensor, random: torch.Generator) -> Tensor:
    """Return a crop of each image, shape (n, channels, CROP, CROP), flipped or not."""
    places = torch.randint(images.shape[-1] - CROP + 1, (2, len(images)), generator=random)
    rows, columns = (place[:, None] + torch.arange(CROP) for place in places)
    is_flipped = torch.rand(len(images), generator=random) < 0.5
    columns = torch.where(is_flipped[:, None], columns.flip(1), columns)
    examples = torch.arange(len(images))[:, None, None, None]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return images[examples, channels, rows[:, None, :, None], columns[:, None, None, :]]


class Text:
    """Prediction of the next character by a small GPT; an example is a stretch of text."""

    def __init__(self, path: Path, device: str) -> None:
        examples, self._characters = windows(path, LENGTH)
        codes = torch.from_numpy(examples)
        # The last tenth is for testing.
        self.examples = len(codes) * 9 // 10
        self._train, self._test = codes[: self.examples], codes[self.examples :]
        self._device = device

    def network(self) -> nn.Module:
        """Return a new network."""
        return GPT(Shape(self._characters, LENGTH, width=96, heads=4, layers=2)).to(self._device)

    def batch(
        self,
        indices: npt.NDArray[np.int64],
        random: torch.Generator,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Return texts, and what follows each of their characters."""
        codes = self._train[torch.from_numpy(indices)].to(self._device)
        return codes[:, :-1], codes[:, 1:]

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy over the characters of each example."""
        return cross_entropy(scores.mT, targets, reduction="none").mean(dim=1)

    @torch.no_grad()
    def final_loss(self, model: nn.Module) -> float:
        """Return the mean loss over the first texts of the training set."""
        codes = self._train[:FINAL].to(self._device)
        parts = [self.losses(model(one[:, :-1]), one[:, 1:]).double() for one in codes.split(500)]
        return float(torch.cat(parts).mean())

    @torch.no_grad()
    def accuracy(self, model: nn.Module, examples: int) -> float:
        """Return the share of characters that are predicted rightly."""
        codes = self._test[:examples].to(self._device)
        parts = [(model(one[:, :-1]).argmax(2) == one[:, 1:]).double() for one in codes.split(500)]
        return float(torch.cat(parts).mean())
