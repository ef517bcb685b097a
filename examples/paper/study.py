"""Reruns the paper's study, and what it leaves open, with equal budgets of examples.

    python examples/paper/study.py --data-dir DIR --out RUNS
    python examples/paper/study.py --data-dir DIR --out RUNS --studies images --problems cifar10
    python examples/paper/study.py --data-dir DIR --out LARGE --device cuda --budget 500000
    python examples/paper/study.py --out QUICK --quick
    python examples/paper/report.py RUNS

DIR holds the folders mnist, fashion-mnist, cifar10 and tinyshakespeare with the published files.
A run is a line of RUNS/STUDY.jsonl, its curve included. Runs that are there are not made again, so
that a study that was interrupted goes on; report.py draws tables and figures of what is there.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
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

SEEDS = 3
# Two hundred times from the first to the last, in equal steps.
RATES = (0.003, 0.007, 0.017, 0.042, 0.1, 0.25, 0.6)
# How many examples a run of a quick study sees.
QUICK_BUDGET = 600
# Learning rates at which nothing is best with our budgets; one seed is enough to say so.
FAR = (0.003, 0.007, 0.6)


class Study(NamedTuple):
    """What is compared on what."""

    budgets: dict[str, int]
    recipes: tuple[str, ...]
    rates: tuple[float, ...]
    # Learning rates that are tried with the first seed only.
    once: tuple[float, ...] = ()


IMAGE_RECIPES = (
    *("CABS", "norm test 0.5", "norm test 0.9", "noise scale", "constant 16", "constant 32"),
    *("constant 128", "constant 512", "constant 16, decay"),
)
STUDIES: dict[str, Study] = {
    "images": Study(
        {"mnist": 16_000, "fashion-mnist": 16_000, "cifar10": 24_000}, IMAGE_RECIPES, RATES, FAR
    ),
    # A whole epoch, where the loss comes down so far that the rule asks for more.
    "epoch": Study(
        {"mnist": 60_000},
        (
            *("CABS", "norm test 0.9", "constant 16", "constant 32", "constant 128"),
            *("constant 16, decay", "CABS, decay"),
        ),
        (0.042, 0.1, 0.25),
        once=(0.25,),
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
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from seed 0 on")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run on a CPU")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute: little of every study, on bundled digits if there is no --data-dir",
    )
    options = parser.parse_args()
    if options.data_dir is None and not options.quick:
        parser.error("the study needs --data-dir, the folder that holds folders of files")
    if options.quick:
        options.seeds = 1
    return options


def offered(options: argparse.Namespace) -> dict[str, Study]:
    """Return the studies that the command line names, whole or quick."""
    studies = {name: STUDIES[name] for name in options.studies}
    if not options.quick:
        return studies
    has_data = options.data_dir is not None
    return {name: quick(study, has_data=has_data) for name, study in studies.items()}


def chosen_of(studies: dict[str, Study], options: argparse.Namespace) -> dict[str, Study]:
    """Return what of these studies the command line asks for."""
    chosen = {}
    for name, study in studies.items():
        budgets = {
            one: options.budget or budget
            for one, budget in study.budgets.items()
            if not options.problems or one in options.problems
        }
        recipes = tuple(
            one for one in study.recipes if not options.recipes or one in options.recipes
        )
        # With another budget, other learning rates are the best.
        once = () if options.budget else study.once
        if budgets and recipes:
            chosen[name] = study._replace(budgets=budgets, recipes=recipes, once=once)
    return chosen


def checked(options: argparse.Namespace) -> dict[str, Study]:
    """Return what is to be run, or say in one line what is wrong, before anything is trained."""
    studies = offered(options)
    chosen = chosen_of(studies, options)
    if not chosen:
        problems = dict.fromkeys(one for study in studies.values() for one in study.budgets)
        recipes = dict.fromkeys(one for study in studies.values() for one in study.recipes)
        raise SystemExit(
            "nothing is left to run: these studies have the problems "
            f"{', '.join(problems) or 'of --data-dir only'} and the recipes {'; '.join(recipes)}"
        )
    if options.data_dir is not None:
        folders = {one.partition(" ")[0] for study in chosen.values() for one in study.budgets}
        missing = sorted(one for one in folders if not (options.data_dir / one).is_dir())
        if missing:
            raise SystemExit(
                f"--data-dir {options.data_dir} does not hold {', '.join(missing)}; give the "
                "folder that holds their folders, or leave them out with --problems"
            )
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        message = f"--device {options.device} cannot be used here: {error}".splitlines()[0]
        raise SystemExit(message) from error
    return chosen


def quick(study: Study, *, has_data: bool) -> Study:
    """Return a study with little of everything, of bundled digits where there are no data."""
    problems = dict.fromkeys(study.budgets, QUICK_BUDGET)
    if not has_data:
        images = [one for one in problems if one != "tinyshakespeare"]
        problems = {f"digits {one.partition(' ')[2]}".strip(): QUICK_BUDGET for one in images}
    return study._replace(budgets=problems, rates=study.rates[-2:-1])


def settings(study: Study, seed: int, device: str) -> Iterator[Setting]:
    """Yield the runs of a study with a seed."""
    for one, budget in study.budgets.items():
        for recipe in study.recipes:
            for rate in study.rates:
                if seed == 0 or rate not in study.once:
                    yield Setting(one, recipe, rate, seed, budget, device)


class _Runner:
    """Trains in a process of its own, which keeps the problems that it has read."""

    def __init__(self, data_dir: Path | None, threads: int) -> None:
        self._data_dir, self._threads = data_dir, threads

    def __call__(self, task: tuple[str, Setting]) -> tuple[str, dict[str, Any]]:
        torch.set_num_threads(self._threads)
        study, setting = task
        try:
            found = _problem(setting.problem, self._data_dir, setting.device)
        except SystemExit as error:
            # That would end this process, and leave the other one waiting.
            raise FileNotFoundError(str(error)) from error
        run = train(setting, found)
        return study, {**run, "torch": torch.__version__, "machine": platform.machine()}


# The data of one problem are hundreds of megabytes.
_problem = lru_cache(maxsize=2)(problem)


def main() -> None:
    """Make the runs that are missing, seed by seed, so that each can be compared early."""
    options = arguments()
    chosen = checked(options)
    options.out.mkdir(parents=True, exist_ok=True)
    runner = _Runner(options.data_dir, options.threads)
    with get_context("spawn").Pool(options.jobs) as pool:
        for seed in range(options.seeds):
            tasks: list[tuple[str, Setting]] = []
            for name, study in chosen.items():
                path = options.out / f"{name}.jsonl"
                done = read(path) if path.exists() else []
                known = {Setting(*(run[field] for field in Setting._fields)) for run in done}
                wanted = settings(study, seed, options.device)
                tasks += [(name, one) for one in wanted if one not in known]
            results = pool.imap_unordered(runner, tasks)
            try:
                for name, run in tqdm(results, f"seed {seed}", len(tasks), unit=" runs"):
                    with (options.out / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                        file.write(json.dumps(run) + "\n")
            except FileNotFoundError as error:
                raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
