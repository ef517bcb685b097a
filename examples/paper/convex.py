"""Convex problems: how many gradients of one example a method needs to reach a gradient norm.

    python examples/paper/convex.py --data-dir DIR --out RUNS
    python examples/paper/convex.py --out RUNS --quick

DIR holds the folder libsvm with a9a.gz and mushrooms.gz; without it the quadratics alone are run. A
run is a line of RUNS/convex.jsonl; runs that are there are not made again. MICE is run where the
package ``mice`` is installed, and is said to be missing where not. convex_report.py draws tables
and figures of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Before NumPy is loaded: threads that wait for each other take longer, and round otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from convex_methods import Step, descend, descend_by_mice, mice
from convex_problems import FEATURES, QUADRATICS, Problem, Quadratic, problem
from pages import read, short

MICE = "MICE"
SEEDS = (0, 1, 2)
# How much the evaluations grow from one look at the full gradient to the next.
GROWTH = 1.03
POINTS = 25
# The budget of a quick run, and its only rate.
QUICK, QUICK_RATE = 15_000, 1.0
# Beyond so many times the first norm a run has diverged.
DIVERGED = 1e4


class Study(NamedTuple):
    """What is compared on a problem."""

    methods: tuple[str, ...]
    # Times L.
    rates: tuple[float, ...]
    # The last one ends a run; without any, all runs spend the budget.
    norms: tuple[float, ...]
    budget: int


class Setting(NamedTuple):
    """What tells runs apart."""

    problem: str
    method: str
    rate: float
    seed: int
    budget: int


_CONSTANT = ("constant 16", "constant 128", "constant 1024")
# As small as CABS may take them.
_FEW = ("constant 2", "constant 4", "constant 8")
_ADAPTIVE = ("norm test, 0.5", "norm test, 0.9", MICE, "CABS")
_KNOWN = ("CABS, known floor", "CABS, known floor, smoothing 0.5")
_FALLING = ("constant 16, falling rate", "CABS, falling rate")
_TOLD = ("rule, told", "optimum of the bound, told", "exact optimum, told")
FINITE = Study(
    ("full gradient", *_FEW, *_CONSTANT, *_ADAPTIVE, *_KNOWN, *_FALLING),
    (0.03, 0.1, 0.3, 1.0, 3.0, 6.0),
    (0.1, 0.03, 0.01, 0.003),
    300_000,
)
KNOWN = Study(
    (*_CONSTANT, *_ADAPTIVE, "CABS, smoothing 0.5", *_TOLD),
    (0.01, 0.03, 0.1, 0.5, 1.0, 1.5),
    (1.0, 0.3, 0.1, 0.05),
    300_000,
)
STALLED = Study(
    ("constant 16", "CABS", *_FALLING, "CABS, known floor"), (0.1, 0.5, 1.0), (), 300_000
)
STUDIES: dict[str, Study] = {
    # Where the penalty leaves little curvature at the end, more is better for many.
    "mushrooms": FINITE._replace(rates=(*FINITE.rates, 12.0), budget=200_000),
    "a9a": FINITE,
    **{name: STALLED if "floor" in name else KNOWN for name in QUADRATICS},
}


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="the folder that holds the folder libsvm")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the runs")
    parser.add_argument("--quick", action="store_true", help="half a minute: small budgets")
    return parser.parse_args()


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Yield the runs that the command line asks for."""
    for name, study in STUDIES.items():
        if name in FEATURES and options.data_dir is None:
            continue
        budget = min(study.budget, QUICK) if options.quick else study.budget
        for method in study.methods:
            for rate in (QUICK_RATE,) if options.quick else study.rates:
                # Nothing is random in the full gradient.
                seeds = SEEDS[:1] if options.quick or method == "full gradient" else SEEDS
                for seed in seeds:
                    yield Setting(name, method, rate, seed, budget)


def run(setting: Setting, of: Problem) -> dict[str, Any]:
    """Descend until the smallest norm is reached or the budget is spent; return plain values."""
    if setting.method == MICE and mice() is None:
        return {**setting._asdict(), "outcome": "not installed"}
    norms = STUDIES[setting.problem].norms
    rate = setting.rate / of.curvature
    reached: dict[float, int] = {}
    looks = [(0, *of.whole(of.start), 0)]
    sizes = [_sizes(of, of.start, rate)]
    outcome = "budget spent"
    for step in _steps(setting, of, rate):
        if step.evaluations > setting.budget:
            break
        if step.evaluations < GROWTH * looks[-1][0]:
            continue
        with np.errstate(over="ignore"):
            loss, norm = of.whole(step.weights)
        looks.append((step.evaluations, loss, norm, step.size))
        sizes.append(_sizes(of, step.weights, rate))
        if not norm <= DIVERGED * looks[0][2]:
            outcome = "diverged"
            break
        for wanted in norms:
            if norm <= wanted:
                reached.setdefault(wanted, step.evaluations)
        if norms and norms[-1] in reached:
            outcome = "reached"
            break
    late = [loss - of.floor for at, loss, _, _ in looks if 2 * at >= looks[-1][0]]
    kept = np.unique(np.linspace(0, len(looks) - 1, POINTS).round().astype(int))
    told = {"sizes": [[short(size) for size in sizes[at]] for at in kept]}
    return {
        **setting._asdict(),
        "learning_rate": short(rate),
        "outcome": outcome,
        "reached": {str(wanted): reached.get(wanted) for wanted in norms},
        # Over the looks of the second half of what was spent.
        "late_excess": short(math.fsum(late) / len(late)),
        "curve": [[looks[at][0], short(looks[at][2]), looks[at][3]] for at in kept],
        **(told if isinstance(of, Quadratic) and setting.method == "CABS" else {}),
    }


def _steps(setting: Setting, of: Problem, rate: float) -> Iterator[Step]:
    if setting.method == MICE:
        return descend_by_mice(of, rate, setting.seed, setting.budget)
    return descend(of, setting.method, rate, setting.seed)


def _sizes(of: Problem, weights: np.ndarray, rate: float) -> tuple[float, ...]:
    return of.sizes(weights, rate) if isinstance(of, Quadratic) else ()


def main() -> None:
    """Make the runs that are missing."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "convex.jsonl"
    done = read(path) if path.exists() else []
    is_there = mice() is not None
    # What was missing then may be installed now.
    known = {
        Setting(*(one[field] for field in Setting._fields))
        for one in done
        if not (is_there and one["outcome"] == "not installed")
    }
    missing = [one for one in settings(options) if one not in known]
    if not is_there and any(one.method == MICE for one in missing):
        print("the package mice is not installed: the table will say so in its row")
    problems: dict[str, Problem] = {}
    with path.open("a", encoding="utf-8") as file:
        for place, setting in enumerate(missing, 1):
            name = setting.problem
            if name not in problems:
                problems = {name: problem(name, options.data_dir)}
            found = run(setting, problems[name])
            file.write(json.dumps(found, separators=(",", ":")) + "\n")
            file.flush()
            print(f"{place} of {len(missing)}: {', '.join(map(str, setting))}: {found['outcome']}")


if __name__ == "__main__":
    main()
