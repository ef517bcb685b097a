"""Judges the rules by time: tables, and a figure, of what seconds.py has run.

    python examples/paper/seconds_report.py RUNS

For each overhead and learning rate, the best constant size is chosen on one seed, and compared with
on another, so that luck does not choose it. A rule's time is that to the loss which this constant
has after an eighth, a quarter and a half of the budget, as a ratio to the constant's own time; a
loss that is not reached counts as reached at the end. Where learning rates decay, the rate is
chosen as well, by the loss at the end. Writes RUNS/seconds.inc, seconds-overheads.inc,
seconds-decay.inc and seconds.svg.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pages import Vector, read, save, table
from seconds import COMPARISONS, COSINE, OPTIMIZERS, RULES

SHARES = (1 / 8, 1 / 4, 1 / 2)
# Times, as shares of the budget, at which curves are compared.
TIMES = np.geomspace(1 / 64, 1.0, 121)


class Cell(NamedTuple):
    """What is compared: runs that differ in nothing but what sets the size."""

    problem: str
    optimizer: str
    rate: float
    overhead: int


# What is averaged over.
NETWORKS = {
    "dense": ("mnist", "fashion-mnist", "digits"),
    "convolutions": ("cifar10",),
    "GPT": ("tinyshakespeare",),
}
ALL_OVERHEADS = tuple(COMPARISONS["mnist"].budgets)

# By cell: by method: by seed: the least loss so far, at each time.
Curves = dict[Cell, dict[str, dict[int, Vector]]]
# By cell: by method: its time, and its loss at the end, over those of the best constant.
Judged = dict[Cell, dict[str, tuple[float, float]]]


def curves_of(runs: list[dict[str, Any]]) -> Curves:
    """Return the curves of all cells."""
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        budgets = COMPARISONS[run["problem"]].budgets
        overheads = budgets if run["overhead"] is None else (run["overhead"],)
        for overhead in overheads:
            cell = Cell(run["problem"], run["optimizer"], run["rate"], overhead)
            times, losses = [], []
            for steps, seen, loss in run["curve"]:
                times.append((overhead * steps + seen) / budgets[overhead])
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


def judged_of(curves: Curves) -> Judged:
    """Return the ratios of the cells that are whole: at least two seeds of every method."""
    found = {}
    for cell, methods in curves.items():
        compared = COMPARISONS[cell.problem]
        names = (*compared.constants, *compared.rules)
        some = {name: methods[name] for name in names if name in methods}
        if len(some) == len(names) and len(set.intersection(*map(set, some.values()))) > 1:
            found[cell] = ratios(some)
    return found


def rows_of(network: str, optimizer: str, cells: Judged) -> Iterator[tuple[str, ...]]:
    """Yield a row for each rule, and for the constant that is best for all cells."""
    shared = set.intersection(*(set(found) for found in cells.values()))
    constants = [name for name in shared if name not in RULES]
    single = min(constants, key=lambda one: mean([found[one][0] for found in cells.values()]))
    for name in (*(rule for rule in RULES if rule in shared), single):
        times = [found[name][0] for found in cells.values()]
        error = float(np.std(np.log(times), ddof=1)) / math.sqrt(len(times))
        yield (
            f"{network}, {len(cells)} cells",
            optimizer,
            name if name in RULES else f"always {name.partition(' ')[2]}",
            f"{mean(times):.2f} ± {mean(times) * error:.2f}",
            f"{max(times):.2f}",
            f"{np.mean(np.array(times) <= 1.05):.0%}",
            f"{mean([found[name][1] for found in cells.values()]):.2f}",
        )


# Whose rates, and sizes, are chosen by the loss at the end: a column each.
TUNED = ("constant size", f"constant size{COSINE}", "Progress", f"Progress{COSINE}")


def decays_of(curves: Curves) -> Iterator[tuple[str, ...]]:
    """Yield a row for each optimizer and overhead with rates that decay: losses at the end.

    Rate and size are chosen on one seed and judged on another; all losses are over that of the
    constant size and rate that are the best together.
    """
    # By optimizer and overhead: by column: by rate and method: by seed.
    ends: dict[tuple[str, int], dict[str, dict[tuple[float, str], dict[int, float]]]] = {}
    for cell, methods in curves.items():
        if cell.overhead not in COMPARISONS[cell.problem].decayed:
            continue
        columns = ends.setdefault((cell.optimizer, cell.overhead), defaultdict(dict))
        for method, by_seed in methods.items():
            if len(by_seed) > 1:
                column = re.sub(r"^constant \d+", TUNED[0], method)
                columns[column][cell.rate, method] = {
                    seed: float(curve[-1]) for seed, curve in by_seed.items()
                }
    for (optimizer, overhead), columns in ends.items():
        if not all(columns[name] for name in TUNED):
            continue
        found: dict[str, list[float]] = {name: [] for name in TUNED}
        for first, second in permutations(next(iter(columns[TUNED[0]].values())), 2):
            for name in TUNED:
                best = min(columns[name].values(), key=lambda by_seed: by_seed[first])
                found[name].append(best[second])
        row = (mean(found[name]) / mean(found[TUNED[0]]) for name in TUNED)
        yield optimizer, str(overhead), *(f"{ratio:.2f}" for ratio in row)


def write(out: Path) -> None:
    """Write the tables and the figure of a folder's runs into it."""
    curves = curves_of(read(out / "seconds.jsonl"))
    judged = judged_of(curves)
    rows, by_overhead = [], []
    for network, problems in NETWORKS.items():
        for optimizer in OPTIMIZERS:
            cells = {
                cell: found
                for cell, found in judged.items()
                if cell.problem in problems and cell.optimizer == optimizer
            }
            if len(cells) < 2:
                continue
            rows += rows_of(network, optimizer, cells)
            for name in ("Progress", "Progress, measured", "CABS"):
                by_h = [
                    [
                        one[name][0]
                        for cell, one in cells.items()
                        if cell.overhead == h and name in one
                    ]
                    for h in ALL_OVERHEADS
                ]
                if any(by_h):
                    columns = (f"{mean(one):.2f} ({max(one):.2f})" if one else "" for one in by_h)
                    by_overhead.append((network, optimizer, name, *columns))
    header = ("network", "optimizer", "rule", "time", "worst", "at most 1.05", "final loss")
    (out / "seconds.inc").write_text(table(header, rows), encoding="utf-8")
    header = ("network", "optimizer", "rule", *(f"h = {overhead}" for overhead in ALL_OVERHEADS))
    (out / "seconds-overheads.inc").write_text(table(header, by_overhead), encoding="utf-8")
    header = ("optimizer", "h", *TUNED)
    decay = table(header, list(decays_of(curves)))
    (out / "seconds-decay.inc").write_text(decay, encoding="utf-8")
    draw(judged, out / "seconds.svg")


def draw(judged: Judged, path: Path) -> None:
    """Draw times over learning rates, a panel an optimizer and a line an overhead."""
    from matplotlib.figure import Figure

    dense = {cell: found for cell, found in judged.items() if cell.problem in NETWORKS["dense"]}
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    panels = figure.subplots(1, len(OPTIMIZERS), sharey=True)
    lines = [("Progress", overhead) for overhead in ALL_OVERHEADS] + [("CABS", 1024)]
    for panel, optimizer in zip(panels, OPTIMIZERS, strict=True):
        panel.axhline(1.0, color="0.6", linewidth=1.0)
        for name, overhead in lines:
            by_rate: dict[float, list[float]] = defaultdict(list)
            for cell, found in dense.items():
                if (cell.optimizer, cell.overhead) == (optimizer, overhead):
                    by_rate[cell.rate].append(found[name][0])
            rates = sorted(by_rate)
            panel.plot(
                range(len(rates)),
                [mean(by_rate[rate]) for rate in rates],
                ":" if name == "CABS" else "-",
                color="0.4" if name == "CABS" else None,
                marker="o",
                markersize=3,
                label=f"{name}, h = {overhead}",
            )
        rates = sorted({cell.rate for cell in dense if cell.optimizer == optimizer})
        panel.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        panel.set(yscale="log", xlabel="learning rate", title=optimizer)
    panels[0].set_ylabel("time / best constant's")
    panels[-1].legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
