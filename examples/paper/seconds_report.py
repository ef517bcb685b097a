"""Judges the rules by time: tables, and a figure, of what seconds.py has run.

    python examples/paper/seconds_report.py RUNS

For each overhead and learning rate, the best constant size is chosen on one seed, and compared with
on another, so that luck does not choose it. A rule's time is that to the loss which this constant
has after an eighth, a quarter and a half of the budget, as a ratio to the constant's own time; a
loss that is not reached counts as reached at the end. Writes RUNS/seconds.inc,
seconds-overheads.inc and seconds.svg.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pages import Vector, read, save, table
from seconds import BUDGETS, CONSTANTS, RATES, RULES

SHARES = (1 / 8, 1 / 4, 1 / 2)
# Times, as shares of the budget, at which curves are compared.
TIMES = np.geomspace(1 / 64, 1.0, 121)


class Cell(NamedTuple):
    """What is compared: runs that differ in nothing but what sets the size."""

    problem: str
    optimizer: str
    rate: float
    overhead: int


# By cell: by method: by seed: the least loss so far, at each time.
Curves = dict[Cell, dict[str, dict[int, Vector]]]


def curves_of(runs: list[dict[str, Any]]) -> Curves:
    """Return the curves of all cells."""
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        overheads = BUDGETS if run["overhead"] is None else (run["overhead"],)
        for overhead in overheads:
            cell = Cell(run["problem"], run["optimizer"], run["rate"], overhead)
            times, losses = [], []
            for steps, seen, loss in run["curve"]:
                times.append((overhead * steps + seen) / BUDGETS[overhead])
                losses.append(50.0 if loss is None else min(loss, 50.0))
            least = np.minimum.accumulate(losses)
            curve = np.exp(np.interp(np.log(TIMES), np.log(times), np.log(least)))
            curves[cell][run["method"]][run["seed"]] = curve
    return curves


def reached(curve: Vector, loss: float) -> float:
    """Return at which share of the budget a loss is reached; 1 where it is not."""
    below = np.nonzero(curve <= loss)[0]
    return float(TIMES[below[0]]) if len(below) else 1.0


def ratios(methods: dict[str, dict[int, Vector]]) -> dict[str, tuple[float, float]]:
    """Return each method's time, and its loss at the end, over those of the best constant."""
    constants = [one for one in methods if one.startswith("constant")]
    times: dict[str, list[float]] = defaultdict(list)
    ends: dict[str, list[float]] = defaultdict(list)
    seeds = sorted(set.intersection(*(set(methods[one]) for one in methods)))
    for first, second in permutations(seeds, 2):
        best = best_of(methods, constants, first, 1.0)
        for name, curves in methods.items():
            ends[name].append(curves[second][-1] / methods[best][second][-1])
        for share in SHARES:
            constant = methods[best_of(methods, constants, first, share)][second]
            loss = constant[place(share)]
            for name, curves in methods.items():
                times[name].append(reached(curves[second], loss) / reached(constant, loss))
    return {name: (mean(times[name]), mean(ends[name])) for name in times}


def best_of(
    methods: dict[str, dict[int, Vector]], constants: list[str], seed: int, share: float
) -> str:
    """Return the constant with the least loss at a share of the budget."""
    return min(constants, key=lambda one: methods[one][seed][place(share)])


def place(share: float) -> int:
    """Return where a share of the budget is among the times."""
    return int(np.argmin(abs(TIMES - share)))


def mean(values: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(float(np.mean(np.log(values))))


def main() -> None:
    """Write the tables and the figure."""
    out = Path(sys.argv[1])
    curves = curves_of(read(out / "seconds.jsonl"))
    judged = {cell: ratios(methods) for cell, methods in curves.items()}
    judged = {cell: found for cell, found in judged.items() if found}
    rows, by_overhead = [], []
    for optimizer in RATES:
        cells = {cell: found for cell, found in judged.items() if cell.optimizer == optimizer}
        if not cells:
            continue
        of = {
            name: [found[name][0] for found in cells.values()]
            for name in (*RULES, *(f"constant {size}" for size in CONSTANTS))
        }
        single = min(
            (one for one in of if one.startswith("constant")), key=lambda one: mean(of[one])
        )
        for name in (*RULES, single):
            logs = np.log(of[name])
            error = float(logs.std(ddof=1)) / math.sqrt(len(logs))
            rows.append(
                (
                    optimizer,
                    name if name in RULES else f"always {name.partition(' ')[2]}",
                    f"{mean(of[name]):.3f} ± {mean(of[name]) * error:.3f}",
                    f"{max(of[name]):.2f}",
                    f"{np.mean(np.array(of[name]) <= 1.05):.0%}",
                    f"{mean([found[name][1] for found in cells.values()]):.2f}",
                )
            )
        for name in RULES:
            by_h = [
                [found[name][0] for cell, found in cells.items() if cell.overhead == overhead]
                for overhead in BUDGETS
            ]
            columns = [f"{mean(values):.2f} ({max(values):.2f})" for values in by_h]
            by_overhead.append((optimizer, name, *columns))
    header = ("optimizer", "rule", "time", "worst cell", "cells at most 1.05", "final loss")
    (out / "seconds.inc").write_text(table(header, rows), encoding="utf-8")
    header = ("optimizer", "rule", *(f"h = {overhead}" for overhead in BUDGETS))
    (out / "seconds-overheads.inc").write_text(table(header, by_overhead), encoding="utf-8")
    draw(judged, out / "seconds.svg")


def draw(judged: dict[Cell, dict[str, tuple[float, float]]], path: Path) -> None:
    """Draw times over learning rates, a panel an optimizer and a line an overhead."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    panels = figure.subplots(1, len(RATES), sharey=True)
    for panel, (optimizer, rates) in zip(panels, RATES.items(), strict=True):
        panel.axhline(1.0, color="0.6", linewidth=1.0)
        for overhead in BUDGETS:
            for name, line in (("Progress", "-"), ("CABS", ":")):
                pairs = [
                    (rate, mean(found))
                    for rate in sorted(rates)
                    for found in [
                        [
                            one[name][0]
                            for cell, one in judged.items()
                            if cell[1:] == (optimizer, rate, overhead)
                        ]
                    ]
                    if found
                ]
                if name == "Progress" or overhead == 1024:
                    panel.plot(
                        *zip(*pairs, strict=True),
                        line,
                        marker="o",
                        markersize=3,
                        label=f"h = {overhead}" if name == "Progress" else "CABS, h = 1024",
                    )
        panel.set(xscale="log", yscale="log", xlabel="learning rate", title=optimizer)
    panels[0].set_ylabel("time / best constant's")
    panels[-1].legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
