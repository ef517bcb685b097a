"""Writes tables and figures of the studies out of their runs, without training.

    python examples/paper/report.py RUNS

For every RUNS/STUDY.jsonl: tables in reStructuredText, .inc, and figures, .svg. A final loss is
that of a run's last weights over fixed examples of the training set. Of several seeds, the median,
the least and the most are told. A run that diverged has an infinite loss.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import convex_report
import seconds_report
import wall_clock
from figures import draw_comparison, draw_summary, draw_variants
from pages import spread, table
from results import Runs, best_of, by_rate, median_loss, number, recipes_of, runs_of
from runs import Point

# How close to the best a learning rate has to come to count as good.
CLOSE = 1.1
# Losses, of a stretch of a run, for which it is told when they are reached, by study.
LEVELS = {
    "images": {"mnist": (0.5, 0.25), "fashion-mnist": (0.9, 0.65), "cifar10": (1.9, 1.6)},
    "epoch": {"mnist": (0.25, 0.1)},
}
# Those that tell of their runs by themselves.
_OTHERS = {"convex": convex_report, "seconds": seconds_report, "wall_clock": wall_clock}
# The study of the first figure; of both, methods are compared at their best rates.
FIRST = "images"


def said_loss(losses: Sequence[float], form: str) -> str:
    """Return a median over seeds, and the least and the most."""
    return spread(losses, form, infinite="diverged")


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
                *(recipe, f"{rate:g}", said_loss([run.final_loss for run in best], ".3f")),
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
        said = {rate: said_loss([loss], ".3f") for rate, loss in losses.items()}
        rows.append([recipe, *(said.get(rate, "") for rate in rates)])
    return table(["final loss at", *(f"{rate:g}" for rate in rates)], rows)


def levels_reached(runs: Runs, levels: Sequence[float]) -> str:
    """Return the table of what it takes to reach losses, at the best rate for it."""
    header = ["method"]
    what = ("rate, examples", "seconds at that rate")
    header += [f"{one} to {level}" for level in levels for one in what]
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
    tried = {rate: some for (name, rate), some in runs.items() if name == recipe}
    # Rates that were tried with one seed only are no match for those tried with several.
    most = max(map(len, tried.values()))
    reached = {
        rate: [run.reached(level) for run in some]
        for rate, some in tried.items()
        if len(some) == most
    }

    def middle(points: list[Point | None]) -> float:
        return statistics.median(point.examples if point else math.inf for point in points)

    rate = min(reached, key=lambda one: middle(reached[one]))
    return rate, reached[rate]


def variants(runs: Runs) -> str:
    """Return the table of every recipe at every learning rate."""
    header = ["rate", "variant", "loss over the last fifth", "final loss", "test accuracy", "steps"]
    header += ["examples a step", "asked for at the end"]
    rows = []
    for rate in sorted({rate for _, rate in runs}):
        for recipe in recipes_of(runs):
            some = runs.get((recipe, rate), [])
            if not some:
                continue
            asked = [run.last.asked for run in some]
            rows.append(
                [
                    *(f"{rate:g}", recipe, said_loss([run.late_loss for run in some], ".3g")),
                    said_loss([run.final_loss for run in some], ".3g"),
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
        if path.stem in _OTHERS:
            _OTHERS[path.stem].write(folder)
            continue
        found = runs_of(path)
        if path.stem == FIRST:
            draw_summary(found, folder / "summary.svg")
        for problem, runs in found.items():
            stem = folder / f"{path.stem}-{problem.replace(' ', '-')}"
            if path.stem in LEVELS:
                levels = levels_reached(runs, LEVELS[path.stem].get(problem, (2.0, 1.0)))
                texts = {"": comparison(runs), "-grid": grid(runs), "-levels": levels}
                for suffix, text in texts.items():
                    path_of_it = stem.with_name(f"{stem.name}{suffix}.inc")
                    path_of_it.write_text(text, encoding="utf-8")
                draw_comparison(problem, runs, stem.with_suffix(".svg"))
            else:
                stem.with_suffix(".inc").write_text(variants(runs), encoding="utf-8")
                draw_variants(runs, stem.with_suffix(".svg"))


def main() -> None:
    """Write what there is to say of the runs in the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="the folder that holds STUDY.jsonl")
    folder = parser.parse_args().runs
    if not any(folder.glob("*.jsonl")):
        parser.error(f"{folder} holds no STUDY.jsonl; study.py --out {folder} makes them")
    write(folder)


if __name__ == "__main__":
    main()
