"""The networks that are measured on a GPU alone, since they would take minutes elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from networks_torch import GPT, Batch, text
from torch import Tensor, nn
from torch.nn.functional import relu


class Half(Batch):
    """A network that is trained in bfloat16 under autocast."""

    def losses(self, part: slice = slice(None)) -> Tensor:
        """Return the losses of a part of the batch, shape (m,)."""
        with torch.autocast(self.inputs.device.type, torch.bfloat16):
            return super().losses(part)


class Bottleneck(nn.Module):
    """Three convolutions, narrow in the middle, beside a way past them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.inner = nn.Sequential(
            *(nn.Conv2d(before, width, 1, bias=False), nn.GroupNorm(32, width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.GroupNorm(32, width)),
            *(nn.ReLU(), nn.Conv2d(width, after, 1, bias=False), nn.GroupNorm(32, after)),
        )
        self.past = nn.Sequential()
        if before != after:
            self.past.append(nn.Conv2d(before, after, 1, stride, bias=False))
            self.past.append(nn.GroupNorm(32, after))

    def forward(self, h: Tensor) -> Tensor:
        """Map (m, before, s, s) to (m, 4 width, s / stride, s / stride)."""
        return relu(self.inner(h) + self.past(h))


def resnet_50() -> nn.Module:
    """Return a residual network of 50 layers for images of 224 x 224, normalized in groups."""
    blocks: list[nn.Module] = []
    before = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for place in range(count):
            blocks.append(Bottleneck(before, width, 2 if place == 0 and width > 64 else 1))
            before = 4 * width
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(32, 64), nn.ReLU()),
        *(nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(2048, 1000),
    )


def images(device: str, examples: int = 64) -> Batch:
    """Return ResNet-50, and a batch of noise."""
    inputs = torch.randn(examples, 3, 224, 224, device=device)
    targets = torch.randint(1000, (examples,), device=device)
    return Batch(resnet_50().to(device), inputs, targets, examples // 4)


def language(device: str, examples: int = 8) -> Batch:
    """Return a GPT of 12 layers, and a batch of noise."""
    model = GPT(12, 768, 12, 1024, 50_304).to(device)
    return Half(model, *text(examples, 1024, 50_304, device), examples // 4)


NETWORKS: dict[str, Callable[[str], Batch]] = {
    "ResNet-50, GroupNorm": images,
    "GPT, 12 layers, d = 768, T = 1024, bfloat16": language,
}
