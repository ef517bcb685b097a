"""The study by time judges what it says it judges, and a quick one leaves its tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.processes import finished

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture
def report(module):
    return module("seconds_report")


def runs_of(report, methods):
    """Return runs whose loss is a power of the time, for each method and seed by how fast it is."""
    rows = []
    for method, by_seed in methods.items():
        for seed, faster in by_seed.items():
            curve = []
            for share in np.geomspace(1e-3, 1.0, 200):
                steps = share * report.COMPARISONS["mnist"].budgets[1024] / (1024 + 100)
                curve.append((steps, 100 * steps, (share * faster) ** -0.5))
            row = {"problem": "mnist", "optimizer": "SGD", "rate": 0.1, "overhead": 1024}
            rows.append({**row, "method": method, "seed": seed, "curve": curve})
    return rows


def test_a_rule_that_is_twice_as_fast_takes_half_of_the_time(report):
    methods = {
        "constant 16": {1: 1.0, 2: 1.0},
        "constant 32": {1: 0.8, 2: 0.8},
        "Progress": {1: 2.0, 2: 2.0},
        "CABS": {1: 0.5, 2: 0.5},
    }
    (cell, found), *_ = report.curves_of(runs_of(report, methods)).items()
    assert (cell.optimizer, cell.overhead) == ("SGD", 1024)
    judged = report.ratios(found)
    assert judged["constant 16"][0] == pytest.approx(1.0, rel=0.04)
    assert judged["Progress"][0] == pytest.approx(0.5, rel=0.04)
    assert judged["Progress"][1] == pytest.approx(2.0**-0.5, rel=0.01)
    assert judged["CABS"][0] == pytest.approx(2.0, rel=0.04)


def test_the_constant_is_chosen_on_one_seed_and_judged_on_another(report):
    # Luck makes one constant the best on either seed, and the other on the other.
    methods = {
        "constant 16": {1: 2.0, 2: 1.0},
        "constant 32": {1: 1.0, 2: 2.0},
        "CABS": {1: 1.0, 2: 1.0},
    }
    (found,) = report.curves_of(runs_of(report, methods)).values()
    assert report.ratios(found)["CABS"][0] == pytest.approx(1.0, rel=0.04)


def test_a_quick_study_by_the_machine_s_clock_leaves_a_table(tmp_path, module, monkeypatch):
    options = ["--out", str(tmp_path), "--quick"]
    result = finished([sys.executable, str(PAPER / "wall_clock.py"), *options])
    assert result.returncode == 0, result.stderr
    runs = (tmp_path / "wall_clock.jsonl").read_text()
    assert len(runs.splitlines()) == 3 * 9 * 2
    # What is there is not made again.
    monkeypatch.setattr(sys, "argv", ["wall_clock.py", *options])
    module("wall_clock").main()
    assert (tmp_path / "wall_clock.jsonl").read_text() == runs
    page = (tmp_path / "wall-clock.inc").read_text()
    assert (
        page.count("- Progress\n") == page.count("every 10") == page.count("- constant 16\n") == 3
    )


def test_seconds_to_a_loss_are_compared_with_the_best_constant_s(module):
    wall_clock = module("wall_clock")
    seconds = np.linspace(0.1, 10.0, 100)
    curves = {
        name: dict.fromkeys((11, 12), (seconds, 1.0 / (faster * seconds)))
        for name, faster in {"constant 16": 1.0, "constant 32": 0.5, "Progress": 2.0}.items()
    }
    times = wall_clock.times_of(curves)
    assert times["constant 16"] == [1.0] * 4
    assert np.mean(times["constant 32"]) == pytest.approx(2.0, rel=0.05)
    assert np.mean(times["Progress"]) == pytest.approx(0.5, rel=0.05)


def test_rates_and_sizes_of_what_decays_are_chosen_on_one_seed_and_judged_on_another(report):
    methods = {
        "constant 16": {1: 1.0, 2: 1.0},
        # Luck again.
        "constant 16, cosine": {1: 16.0, 2: 1.0},
        "constant 32, cosine": {1: 1.0, 2: 16.0},
        "Progress": {1: 0.25, 2: 0.25},
        "Progress, cosine": {1: 4.0, 2: 4.0},
    }
    (row,) = report.decays_of(report.curves_of(runs_of(report, methods)))
    assert row == ("SGD", "1024", "1.00", "1.00", "2.00", "0.50")


def test_a_quick_study_leaves_tables_and_a_figure(tmp_path, module, monkeypatch):
    options = ["--out", str(tmp_path), "--quick", "--seeds", "2"]
    result = finished([sys.executable, str(PAPER / "seconds.py"), *options])
    assert result.returncode == 0, result.stderr
    runs = [json.loads(line) for line in (tmp_path / "seconds.jsonl").read_text().splitlines()]
    assert {run["optimizer"] for run in runs} == {"SGD", "momentum", "AdamW"}
    assert all(run["curve"] for run in runs)
    # What is there is not made again.
    monkeypatch.setattr(sys, "argv", ["seconds.py", *options])
    module("seconds").main()
    assert len((tmp_path / "seconds.jsonl").read_text().splitlines()) == len(runs)
    result = finished([sys.executable, str(PAPER / "seconds_report.py"), str(tmp_path)])
    assert result.returncode == 0, result.stderr
    assert "Progress, measured" in (tmp_path / "seconds.inc").read_text()
    assert "h = 8192" in (tmp_path / "seconds-overheads.inc").read_text()
    assert "Progress, cosine" in (tmp_path / "seconds-decay.inc").read_text()
    assert (tmp_path / "seconds.svg").read_bytes().startswith(b"<?xml")
