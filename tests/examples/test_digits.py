"""The example does what the README promises, on small budgets."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

import cabs
from tests.processes import finished

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.py"
DATA = Path(__file__).parents[3] / "shared" / "data"


def run(out, *options, starter=("-W", "error"), says="batch sizes from"):
    command = [sys.executable, *starter, str(EXAMPLE), "--out", str(out), *options]
    result = finished(command)
    # Its end says why, after what every step has shown.
    assert result.returncode == 0, result.stderr[-5000:]
    accuracy = re.search(r"test accuracy (\d\.\d+)", result.stdout)
    assert accuracy, result.stdout
    assert re.search(says, result.stdout), result.stdout
    assert "batch=" in result.stderr
    assert (out / "run.png").read_bytes().startswith(b"\x89PNG")
    return float(accuracy[1]), cabs.read_run(out / "run.jsonl")


@pytest.fixture(scope="module")
def learned(tmp_path_factory, backend):
    return run(tmp_path_factory.mktemp("learned"), "--backend", backend, "--epochs", "8")


def test_digits_are_learned_while_the_batch_size_moves(learned):
    accuracy, log = learned
    assert accuracy >= 0.95
    assert sum(numbers["examples"] for numbers in log.measurements) == 8 * 1437
    sizes = {decision.batch_size for decision in log.decisions}
    assert min(sizes) == 16
    assert max(sizes) >= 32


def test_the_rule_for_the_least_time_measures_what_a_step_costs(tmp_path):
    options = ("--backend", "numpy", "--epochs", "8", "--rule", "progress")
    _, log = run(tmp_path, *options, says=r"as long as \d+ examples more, give or take \d+")
    reasons = [decision.reason.value for decision in log.decisions]
    assert 16 <= reasons.count("exploring") <= 96
    assert all(decision.observation.seconds > 0.0 for decision in log.decisions[1:])


def test_any_loop_will_do(tmp_path):
    accuracy, log = run(tmp_path, "--backend", "numpy", "--epochs", "3")
    assert accuracy >= 0.90
    assert sum(numbers["examples"] for numbers in log.measurements) == 3 * 1437


def test_the_same_seed_gives_the_same_run_to_the_bit(tmp_path, learned, backend):
    _, log = learned
    _, again = run(tmp_path, "--backend", backend, "--epochs", "1")
    steps = len(again.decisions)
    first = {"decisions": log.decisions[:steps], "measurements": log.measurements[:steps]}
    assert again == dataclasses.replace(log, **first)
    assert sum(numbers["examples"] for numbers in again.measurements) == 1437


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not beside the checkout")
def test_published_files_are_read(tmp_path):
    options = ("--backend", "numpy", "--epochs", "1", "--learning-rate", "0.02")
    accuracy, _ = run(
        tmp_path, "--data", "fashion-mnist", "--data-dir", str(DATA / "fashion-mnist"), *options
    )
    assert accuracy > 0.75


def test_a_missing_folder_is_said_in_one_line(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--data", "mnist", "--out", str(tmp_path)]
    for options, message in (([], "needs --data-dir"), (["--data-dir", "nowhere"], "there is no")):
        result = finished([*command, *options])
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr
