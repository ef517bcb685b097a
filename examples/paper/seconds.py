"""Compares rules by time, on simulated clocks, with SGD, momentum and AdamW.

    python examples/paper/seconds.py --data-dir DIR --out RUNS
    python examples/paper/seconds.py --out QUICK --quick

A step of m examples takes h + m units of time, for four overheads h, so that no machine's noise is
in the comparison; what it costs to measure is not in it either. At some overheads, constant sizes
and the rule are also run with a learning rate that decays over the budget. A run is a line of
RUNS/seconds.jsonl; runs that are there are not made again. seconds_report.py judges what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import cabs
import cabs_torch
import networks
from pages import read, short
from problems import GPT, LENGTH, Images, Shape, Text

SMALLEST = 16
# Of the clock that is measured, a tenth of noise.
NOISE = 0.1
# From one look at the loss to the next, and over how many examples.
GROWTH, LOOKED_AT = 1.1, {4096: 2500, 1024: 1000}
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
# At the end of a method's name: the learning rate decays to 0 over the budget, as half a cosine.
COSINE = ", cosine"


class Comparison(NamedTuple):
    """What is compared on a problem."""

    # Time units of a run, for each overhead.
    budgets: dict[int, float]
    largest: int
    # Learning rates by optimizer.
    rates: dict[str, tuple[float, ...]]
    rules: tuple[str, ...]
    # The overheads at which rates decay, too, and the sizes that are then tried.
    decayed: tuple[int, ...] = ()
    decayed_sizes: tuple[int, ...] = ()

    @property
    def constants(self) -> list[str]:
        """The constant sizes."""
        sizes = (2**power for power in range(4, 13))
        return [f"constant {size}" for size in sizes if size <= self.largest]


# From a third of what is usually best to three times as much.
_DENSE = Comparison(
    {0: 100e3, 128: 400e3, 1024: 1.5e6, 8192: 6e6},
    4096,
    {"SGD": (0.03, 0.1, 0.3), "momentum": (0.004, 0.015, 0.05), "AdamW": (7e-4, 3e-3, 1e-2)},
    tuple(RULES),
)
_DECAYED = _DENSE._replace(decayed=(128, 1024), decayed_sizes=(64, 128, 256, 512))
# From a tenth to ten times as much, of SGD to three times: with ten, no constant size learns.
_WIDE = _DENSE._replace(
    rates={
        "SGD": (0.01, 0.03, 0.1, 0.3),
        "momentum": (0.0015, 0.004, 0.015, 0.05, 0.15),
        "AdamW": (3e-4, 7e-4, 3e-3, 1e-2, 3e-2),
    }
)
# Where an example costs a hundred times as much.
_SHORT = {0: 12e3, 128: 40e3, 1024: 150e3}
COMPARISONS = {
    "mnist": _DECAYED,
    "fashion-mnist": _WIDE,
    "cifar10": Comparison(
        _SHORT,
        1024,
        {"SGD": (0.15, 0.5), "momentum": (0.02, 0.05), "AdamW": (1e-3, 3e-3)},
        ("Progress", "CABS"),
    ),
    "tinyshakespeare": Comparison(
        _SHORT,
        1024,
        {"SGD": (0.3, 1.0), "momentum": (0.05, 0.15), "AdamW": (1e-3, 3e-3)},
        ("Progress", "CABS"),
    ),
    "digits": _DECAYED,
}
OPTIMIZERS = tuple(_DENSE.rates)


class Setting(NamedTuple):
    """What tells runs apart; without an overhead, a run is long enough for each."""

    problem: str
    optimizer: str
    rate: float
    method: str
    overhead: int | None
    seed: int


def settings(problems: Iterable[str], seeds: range) -> Iterator[Setting]:
    """Yield all runs, those that are compared together."""
    for problem, optimizer in product(problems, OPTIMIZERS):
        compared = COMPARISONS[problem]
        methods: list[tuple[str, int | None]] = [(one, None) for one in compared.constants]
        for rule in compared.rules:
            methods += [(rule, h) for h in ([None] if rule in BLIND else compared.budgets)]
        for name in (*(f"constant {size}" for size in compared.decayed_sizes), "Progress"):
            methods += [(name + COSINE, h) for h in compared.decayed]
        rates = compared.rates[optimizer]
        for rate, seed, (method, overhead) in product(rates, seeds, methods):
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


def train(setting: Setting, problem: Any, scale: float = 1.0) -> dict[str, Any]:
    """Train until every budget is spent; return the loss at growing times, as plain values."""
    torch.manual_seed(setting.seed)
    noise = random.Random(setting.seed)
    model = problem.network()
    optimizer = made(setting.optimizer, model, setting.rate)
    compared = COMPARISONS[setting.problem]
    sizes = cabs.BatchSizes.range(SMALLEST, compared.largest)
    name = setting.method.removesuffix(COSINE)
    decays = name != setting.method
    kind, _, size = name.partition(" ")
    controller = None
    if kind == "constant":
        method: Any = Constant(int(size))
    else:
        rule = RULES[name](setting.overhead or 0, setting.optimizer == "AdamW")
        method = controller = cabs.Controller(sizes=sizes, rule=rule)
    budgets = compared.budgets
    if setting.overhead is not None:
        budgets = {setting.overhead: budgets[setting.overhead]}
    # The bundled digits are fewer than the largest size.
    drop_last = problem.examples >= compared.largest
    sampler = cabs.BatchSampler(problem.examples, method, seed=setting.seed, drop_last=drop_last)
    shuffled = torch.Generator().manual_seed(setting.seed)
    curve: list[tuple[int, int, float | None]] = []
    steps = seen = 0
    look, share = 0.0, 0.0
    while share < scale:
        for indices in sampler:
            inputs, targets = problem.batch(indices, shuffled)
            losses = problem.losses(model(inputs), targets)
            optimizer.zero_grad()
            if decays:
                cosine = math.cos(math.pi * min(share / scale, 1.0))
                optimizer.param_groups[0]["lr"] = setting.rate * 0.5 * (1.0 + cosine)
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
            share = min((h * steps + seen) / budget for h, budget in budgets.items())
            if share >= look:
                loss = looked_at(model, problem, LOOKED_AT[compared.largest])
                curve.append((steps, seen, short(loss)))
                if not loss < DIVERGED:
                    return {**setting._asdict(), "curve": curve}
                look = max(share * GROWTH, 1e-3)
            if share >= scale:
                break
    last = looked_at(model, problem, LOOKED_AT[compared.largest])
    curve.append((steps, seen, short(last)))
    return {**setting._asdict(), "curve": curve}


@torch.no_grad()
def looked_at(model: nn.Module, problem: Any, count: int) -> float:
    """Return the mean loss over the last so many examples of the training set."""
    chosen = np.arange(max(problem.examples - count, 0), problem.examples)
    fixed = torch.Generator().manual_seed(0)
    parts = (problem.batch(some, fixed) for some in np.array_split(chosen, 5))
    found = [problem.losses(model(inputs), targets) for inputs, targets in parts]
    return float(torch.cat(found).double().mean())


class Dense(Images):
    """Images for a network with one hidden layer, small enough for some hundred runs."""

    def network(self) -> nn.Module:
        """Return a new network."""
        return networks.two_dense(self._train[0][0].numel())


class Convolutions(Images):
    """Crops for three convolutions."""

    def network(self) -> nn.Module:
        """Return a new network."""
        return networks.three_convolutions(self._train[0].shape[1])


class ShortText(Text):
    """Text for a smaller GPT."""

    def network(self) -> nn.Module:
        """Return a new network."""
        return GPT(Shape(self._characters, LENGTH, width=32, heads=2, layers=2))


def found(name: str, data_dir: Path | None) -> Any:
    """Return a problem by name."""
    if name == "tinyshakespeare":
        assert data_dir is not None
        return ShortText(data_dir / name / "input.txt", "cpu")
    return (Convolutions if name == "cifar10" else Dense)(name, data_dir, "cpu", 0.0)


def main() -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder that holds folders of files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--problems", nargs="+", choices=COMPARISONS, default=tuple(COMPARISONS)[:-1]
    )
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
    loaded = {name: found(name, options.data_dir) for name in problems}
    with path.open("a", encoding="utf-8") as file:
        for setting in tqdm(wanted, unit=" runs"):
            run = train(setting, loaded[setting.problem], 0.003 if options.quick else 1.0)
            file.write(json.dumps(run) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
