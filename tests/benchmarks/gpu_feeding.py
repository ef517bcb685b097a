"""On a machine with a GPU: are batches pinned, and does a step that ran out of memory go on.

    python tests/benchmarks/gpu_feeding.py --json FILE

Ends with an error if a batch is not pinned or not whole, or if the gradient of a batch that was
larger than the memory allowed is wrong.
"""

from __future__ import annotations

import sys
import warnings

import torch
from rounds import describe, options, write
from torch.utils.data import TensorDataset

import cabs
import cabs_torch

EXAMPLES, WIDTH = 64, 4 << 20
# Less than the whole batch takes, which is 1 GiB for each of several temporaries.
ALLOWED = 2 << 30


def is_fed_pinned() -> bool:
    """Return whether batches come in pinned memory, and every example once."""
    dataset = TensorDataset(torch.arange(1000), torch.randn(1000, 8))
    drawn: list[int] = []
    with cabs_torch.loader(
        dataset, 48, lag=1, num_workers=2, pin_memory=True, reseed=False
    ) as loader:
        for indices, inputs in loader:
            if not (indices.is_pinned() and inputs.is_pinned()):
                return False
            on_device = inputs.to("cuda", non_blocking=True)
            if not torch.equal(on_device.cpu(), dataset.tensors[1][indices]):
                return False
            drawn += indices.tolist()
    return sorted(drawn) == list(range(1000))


def cap_after_running_out(device: str) -> tuple[int, float]:
    """Return the cap that was found, and the relative error of the gradient."""
    weight = torch.linspace(-1.0, 1.0, WIDTH, device=device).requires_grad_()
    inputs = torch.randn(EXAMPLES, device=device)

    def step(pieces: list[torch.Tensor]) -> None:
        weight.grad = None
        for piece in pieces:
            losses = (weight * piece[:, None]).square().sum(dim=1)
            (losses.sum() / EXAMPLES).backward()

    cap = cabs.MemoryCap(EXAMPLES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        cap.run(step, inputs, out_of_memory=torch.OutOfMemoryError, release=torch.cuda.empty_cache)
    expected = 2.0 * weight.detach().double() * inputs.double().square().mean()
    assert weight.grad is not None
    error = (weight.grad.double() - expected).norm() / expected.norm()
    return cap.examples, float(error)


def main() -> int:
    """Check, print, and write; return how much is wrong."""
    chosen = options(__doc__)
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: torch.cuda.is_available() is False")
    pinned = is_fed_pinned()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, ALLOWED / total))
    cap, error = cap_after_running_out("cuda")
    print(f"batches are {'' if pinned else 'not '}pinned and whole")
    print(f"out of memory: the cap went from {EXAMPLES} to {cap}, relative error {error:.1e}")
    result: dict[str, object] = {
        **describe(),
        "device": torch.cuda.get_device_name(),
        "batches are pinned and whole": pinned,
        "cap after running out of memory": cap,
        "relative error": error,
    }
    write(chosen, result)
    return (not pinned) + (not cap < EXAMPLES) + (not error < 1e-5)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
