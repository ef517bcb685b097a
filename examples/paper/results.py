"""Reads the runs of a study, and says which learning rate was best.

Guarantees: what is returned does not depend on the order in which runs ended; runs that are
compared had the same budget, the largest that there is, and trained on the same device.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pages import read
from runs import Point, Setting
from study import STUDIES


class Run(NamedTuple):
    """A line of a study."""

    setting: Setting
    final_loss: float
    curve: list[Point]

    @property
    def last(self) -> Point:
        """The end of the run."""
        return self.curve[-1]

    @property
    def late_loss(self) -> float:
        """The mean training loss over the last fifth of the budget, each example at its step."""
        if not math.isfinite(self.final_loss):
            return math.inf
        starts = [0, *(point.examples for point in self.curve)]
        late = [
            (point.loss, point.examples - start)
            for point, start in zip(self.curve, starts, strict=False)
            if point.examples > 0.8 * self.setting.budget
        ]
        return sum(loss * share for loss, share in late) / sum(share for _, share in late)

    def reached(self, level: float) -> Point | None:
        """Return where the loss of a stretch was at that level for the first time."""
        return next((one for one in self.curve if number(one.loss) <= level), None)


Runs = dict[tuple[str, float], list[Run]]


def runs_of(path: Path) -> dict[str, Runs]:
    """Return the runs of a study by problem, and by recipe and learning rate."""
    found = defaultdict(list)
    for line in read(path):
        setting = Setting(*(line[field] for field in Setting._fields))
        curve = [Point(*point) for point in line["curve"]]
        found[setting.problem].append(Run(setting, number(line["final_loss"]), curve))
    return {problem: _comparable(runs, path) for problem, runs in found.items()}


def _comparable(runs: list[Run], path: Path) -> Runs:
    """Return the runs with the largest budget, in an order that does not depend on their ends."""
    budget = max(run.setting.budget for run in runs)
    kept = [run for run in runs if run.setting.budget == budget]
    devices = sorted({run.setting.device for run in kept})
    if len(devices) > 1:
        raise SystemExit(
            f"{path} has runs of {kept[0].setting.problem} on {' and on '.join(devices)}; keep "
            "those of each device in a folder of its own"
        )
    order = STUDIES[path.stem].recipes
    kept.sort(key=lambda run: (order.index(run.setting.recipe), *run.setting[2:]))
    grouped: Runs = defaultdict(list)
    for run in kept:
        grouped[run.setting.recipe, run.setting.learning_rate].append(run)
    return dict(grouped)


def number(value: float | None) -> float:
    """Return what was kept of a number; one that was not finite is infinite."""
    return math.inf if value is None else value


def recipes_of(runs: Runs) -> list[str]:
    """Return the recipes that were run, in order."""
    return list(dict.fromkeys(recipe for recipe, _ in runs))


def median_loss(runs: Iterable[Run]) -> float:
    """Return the median final loss over seeds."""
    return statistics.median(run.final_loss for run in runs)


def by_rate(runs: Runs, recipe: str) -> dict[float, float]:
    """Return the median final loss of a recipe by learning rate."""
    return {rate: median_loss(some) for (name, rate), some in runs.items() if name == recipe}


def best_of(runs: Runs, recipe: str) -> tuple[float, list[Run]]:
    """Return a recipe's best learning rate, and the runs with it."""
    losses = by_rate(runs, recipe)
    rate = min(losses, key=losses.__getitem__)
    return rate, runs[recipe, rate]
