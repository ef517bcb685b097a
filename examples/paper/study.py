"""Reruns the paper's study, and what it leaves open, with equal budgets of examples.

    python examples/paper/study.py --data-dir DIR --out RUNS
    python examples/paper/study.py --data-dir DIR --out RUNS --studies images --problems cifar10
    python examples/paper/study.py --data-dir DIR --out RUNS --device cuda --budget 500000
    python examples/paper/study.py --out RUNS --quick
    python examples/paper/report.py RUNS

DIR holds the folders mnist, fashion-mnist, cifar10 and tinyshakespeare with the published files.
A run is a line of RUNS/STUDY.jsonl, its curve included. Runs that are there are not made again, so
that a study that was interrupted goes on; report.py draws tables and figures of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterable, Iterator
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from methods import RECIPES
from pages import read
from problems import problem
from runs import Setting, train

SEEDS = (0, 1, 2)
# Two hundred times from the first to the last, in equal steps.
RATES = (0.003, 0.007, 0.017, 0.042, 0.1, 0.25, 0.6)
# How many examples a run of a quick study sees.
QUICK_BUDGET = 600
# Where the first seed lost by more than this, other seeds are not tried.
HOPELESS = 1.15


class Study(NamedTuple):
    """What is compared on what."""

    budgets: dict[str, int]
    recipes: tuple[str, ...]
    rates: tuple[float, ...]
    # Whether learning rates far from a recipe's best are tried with one seed only.
    is_pruned: bool = False


IMAGE_RECIPES = (
    *("CABS", "norm test", "noise scale", "constant 16", "constant 32", "constant 128"),
    *("constant 512", "constant 16, decay"),
)
STUDIES: dict[str, Study] = {
    "images": Study(
        {"mnist": 16_000, "fashion-mnist": 16_000, "cifar10": 24_000}, IMAGE_RECIPES, RATES, True
    ),
    "moments": Study({"fashion-mnist": 8_000}, ("CABS", "CABS, published moments"), (0.1, 0.25)),
    "moments-cifar10": Study({"cifar10": 12_000}, ("CABS", "CABS, published moments"), (0.25, 0.6)),
    "groups": Study(
        {"fashion-mnist": 8_000},
        ("CABS", *(f"CABS, {count} groups" for count in (2, 4, 8, 16))),
        (0.1, 0.25),
    ),
    "averages": Study({"mnist": 8_000}, ("CABS", "CABS, published averages"), (0.1, 0.25, 0.6)),
    "floor": Study(
        {"fashion-mnist smoothed": 8_000},
        ("CABS", "CABS, floor of the labels", "constant 16", "constant 128"),
        (0.1, 0.25),
    ),
    "text": Study(
        {"tinyshakespeare": 8_000},
        (
            *("CABS from 4", "CABS from 4, floor 1", "CABS from 4, floor 1.4"),
            *("constant 4", "constant 16", "constant 64"),
        ),
        (0.3, 1.0),
    ),
    "momentum": Study(
        {"fashion-mnist": 8_000},
        (
            *("CABS, momentum", "CABS, momentum, effective rate"),
            *("constant 16, momentum", "constant 128, momentum"),
        ),
        (0.01, 0.03),
    ),
    "decay": Study(
        {"fashion-mnist": 8_000},
        ("CABS", "CABS, weight decay", "CABS, weight decay, penalty in the loss"),
        (0.1, 0.25),
    ),
}


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="the folder that holds folders of files")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the runs")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--problems", nargs="+", help="only these; all of each study otherwise")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="only these")
    parser.add_argument("--budget", type=int, help="examples that a run may see, in place of ours")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run on a CPU")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="minutes: little of every study, on bundled digits if there is no --data-dir",
    )
    return parser.parse_args()


def studies(options: argparse.Namespace) -> dict[str, Study]:
    """Return what the command line asks for, study by study."""
    chosen = {}
    for name in options.studies:
        study = STUDIES[name]
        if options.quick:
            study = quick(study, has_data=options.data_dir is not None)
        budgets = {
            one: options.budget or budget
            for one, budget in study.budgets.items()
            if not options.problems or one in options.problems
        }
        recipes = tuple(
            one for one in study.recipes if not options.recipes or one in options.recipes
        )
        chosen[name] = study._replace(budgets=budgets, recipes=recipes)
    return chosen


def quick(study: Study, *, has_data: bool) -> Study:
    """Return a study with little of everything, of bundled digits where there are no data."""
    problems = dict.fromkeys(study.budgets, QUICK_BUDGET)
    if not has_data:
        images = [one for one in problems if one != "tinyshakespeare"]
        problems = {f"digits {one.partition(' ')[2]}".strip(): QUICK_BUDGET for one in images}
    return study._replace(budgets=problems, rates=study.rates[-2:-1])


def settings(study: Study, seed: int, done: Iterable[dict[str, Any]]) -> Iterator[Setting]:
    """Yield the runs of a study with a seed, given those of the seeds before."""
    for one, budget in study.budgets.items():
        for recipe in study.recipes:
            losses = {
                run["learning_rate"]: _comparable(run["final_loss"])
                for run in done
                if (run["problem"], run["recipe"], run["seed"]) == (one, recipe, SEEDS[0])
            }
            for rate in study.rates:
                is_hopeless = losses.get(rate, 0.0) > HOPELESS * min(losses.values(), default=0.0)
                if not (study.is_pruned and seed != SEEDS[0] and is_hopeless):
                    yield Setting(one, recipe, rate, seed, budget)


def _comparable(loss: float | None) -> float:
    return math.inf if loss is None else loss


class _Runner:
    """Trains in a process of its own, which keeps the problems that it has read."""

    def __init__(self, data_dir: Path | None, device: str, threads: int) -> None:
        self._data_dir, self._device, self._threads = data_dir, device, threads

    def __call__(self, task: tuple[str, Setting]) -> tuple[str, dict[str, Any]]:
        torch.set_num_threads(self._threads)
        study, setting = task
        try:
            found = _problem(setting.problem, self._data_dir, self._device)
        except SystemExit as error:
            # That would end this process, and leave the other one waiting.
            raise RuntimeError(str(error)) from error
        run = train(setting, found, self._device)
        on = {"device": self._device, "torch": torch.__version__, "machine": platform.machine()}
        return study, {**run, **on}


# The data of one problem are hundreds of megabytes.
_problem = lru_cache(maxsize=2)(problem)


def main() -> None:
    """Make the runs that are missing, seed by seed, so that what is there can be compared."""
    options = arguments()
    if options.data_dir is None and not options.quick:
        raise SystemExit("the study needs --data-dir, the folder that holds folders of files")
    options.out.mkdir(parents=True, exist_ok=True)
    runner = _Runner(options.data_dir, options.device, options.threads)
    with get_context("spawn").Pool(options.jobs) as pool:
        for seed in range(1 if options.quick else options.seeds):
            tasks: list[tuple[str, Setting]] = []
            for name, study in studies(options).items():
                path = options.out / f"{name}.jsonl"
                done = read(path) if path.exists() else []
                known = {Setting(*(run[field] for field in Setting._fields)) for run in done}
                wanted = settings(study, seed, done)
                tasks += [(name, one) for one in wanted if one not in known]
            results = pool.imap_unordered(runner, tasks)
            for name, run in tqdm(results, f"seed {seed}", len(tasks), unit=" runs"):
                with (options.out / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
