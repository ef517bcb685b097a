"""On a machine with a GPU: is it exact there, does it wait for the device, what does it cost.

    python tests/benchmarks/gpu_torch.py --json FILE

Statistics are held against a loop over the examples in double precision, host synchronisations in
a step are errors, and times are ratios of neighbouring steps by CUDA events. Ends with an error if
a statistic is wrong or a step waits for the device.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
from networks_torch import NETWORKS, Batch, batch
from rounds import describe, options, quartiles, write
from steps_torch import STEPS

import cabs_torch

PAIRS = 20
# Relative error that single precision may have, over networks of millions of parameters.
TOLERANCE = 1e-4


def loop(data: Batch, examples: int) -> float:
    """Return the sum of squared norms of the first examples' gradients, in double precision."""
    double = Batch(copy.deepcopy(data.model).double(), data.inputs.double(), data.targets)
    total = 0.0
    for index in range(examples):
        double.model.zero_grad()
        double.losses(slice(index, index + 1)).sum().backward()
        total += float(cabs_torch.mean_square(double.model.parameters()))
    return total


def error(data: Batch) -> float:
    """Return the relative error of the sum of squared norms over a few examples."""
    data.model.eval()
    examples = min(8, len(data.inputs))
    data.model.zero_grad()
    found = cabs_torch.backward(data.losses(slice(examples))).read().group_square_sum
    expected = loop(data, examples)
    data.model.train()
    return abs(found - expected) / expected


def waits(step: Callable[[], None]) -> str:
    """Return what a step waits for, or nothing."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as problem:
        return str(problem).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def seconds(step: Callable[[], None]) -> float:
    """Return the time of a step on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def peak(step: Callable[[], None]) -> int:
    """Return the peak memory of a step, in bytes."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> int:
    """Check, measure, print, and write; return how much is wrong."""
    chosen = options(__doc__)
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: torch.cuda.is_available() is False")
    result: dict[str, object] = {
        **describe(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
    }
    wrong = 0
    for name, network in NETWORKS.items():
        data, rows = batch(name, "cuda"), {}
        relative = error(data)
        wrong += relative > TOLERANCE
        print(f"{name}, m = {network.examples}: relative error {relative:.1e}")
        for label, (off, on) in STEPS.items():
            steps = (partial(off, data), partial(on, data))
            waiting = waits(steps[1])
            wrong += bool(waiting)
            for step in steps * 2:
                step()
            ratios = []
            for _ in range(PAIRS):
                one, other = seconds(steps[0]), seconds(steps[1])
                ratios.append(other / one)
            ratio, memory = quartiles(ratios), peak(steps[1]) / peak(steps[0])
            rows[label] = {"on : off": ratio, "memory, on : off": memory, "waits": waiting}
            print(
                f"  {label}: on : off {ratio['median']:.3f} ({ratio['lower']:.3f} to "
                f"{ratio['upper']:.3f}), memory {memory:.2f}, waits: {waiting or 'never'}"
            )
        result[name] = {"relative error": relative, **rows}
    write(chosen, result)
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
