"""What statistics add to a training step in PyTorch, forward and backward, on two threads.

    python tests/benchmarks/steps_torch.py

Writes JSON with --json FILE.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rounds import describe, measure, options, quartiles, write
from torch import nn
from torch.nn.functional import cross_entropy

import cabs_torch

# Name, batch size, shape of an input, pairs of rounds, network.
NETWORKS: dict[str, tuple[int, tuple[int, ...], int, Callable[[], nn.Module]]] = {
    "MLP 784-1024-1024-10": (
        256,
        (784,),
        31,
        lambda: nn.Sequential(
            nn.Linear(784, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, 10),
        ),
    ),
    "the paper's CIFAR-10 network": (
        128,
        (3, 24, 24),
        15,
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            *(nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            *(nn.Flatten(), nn.Linear(64 * 6 * 6, 384), nn.ReLU()),
            *(nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, 10)),
        ),
    ),
}


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    result: dict[str, object] = {**describe(), "torch": torch.__version__}
    for name, (examples, shape, pairs, build) in NETWORKS.items():
        model, inputs = build(), torch.randn(examples, *shape)
        targets = torch.randint(10, (examples,))

        def losses(
            model: nn.Module = model,
            inputs: torch.Tensor = inputs,
            targets: torch.Tensor = targets,
        ) -> torch.Tensor:
            model.zero_grad()
            return cross_entropy(model(inputs), targets, reduction="none")

        off, on = measure(
            pairs,
            lambda losses=losses: losses().mean().backward(),
            lambda losses=losses: cabs_torch.backward(losses()),
        )
        ratio = quartiles([b / a for a, b in zip(off, on, strict=True)])
        result[name] = {"on : off": ratio, "milliseconds off": quartiles([1e3 * a for a in off])}
        print(
            f"{name}, m = {examples}: on : off {ratio['median']:.3f} "
            f"({ratio['lower']:.3f} to {ratio['upper']:.3f})"
        )
    write(chosen, result)


if __name__ == "__main__":
    main()
