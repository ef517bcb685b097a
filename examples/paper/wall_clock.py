"""Compares rules by the seconds of this machine, statistics and exploration included.

    python examples/paper/wall_clock.py --data-dir DIR --out RUNS
    python examples/paper/wall_clock.py --out QUICK --quick

Nothing else should run meanwhile. Every run has as many seconds of training; looks at the loss are
left out. The order of the runs is drawn, so that a machine that becomes slower slows all methods. A
run is a line of RUNS/wall_clock.jsonl; runs that are there are not made again. RUNS/wall-clock.inc
says how long each method takes to the losses that the best constant size has after a quarter and a
half of the time; that size is chosen on one seed and compared with on the other.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import cabs
import cabs_torch
from pages import Vector, read, short, table
from seconds import Constant, found, looked_at, made
from seconds_report import mean

RATES = {"SGD": 0.1, "momentum": 0.015, "AdamW": 3e-3}
SIZES = (16, 32, 64, 128, 256, 512, 1024)
# The rule, and after how many steps the variance is measured.
RULES = {"Progress": 1, "Progress, every 10": 10}
METHODS = (*(f"constant {size}" for size in SIZES), *RULES)
SHARES = (1 / 4, 1 / 2)
LOOKED_AT = 2500
GROWTH = 1.05

# By method: by seed: seconds, and the least loss until then.
Curves = dict[str, dict[int, tuple[Vector, Vector]]]


def train(problem: Any, optimizer_name: str, method: str, seed: int, budget: float) -> list[Any]:
    """Train for so many seconds; return steps, examples, seconds and loss at growing times."""
    torch.manual_seed(seed)
    model = problem.network()
    optimizer = made(optimizer_name, model, RATES[optimizer_name])
    watch, controller = cabs.Stopwatch(), None
    if method in RULES:
        rule = cabs.Progress(adaptive=optimizer_name == "AdamW")
        sizes = cabs.BatchSizes.range(SIZES[0], SIZES[-1])
        controller = cabs.Controller(sizes=sizes, rule=rule, every=RULES[method])
    sized = controller or Constant(int(method.split()[1]))
    sampler = cabs.BatchSampler(problem.examples, sized, seed=seed)
    shuffled = torch.Generator().manual_seed(seed)
    curve: list[Any] = []
    steps = seen = 0
    spent, look = 0.0, budget / 100
    while True:
        start = time.perf_counter()
        for indices in sampler:
            inputs, targets = problem.batch(indices, shuffled)
            losses = problem.losses(model(inputs), targets)
            optimizer.zero_grad()
            statistics = None
            if controller is not None and controller.due:
                statistics = cabs_torch.backward(losses, optimizer=optimizer)
            else:
                losses.mean().backward()
            optimizer.step()
            if controller is not None:
                rates = cabs_torch.learning_rates(optimizer)
                loss = None if statistics is not None else losses.detach().mean()
                controller.update(statistics, learning_rate=rates, loss=loss, seconds=watch)
            steps, seen = steps + 1, seen + len(indices)
            now = spent + time.perf_counter() - start
            if now >= look:
                with watch.left_out():
                    loss = looked_at(model, problem, min(LOOKED_AT, problem.examples))
                    curve.append((steps, seen, short(now), short(loss)))
                if now >= budget:
                    return curve
                spent, start, look = now, time.perf_counter(), now * GROWTH
        spent += time.perf_counter() - start


def reached(curve: tuple[Vector, Vector], loss: float) -> float:
    """Return after how many seconds a loss is reached; at the end where it is not."""
    seconds, losses = curve
    below = np.nonzero(losses <= loss)[0]
    return float(seconds[below[0]] if len(below) else seconds[-1])


def times_of(curves: Curves) -> dict[str, list[float]]:
    """Return each method's times, as ratios to those of the best constant size."""
    constants = [name for name in curves if name not in RULES]
    ratios = defaultdict(list)
    for (first, second), share in product(permutations(next(iter(curves.values())), 2), SHARES):

        def loss_at(name: str, seed: int, share: float = share) -> float:
            seconds, losses = curves[name][seed]
            return float(np.interp(share * seconds[-1], seconds, losses))

        best = min(constants, key=lambda name: loss_at(name, first))
        loss = loss_at(best, second)
        for name, by_seed in curves.items():
            ratios[name].append(
                reached(by_seed[second], loss) / reached(curves[best][second], loss)
            )
    return ratios


def rows_of(runs: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each optimizer and method: times, and the mean size of a batch."""
    by_optimizer: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        by_optimizer[run["optimizer"]].append(run)
    for optimizer, some in by_optimizer.items():
        curves: Curves = defaultdict(dict)
        sizes = defaultdict(list)
        for run in some:
            steps, seen, seconds, losses = zip(*run["curve"], strict=True)
            least = np.minimum.accumulate([50.0 if one is None else one for one in losses])
            curves[run["method"]][run["seed"]] = np.array(seconds), least
            sizes[run["method"]].append((seen[-1] / steps[-1], 1e3 * seconds[-1] / steps[-1]))
        times = times_of(curves)
        for method in (one for one in METHODS if one in times):
            size, step = np.mean(sizes[method], axis=0)
            yield optimizer, method, f"{mean(times[method]):.2f}", f"{size:.0f}", f"{step:.2f}"


def write(out: Path) -> None:
    """Write the table of a folder's runs into it."""
    header = ("optimizer", "method", "time", "examples a step", "milliseconds a step")
    runs = read(out / "wall_clock.jsonl")
    rows = sorted(rows_of(runs), key=lambda row: [*RATES].index(row[0]))
    (out / "wall-clock.inc").write_text(table(header, rows), encoding="utf-8")


def main() -> None:
    """Make the runs that are missing, and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder that holds folders of files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=15.0, help="of training, for each run")
    parser.add_argument("--quick", action="store_true", help="little of it, on bundled digits")
    options = parser.parse_args()
    if options.data_dir is None and not options.quick:
        parser.error("the study needs --data-dir, the folder that holds folders of files")
    torch.set_num_threads(1)
    budget = 0.02 if options.quick else options.seconds
    problem = found("digits" if options.quick else "mnist", options.data_dir)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "wall_clock.jsonl"
    runs = read(path) if path.exists() else []
    known = {(run["optimizer"], run["method"], run["seed"]) for run in runs}
    wanted = [one for one in product(RATES, METHODS, (11, 12)) if one not in known]
    random.Random(0).shuffle(wanted)
    with path.open("a", encoding="utf-8") as file:
        for optimizer, method, seed in tqdm(wanted, unit=" runs"):
            curve = train(problem, optimizer, method, seed, budget)
            run = {"optimizer": optimizer, "method": method, "seed": seed, "curve": curve}
            file.write(json.dumps(run) + "\n")
            file.flush()
    write(options.out)


if __name__ == "__main__":
    main()
