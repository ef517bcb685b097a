"""What an example needs of a framework: this much, and no more."""

from __future__ import annotations

import importlib
import os
from typing import Any, NamedTuple, Protocol

import cabs
from datasets import Images, Labels

BACKENDS = ("torch", "jax", "tensorflow", "numpy")
LANGUAGE_BACKENDS = ("torch", "jax", "tensorflow")


class Step(NamedTuple):
    """What one training step showed, in any framework."""

    # What an adapter returned, for the controller.
    statistics: Any
    accuracy: Any


class Whole(NamedTuple):
    """What ranks have together: the examples of a batch, and controllers that decide alike."""

    batch_size: int
    controller: cabs.Controller


class Trainer(Protocol):
    """A model and its gradient descent, in some framework."""

    def step(self, images: Images, labels: Labels, learning_rate: float, whole: Whole) -> Step:
        """Take one step on this rank's share of a batch."""
        ...

    def accuracy(self, images: Images, labels: Labels) -> float:
        """Return the share of images that are classified rightly."""
        ...


class Shape(NamedTuple):
    """The sizes of a language model."""

    characters: int
    length: int
    width: int
    heads: int
    layers: int


class LanguageTrainer(Protocol):
    """A language model and its gradient descent, in some framework."""

    def step(self, text: Labels, learning_rate: float) -> Step:
        """Take one step on a batch of texts, shape (m, length + 1)."""
        ...


def place(backend: str) -> tuple[int, int]:
    """Return this process's rank and how many there are, as ``torchrun`` says."""
    rank, ranks = (int(os.environ.get(name, value)) for name, value in _SAID_BY_TORCHRUN.items())
    if ranks > 1 and backend != "torch":
        raise SystemExit(f"several ranks need --backend torch, got --backend {backend}")
    return rank, ranks


_SAID_BY_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1"}


def trainer(backend: str, image_shape: tuple[int, ...], classes: int, seed: int) -> Trainer:
    """Return the trainer of a backend, from the module ``train_<backend>``."""
    made: Trainer = importlib.import_module(f"train_{backend}").Trainer(image_shape, classes, seed)
    return made


def language_trainer(backend: str, shape: Shape, seed: int) -> LanguageTrainer:
    """Return the trainer of a backend, from the module ``language_<backend>``."""
    made: LanguageTrainer = importlib.import_module(f"language_{backend}").Trainer(shape, seed)
    return made
