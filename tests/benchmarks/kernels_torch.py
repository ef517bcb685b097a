"""How many kernels statistics add to a step in PyTorch, on the way that a GPU takes.

    python tests/benchmarks/kernels_torch.py [--json FILE]

A count, not a time: every operation that is dispatched and is neither a view nor an allocation,
seen on a CPU, where values are not looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rounds import describe, kernels_added, options, write
from steps_torch import NETWORKS, STEPS, batch

sys.path.append(str(Path(__file__).parents[2]))

from tests.torch.dispatched import WAITING, as_on_a_device


def kernels(step: Callable[[], object]) -> tuple[int, int]:
    """Return how many kernels a step has, and how many of them would wait for the device."""
    step()
    with as_on_a_device() as counted:
        step()
    return counted.total(), sum(counted[name] for name in WAITING)


def main() -> None:
    """Count, print, and write."""
    chosen = options(__doc__)
    result = {}
    for name in NETWORKS:
        data = batch(name)
        parameters = len([*data.model.parameters()])
        plain, full = (kernels(partial(step, data)) for step in STEPS["exact"])
        result[name] = kernels_added(name, parameters, plain, full)
    write(chosen, {**describe(), "networks": result})


if __name__ == "__main__":
    main()
