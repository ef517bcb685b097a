"""Reads the runs of a study, and says which learning rate was best.

Guarantees: what is returned does not depend on the order in which runs ended.
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

    def reached(self, level: float) -> Point | None:
        """Return where the loss of a stretch was at that level for the first time."""
        return next((one for one in self.curve if number(one.loss) <= level), None)


Runs = dict[tuple[str, float], list[Run]]


def runs_of(path: Path) -> dict[str, Runs]:
    """Return the runs of a study by problem, and by recipe and learning rate."""
    found: dict[str, Runs] = defaultdict(lambda: defaultdict(list))
    for line in read(path):
        setting = Setting(*(line[field] for field in Setting._fields))
        curve = [Point(*point) for point in line["curve"]]
        run = Run(setting, number(line["final_loss"]), curve)
        found[setting.problem][setting.recipe, setting.learning_rate].append(run)
    return {problem: _in_order(runs) for problem, runs in found.items()}


def _in_order(runs: Runs) -> Runs:
    """Return runs in an order that does not depend on which of them ended first."""
    recipes = list(dict.fromkeys(one for study in STUDIES.values() for one in study.recipes))
    keys = sorted(runs, key=lambda key: (recipes.index(key[0]), key[1]))
    return {key: sorted(runs[key], key=lambda run: run.setting.seed) for key in keys}


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
