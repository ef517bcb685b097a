"""Draws a study: a figure for the comparison of methods on a problem, and one for each variant.

Guarantees: lines are medians over seeds, but for batch sizes, which are those of single runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pages import Vector, middle_curve, save
from results import Run, Runs, best_of, by_rate, recipes_of
from runs import Point


def middle(
    runs: Sequence[Run], across: Callable[[Point], float], up: Callable[[Point], float | None]
) -> tuple[Vector, Vector]:
    """Return the median over seeds of a column over another, as far as all of them have it."""
    curves = []
    for run in runs:
        pairs = [(across(point), up(point)) for point in run.curve]
        kept = [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]
        if kept:
            curves.append((np.array([x for x, _ in kept]), np.array([y for _, y in kept])))
    return middle_curve(curves) if curves else (np.empty(0), np.empty(0))


def thousands(point: Point) -> float:
    """Return how many thousands of examples were seen."""
    return point.examples / 1000.0


def sizes(run: Run) -> tuple[list[float], list[float]]:
    """Return thousands of examples seen, and the mean batch size of each stretch."""
    starts = [Point(0, 0, 0.0, 0.0, None, None), *run.curve[:-1]]
    pairs = list(zip(starts, run.curve, strict=True))
    means = [(b.examples - a.examples) / (b.steps - a.steps) for a, b in pairs]
    return [thousands(point) for point in run.curve], means


def look(recipe: str, place: int) -> dict[str, Any]:
    """Return how a recipe's line is drawn: ours black, constants from light to dark."""
    if recipe == "CABS":
        return {"color": "black", "linewidth": 2.0, "zorder": 3}
    words = recipe.split()
    if words[0] == "constant" and len(words) == 2:
        from matplotlib import colormaps

        shade = colormaps["Blues"](0.3 + 0.7 * (math.log2(int(words[1])) - 4) / 5)
        return {"color": shade, "linewidth": 1.2}
    return {"color": f"C{1 + place % 9}", "linewidth": 1.2}


def draw_comparison(problem: str, runs: Runs, path: Path) -> None:
    """Draw losses and accuracies at the best rates, losses over rates, and the rule's sizes."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 9.6), layout="constrained")
    losses, accuracies, (tuned, batches, legend) = figure.subplots(3, 3)
    over: list[tuple[str, Callable[[Point], float]]] = [
        ("examples, thousands", thousands),
        ("steps", lambda point: point.steps),
        ("seconds", lambda point: point.seconds),
    ]
    for place, recipe in enumerate(recipes_of(runs)):
        rate, best = best_of(runs, recipe)
        style = look(recipe, place)
        for loss, accuracy, (_, across) in zip(losses, accuracies, over, strict=True):
            loss.plot(*middle(best, across, lambda point: point.loss), **style)
            accuracy.plot(*middle(best, across, lambda point: point.accuracy), **style)
        found = by_rate(runs, recipe)
        tuned.plot(list(found), list(found.values()), "o-", markersize=3, **style)
        legend.plot([], label=f"{recipe}, at {rate:g}", **style)
    for loss, accuracy, (label, _) in zip(losses, accuracies, over, strict=True):
        scale = "log" if label == "steps" else "linear"
        loss.set(xlabel=label, ylabel="training loss", xscale=scale, yscale="log")
        accuracy.set(xlabel=label, ylabel="test accuracy", xscale=scale)
    tuned.set(xlabel="learning rate", ylabel="final loss", xscale="log", yscale="log")
    rates = [rate for recipe, rate in runs if recipe == "CABS"]
    for place, rate in enumerate(rates):
        shade = colormaps["viridis"](0.9 * place / max(1, len(rates) - 1))
        batches.plot(*sizes(runs["CABS", rate][0]), color=shade, label=f"{rate:g}")
    batches.set(xlabel="examples, thousands", ylabel="batch size of CABS, by rate", yscale="log")
    batches.legend(frameon=False, fontsize=7)
    legend.set_axis_off()
    legend.legend(loc="center", frameon=False, fontsize=8)
    figure.suptitle(problem, fontsize=10)
    save(figure, path)


def draw_summary(problems: dict[str, Runs], path: Path) -> None:
    """Draw, a column for each problem, losses over learning rates and at the best rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 5.6), layout="constrained")
    rows = figure.subplots(2, len(problems), squeeze=False)
    for (problem, runs), tuned, trained in zip(problems.items(), *rows, strict=True):
        for place, recipe in enumerate(recipes_of(runs)):
            style = {**look(recipe, place), "label": recipe}
            losses = by_rate(runs, recipe)
            tuned.plot(list(losses), list(losses.values()), "o-", markersize=3, **style)
            _, best = best_of(runs, recipe)
            trained.plot(*middle(best, thousands, lambda p: p.loss), **style)
        tuned.set(title=problem, xlabel="learning rate", xscale="log", yscale="log")
        trained.set(xlabel="examples, thousands", yscale="log")
    rows[0, 0].set_ylabel("final training loss")
    rows[1, 0].set_ylabel("training loss at the best rate")
    lines = rows[1, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right center", frameon=False, fontsize=8)
    save(figure, path)


def draw_variants(runs: Runs, path: Path) -> None:
    """Draw losses, sizes and what rules asked for, a column for each rate that did not diverge."""
    from matplotlib.figure import Figure

    rates = sorted({rate for (_, rate), some in runs.items() if is_finite(some)})
    figure = Figure(figsize=(1.0 + 3.4 * len(rates), 7.0), layout="constrained")
    panels = figure.subplots(3, len(rates), sharex=True, squeeze=False)
    for column, rate in enumerate(rates):
        losses, batches, wishes = panels[:, column]
        for place, recipe in enumerate(recipes_of(runs)):
            style = look(recipe, place)
            some = runs.get((recipe, rate), [])
            losses.plot(*middle(some, thousands, lambda p: p.loss), label=recipe, **style)
            wishes.plot(*middle(some, thousands, lambda p: p.asked), **style)
            for run in some:
                batches.plot(*sizes(run), **style)
        losses.set(title=f"learning rate {rate:g}", yscale="log")
        batches.set(yscale="log")
        wishes.set(xlabel="examples, thousands", yscale="log")
    panels[0, 0].set_ylabel("training loss")
    panels[1, 0].set_ylabel("batch size, of every seed")
    panels[2, 0].set_ylabel("what the rule asked for")
    panels[0, -1].legend(frameon=False, fontsize=7)
    save(figure, path)


def is_finite(runs: Sequence[Run]) -> bool:
    """Return whether a run did not diverge."""
    return any(math.isfinite(run.final_loss) for run in runs)
