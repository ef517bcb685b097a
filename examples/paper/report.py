"""Writes tables and figures of the studies out of their runs, without training.

    python examples/paper/report.py RUNS

For every RUNS/STUDY.jsonl: tables in reStructuredText, .inc, and figures, .svg. A final loss is
that of a run's last weights over fixed examples of the training set. Of several seeds, the median,
the least and the most are told. A run that diverged has an infinite loss.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import convex_report
from figures import draw_comparison, draw_summary, draw_variants
from pages import spread, table
from results import Runs, best_of, by_rate, median_loss, number, recipes_of, runs_of
from runs import Point

# How close to the best a learning rate has to come to count as good.
CLOSE = 1.1
# Losses, of a stretch of a run, for which it is told when they are reached.
LEVELS = {"mnist": (0.5, 0.25), "fashion-mnist": (0.9, 0.65), "cifar10": (1.9, 1.6)}
COMPARED = "images"


def good_rates(losses: dict[float, float], best: float) -> str:
    """Return which learning rates stay close to a loss: the ends, and their quotient."""
    good = [rate for rate, loss in losses.items() if loss <= CLOSE * best]
    if not good:
        return "none"
    if len(good) == 1:
        return f"{good[0]:g}"
    return f"{good[0]:g} to {good[-1]:g} ({good[-1] / good[0]:.3g} times)"


def comparison(runs: Runs) -> str:
    """Return the table of every recipe at its best learning rate."""
    overall = min(median_loss(some) for some in runs.values())
    header = ["method", "best rate", "final loss", "test accuracy", "steps", "seconds"]
    header += ["rates within 10 % of its best", "of the best of all"]
    rows = []
    for recipe in recipes_of(runs):
        losses = by_rate(runs, recipe)
        rate, best = best_of(runs, recipe)
        rows.append(
            [
                *(recipe, f"{rate:g}", spread([run.final_loss for run in best], ".3f")),
                spread([number(run.last.accuracy) for run in best], ".3f"),
                spread([run.last.steps for run in best], ".0f"),
                spread([run.last.seconds for run in best], ".1f"),
                *(good_rates(losses, losses[rate]), good_rates(losses, overall)),
            ]
        )
    return table(header, rows)


def grid(runs: Runs) -> str:
    """Return the table of final losses by recipe and learning rate, medians over seeds."""
    rates = sorted({rate for _, rate in runs})
    rows = []
    for recipe in recipes_of(runs):
        losses = by_rate(runs, recipe)
        said = {rate: f"{loss:.3f}" for rate, loss in losses.items() if math.isfinite(loss)}
        rows.append([recipe, *(said.get(rate, "diverged") for rate in rates)])
    return table(["final loss at", *(f"{rate:g}" for rate in rates)], rows)


def levels_reached(runs: Runs, levels: Sequence[float]) -> str:
    """Return the table of what it takes to reach losses, at the best rate for it."""
    header = ["method"]
    header += [f"{what} to {level}" for level in levels for what in ("rate, examples", "seconds")]
    rows = []
    for recipe in recipes_of(runs):
        cells = [recipe]
        for level in levels:
            rate, points = _soonest(runs, recipe, level)
            found = [point.examples if point else math.inf for point in points]
            said = spread(found, ".0f")
            cells.append(said if said == "never" else f"{rate:g}: {said}")
            cells.append(spread([point.seconds if point else math.inf for point in points], ".1f"))
        rows.append(cells)
    return table(header, rows)


def _soonest(runs: Runs, recipe: str, level: float) -> tuple[float, list[Point | None]]:
    """Return the learning rate with which a level is reached first, and where by seed."""
    reached = {
        rate: [run.reached(level) for run in some]
        for (name, rate), some in runs.items()
        # Rates that were tried with one seed only are no match for those tried with several.
        if name == recipe and len(some) == max(map(len, runs.values()))
    }

    def middle(points: list[Point | None]) -> float:
        return statistics.median(point.examples if point else math.inf for point in points)

    rate = min(reached, key=lambda one: middle(reached[one]))
    return rate, reached[rate]


def variants(runs: Runs) -> str:
    """Return the table of every recipe at every learning rate."""
    header = ["rate", "variant", "final loss", "test accuracy", "steps", "examples a step"]
    header += ["asked for at the end"]
    rows = []
    for rate in sorted({rate for _, rate in runs}):
        for recipe in recipes_of(runs):
            some = runs[recipe, rate]
            asked = [run.last.asked for run in some]
            rows.append(
                [
                    *(f"{rate:g}", recipe, spread([run.final_loss for run in some], ".4g")),
                    spread([number(run.last.accuracy) for run in some], ".3f"),
                    spread([run.last.steps for run in some], ".0f"),
                    spread([run.last.examples / run.last.steps for run in some], ".1f"),
                    "" if None in asked else spread([float(one or 0) for one in asked], ".3g"),
                ]
            )
    return table(header, rows)


def write(folder: Path) -> None:
    """Write what there is to say of the runs in a folder, into the same folder."""
    for path in sorted(folder.glob("*.jsonl")):
        if path.stem == "convex":
            convex_report.write(folder)
            continue
        found = runs_of(path)
        if path.stem == COMPARED:
            draw_summary(found, folder / "summary.svg")
        for problem, runs in found.items():
            stem = folder / f"{path.stem}-{problem.replace(' ', '-')}"
            if path.stem == COMPARED:
                levels = levels_reached(runs, LEVELS.get(problem, (2.0, 1.0)))
                texts = {"": comparison(runs), "-grid": grid(runs), "-levels": levels}
                for suffix, text in texts.items():
                    path_of_it = stem.with_name(f"{stem.name}{suffix}.inc")
                    path_of_it.write_text(text, encoding="utf-8")
                draw_comparison(problem, runs, stem.with_suffix(".svg"))
            else:
                stem.with_suffix(".inc").write_text(variants(runs), encoding="utf-8")
                draw_variants(runs, stem.with_suffix(".svg"))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
