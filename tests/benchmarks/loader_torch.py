"""What feeding changing sizes costs: batches a second, against a data loader of fixed sizes.

    python tests/benchmarks/loader_torch.py

Writes JSON with --json FILE. Epochs taken in turns, the start of workers included on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rounds import describe, measure, options, quartiles, write
from torch.nn.functional import pad
from torch.utils.data import DataLoader, TensorDataset

import cabs_torch

ROUNDS, EXAMPLES, SIZE = 9, 12_800, 128


class Augmented(torch.utils.data.Dataset[Any]):
    """Images that are flipped and moved at random, as the usual recipe for CIFAR-10 has it."""

    def __init__(self) -> None:
        self.images = torch.randint(256, (EXAMPLES, 3, 32, 32), dtype=torch.uint8)

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = pad(self.images[index].float(), (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        image = image[:, top : top + 32, left : left + 32]
        return image.flip(-1) if torch.rand(()) < 0.5 else image, index % 10


class Sizes:
    """Another size for each batch, between a half and one and a half times the usual."""

    asked = 0

    @property
    def batch_size(self) -> int:
        """The next one."""
        self.asked += 1
        return SIZE // 2 + self.asked * 37 % (SIZE + 1)


def theirs(dataset: Any, workers: int) -> Callable[[], None]:
    """Return an epoch of PyTorch's own."""
    loader = DataLoader(dataset, SIZE, shuffle=True, num_workers=workers)
    return lambda: through(loader)


def ours(dataset: Any, workers: int, **chosen: Any) -> Callable[[], None]:
    """Return an epoch of this library's."""
    loader = cabs_torch.loader(dataset, Sizes(), num_workers=workers, **chosen)
    return lambda: through(loader)


def through(loader: Any) -> None:
    """Iterate over an epoch."""
    for images, _ in loader:
        assert len(images)


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    torch.set_num_threads(1)
    result: dict[str, object] = {}
    tensors = TensorDataset(torch.randn(EXAMPLES, 3, 32, 32), torch.arange(EXAMPLES))
    for name, dataset in (("augmented images", Augmented()), ("tensors in memory", tensors)):
        for workers in (0, 1, 2):
            taken = measure(
                ROUNDS,
                theirs(dataset, workers),
                ours(dataset, workers),
                ours(dataset, workers, reseed=False),
            )
            base = taken[0]
            ratios = [[b / a for a, b in zip(base, one, strict=True)] for one in taken[1:]]
            found = {
                "examples a second, torch": quartiles([EXAMPLES / one for one in base]),
                "time, against torch": quartiles(ratios[0]),
                "time without reseeding, against torch": quartiles(ratios[1]),
            }
            result[f"{name}, {workers} workers"] = found
            print(
                f"{name}, {workers} workers: torch "
                f"{found['examples a second, torch']['median']:.3g} examples a second; time "
                f"{found['time, against torch']['median']:.2f} times torch's, without reseeding "
                f"{found['time without reseeding, against torch']['median']:.2f}"
            )
    write(chosen, {**describe(threads=1), "rows": result})


if __name__ == "__main__":
    main()
