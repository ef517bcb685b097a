"""The documentation's tables say what was measured."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks"


@pytest.fixture
def report():
    path = ROOT / "tests" / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_is_that_of_its_result(report):
    names = set()
    for name, result in report.results(RESULTS):
        names.add(name)
        assert (RESULTS / f"{name}.inc").read_text(encoding="utf-8") == report.text(name, result)
    assert {path.stem for path in RESULTS.glob("*.inc")} == names
    assert names >= {"core", "steps_torch", "peers_torch", "growth_torch"}


def test_overhead_is_compared_with_the_best_of_the_others(report):
    found = {
        "cabs": {"on : off": {"median": 1.1}},
        "one": {"on : off": {"median": 1.5}},
        "another": {"on : off": {"median": 3.0}},
        "a third": {"refused": "no"},
    }
    assert report.part_of_best(found) == "0.20"
    assert report.part_of_best({"cabs": found["cabs"], "a third": found["a third"]}) == (
        "no other does it"
    )
