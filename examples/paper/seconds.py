"""Compares rules by time, on simulated clocks, with SGD, momentum and AdamW.

    python examples/paper/seconds.py --data-dir DIR --out RUNS
    python examples/paper/seconds.py --out QUICK --quick

A step of m examples takes h + m units of time, for four overheads h, so that no machine's noise is
in the comparison; what it costs to measure is not in it either. A run is a line of
RUNS/seconds.jsonl; runs that are there are not made again. seconds_report.py judges what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import cabs
import cabs_torch
import networks
from pages import read, short
from problems import Images

# Time units of a run, for each overhead.
BUDGETS = {0: 100e3, 128: 400e3, 1024: 1.5e6, 8192: 6e6}
CONSTANTS = tuple(2**power for power in range(4, 13))
SIZES = cabs.BatchSizes.range(CONSTANTS[0], CONSTANTS[-1])
# Learning rates by optimizer: from a third of what is usually best to three times as much.
RATES = {"SGD": (0.03, 0.1, 0.3), "momentum": (0.004, 0.015, 0.05), "AdamW": (7e-4, 3e-3, 1e-2)}
PROBLEMS = ("mnist", "fashion-mnist")
# Of the clock that is measured, a tenth of noise.
NOISE = 0.1
# From one look at the loss to the next, and over how many examples.
GROWTH, LOOKED_AT = 1.1, 2500
DIVERGED = 30.0

# The rules, given the overhead, and whether the optimizer divides by a second moment.
RULES: dict[str, Callable[[int, bool], Any]] = {
    "Progress": lambda overhead, adaptive: cabs.Progress(overhead, adaptive=adaptive),
    "Progress, measured": lambda _, adaptive: cabs.Progress(adaptive=adaptive),
    "CABS": lambda _, __: cabs.CABS(),
    "norm test 0.9": lambda _, __: cabs.NormTest(0.9),
}
# Those that ask for the same whatever a step costs.
BLIND = ("CABS", "norm test 0.9")


class Setting(NamedTuple):
    """What tells runs apart; without an overhead, a run is long enough for each."""

    problem: str
    optimizer: str
    rate: float
    method: str
    overhead: int | None
    seed: int


def settings(problems: tuple[str, ...], seeds: range) -> Iterator[Setting]:
    """Yield all runs, those that are compared together."""
    methods: list[tuple[str, int | None]]
    methods = [(f"constant {size}", None) for size in CONSTANTS]
    for rule in RULES:
        methods += [(rule, overhead) for overhead in ([None] if rule in BLIND else BUDGETS)]
    for problem, optimizer in product(problems, RATES):
        for rate, seed, (method, overhead) in product(RATES[optimizer], seeds, methods):
            yield Setting(problem, optimizer, rate, method, overhead, seed)


def made(name: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return an optimizer by name."""
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), rate)
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9 if name == "momentum" else 0.0)


class Constant:
    """Always as many examples."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size


def train(setting: Setting, problem: Images, scale: float = 1.0) -> dict[str, Any]:
    """Train until every budget is spent; return the loss at growing times, as plain values."""
    torch.manual_seed(setting.seed)
    noise = random.Random(setting.seed)
    model = problem.network()
    optimizer = made(setting.optimizer, model, setting.rate)
    kind, _, size = setting.method.partition(" ")
    controller = None
    if kind == "constant":
        method: Any = Constant(int(size))
    else:
        rule = RULES[setting.method](setting.overhead or 0, setting.optimizer == "AdamW")
        method = controller = cabs.Controller(SIZES.minimum, sizes=SIZES, rule=rule)
    overheads = (
        BUDGETS if setting.overhead is None else {setting.overhead: BUDGETS[setting.overhead]}
    )
    # The bundled digits are fewer than the largest size.
    drop_last = problem.examples >= SIZES.maximum
    sampler = cabs.BatchSampler(problem.examples, method, seed=setting.seed, drop_last=drop_last)
    shuffled = torch.Generator().manual_seed(setting.seed)
    curve: list[tuple[int, int, float | None]] = []
    steps = seen = 0
    look, share = 0.0, 0.0
    while share < scale:
        for indices in sampler:
            inputs, targets = problem.batch(indices, shuffled)
            losses = cross_entropy(model(inputs), targets, reduction="none")
            optimizer.zero_grad()
            if controller is None:
                losses.mean().backward()  # type: ignore[no-untyped-call]
            else:
                statistics = cabs_torch.backward(losses, optimizer=optimizer)
                seconds = (setting.overhead or 0) + len(indices)
                controller.update(
                    statistics,
                    learning_rate=cabs_torch.learning_rates(optimizer),
                    seconds=1e-5 * seconds * math.exp(NOISE * noise.gauss(0.0, 1.0)),
                )
            optimizer.step()
            steps, seen = steps + 1, seen + len(indices)
            # Until all budgets are spent; a budget that is, is cut off where runs are judged.
            share = min((h * steps + seen) / budget for h, budget in overheads.items())
            if share >= look:
                loss = looked_at(model, problem)
                curve.append((steps, seen, short(loss)))
                if not loss < DIVERGED:
                    return {**setting._asdict(), "curve": curve}
                look = max(share * GROWTH, 1e-3)
            if share >= scale:
                break
    curve.append((steps, seen, short(looked_at(model, problem))))
    return {**setting._asdict(), "curve": curve}


@torch.no_grad()
def looked_at(model: nn.Module, problem: Images) -> float:
    """Return the mean loss over the last examples of the training set."""
    images, labels = problem.last(LOOKED_AT)
    return float(cross_entropy(model(images), labels))


class Dense(Images):
    """Images for a network with one hidden layer, small enough for some hundred runs."""

    def network(self) -> nn.Module:
        """Return a new network."""
        return networks.two_dense(self._train[0][0].numel())

    def last(self, examples: int) -> tuple[Tensor, Tensor]:
        """Return the last examples of the training set."""
        images, labels = (part[-examples:] for part in self._train)
        return images, labels


def main() -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder that holds folders of files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="little of it, on bundled digits")
    options = parser.parse_args()
    if options.data_dir is None and not options.quick:
        parser.error("the study needs --data-dir, the folder that holds folders of files")
    torch.set_num_threads(1)
    problems = ("digits",) if options.quick else tuple(options.problems)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "seconds.jsonl"
    known = (
        {Setting(*(run[name] for name in Setting._fields)) for run in read(path)}
        if path.exists()
        else set()
    )
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    wanted = [one for one in settings(problems, seeds) if one not in known]
    found = {name: Dense(name, options.data_dir, "cpu", 0.0) for name in problems}
    with path.open("a", encoding="utf-8") as file:
        for setting in tqdm(wanted, unit=" runs"):
            run = train(setting, found[setting.problem], 0.003 if options.quick else 1.0)
            file.write(json.dumps(run) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
