"""On a machine with a GPU: is it exact there, does it wait for the device, what does it cost.

    python tests/benchmarks/gpu_torch.py --json FILE

Statistics are held against a loop over the examples in double precision, host synchronisations in
a step are errors, and times are ratios of neighbouring steps by CUDA events. What others take is
measured beside it, where they are installed. Ends with an error if a statistic is wrong or a step
waits for the device.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import networks_gpu
import torch
from networks_gpu import Half
from networks_torch import NETWORKS, Batch, batch
from rounds import describe, in_words, options, quartiles, write
from steps_torch import STEPS, full, plain

import cabs_torch

PAIRS = 20
# Relative error that single precision may have, over networks of millions of parameters.
TOLERANCE = 1e-4
# And that gradients computed in bfloat16 have themselves.
TOLERANCE_OF_HALF = 5e-2


def loop(data: Batch, examples: int) -> float:
    """Return the sum of squared norms of the first examples' gradients, in double precision."""
    inputs = data.inputs.double() if data.inputs.is_floating_point() else data.inputs
    double = Batch(copy.deepcopy(data.model).double(), inputs, data.targets, examples)
    total = 0.0
    for index in range(examples):
        double.model.zero_grad()
        double.losses(slice(index, index + 1)).sum().backward()
        total += float(cabs_torch.gradient_norm_squared(double.model.parameters()))
    return total


def error(data: Batch) -> float:
    """Return the relative error of the sum of squared norms over a few examples."""
    examples = min(4, len(data.inputs))
    data.model.zero_grad()
    found = cabs_torch.backward(data.losses(slice(examples))).read().group_square_sum
    expected = loop(data, examples)
    return abs(found - expected) / expected


def waits(step: Callable[[], object]) -> str:
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


def seconds(step: Callable[[], object]) -> float:
    """Return the time of a step on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def peak(step: Callable[[], object]) -> int:
    """Return the peak memory of a step, in bytes."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def pairs(plain_step: Callable[[], object], other: Callable[[], object]) -> dict[str, Any]:
    """Measure two steps in turns."""
    for step in (plain_step, other) * 2:
        step()
    ratios = []
    for _ in range(PAIRS):
        one, two = seconds(plain_step), seconds(other)
        ratios.append(two / one)
    memory = peak(other) / peak(plain_step)
    return {"on : off": quartiles(ratios), "memory, on : off": memory}


def ours(data: Batch) -> tuple[dict[str, Any], int]:
    """Measure this library's steps; return the rows, and how many wait for the device."""
    rows, waiting = {}, 0
    for label, (off, on) in STEPS.items():
        steps = partial(off, data), partial(on, data)
        why = waits(steps[1])
        waiting += bool(why)
        rows[label] = {**pairs(*steps), "waits": why}
        print(
            f"  {label}: {in_words(rows[label]['on : off'])}, memory "
            f"{rows[label]['memory, on : off']:.2f}, waits: {why or 'never'}"
        )
    return rows, waiting


def in_precision_of(data: Batch, step: Callable[[], object]) -> Callable[[], object]:
    """Return a step under autocast, if that is how the network is trained."""

    def run() -> None:
        with torch.autocast(
            data.inputs.device.type, torch.bfloat16, enabled=isinstance(data, Half)
        ):
            step()

    return run


def theirs(data: Batch) -> dict[str, Any]:
    """Measure what others take, as far as they are installed."""
    from peers_torch import PEERS, refusal

    rows: dict[str, Any] = {"cabs": pairs(partial(plain, data), partial(full, data))}
    for label, peer in PEERS.items():
        try:
            # In single precision, so that rounding does not count as an error.
            why = refusal(peer, Batch(*data))
            step = in_precision_of(data, peer(data)) if not why else None
            rows[label] = pairs(partial(plain, data), step) if step else {"refused": why}
        except ModuleNotFoundError as missing:
            rows[label] = {"refused": f"not measured: {missing.name} is not installed"}
        except torch.OutOfMemoryError:
            rows[label] = {"refused": "runs out of memory"}
        torch.cuda.empty_cache()
        print(f"  {label}: {rows[label]}")
    return rows


def main() -> int:
    """Check, measure, print, and write; return how much is wrong."""
    chosen = options(__doc__)
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: torch.cuda.is_available() is False")
    warnings.simplefilter("ignore")
    makers: dict[str, Callable[[str], Batch]] = {
        **{name: partial(batch, name) for name in NETWORKS},
        **networks_gpu.NETWORKS,
    }
    steps, peers, wrong = {}, {}, 0
    for name, make in makers.items():
        data = make("cuda")
        relative = error(data)
        wrong += relative > (TOLERANCE_OF_HALF if isinstance(data, Half) else TOLERANCE)
        print(f"{name}, m = {len(data.inputs)}: relative error {relative:.1e}")
        rows, waiting = ours(data)
        wrong += waiting
        steps[name] = {"relative error": relative, **rows}
        # What was measured is not lost if the time that the machine is lent for ends.
        described = {**describe(), "device": torch.cuda.get_device_name()}
        write(chosen, {**described, "networks": steps, "peers": peers})
        peers[name] = theirs(data)
        write(chosen, {**described, "networks": steps, "peers": peers})
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
