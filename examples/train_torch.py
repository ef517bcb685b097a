"""A small convolutional network in PyTorch."""

from __future__ import annotations

import os

import torch
from torch import nn

import cabs_torch
from datasets import Images, Labels
from training import Step, Whole


class Trainer:
    """Two convolutions and a matrix, trained by gradient descent."""

    def __init__(self, image_shape: tuple[int, ...], classes: int, seed: int) -> None:
        torch.manual_seed(seed)
        channels, height, width = image_shape
        self.model = nn.Sequential(
            nn.Conv2d(channels, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), classes),
        )
        # torchrun has started several ranks, each with a share of every batch.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            torch.distributed.init_process_group("gloo")
            self.trained: nn.Module = nn.parallel.DistributedDataParallel(self.model)
        else:
            self.trained = self.model
        self.optimizer = torch.optim.SGD(self.model.parameters())

    def step(self, images: Images, labels: Labels, learning_rate: float, whole: Whole) -> Step:
        """Take one step of gradient descent."""
        targets = torch.from_numpy(labels)
        outputs = self.trained(torch.from_numpy(images))
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")

        self.optimizer.zero_grad()
        statistics = cabs_torch.backward(
            losses, batch_size=whole.batch_size, controller=whole.controller
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        accuracy = (outputs.argmax(dim=1) == targets).float().mean()
        return Step(statistics, accuracy)

    @torch.no_grad()
    def accuracy(self, images: Images, labels: Labels) -> float:
        """Return the share of images that are classified rightly."""
        right = 0
        for start in range(0, len(images), 1000):
            outputs = self.model(torch.from_numpy(images[start : start + 1000]))
            right += int((outputs.argmax(dim=1).numpy() == labels[start : start + 1000]).sum())
        return right / len(images)
