"""The example for Keras trains with model.fit, and shows nothing but its progress."""

import re
import sys
from pathlib import Path

import pytest

import cabs
from tests.processes import finished

EXAMPLE = Path(__file__).parents[2] / "examples" / "keras_fit.py"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    """Leave out what the caller has set of what is shown."""
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)


def test_digits_are_learned_by_fit_while_the_batch_size_moves(tmp_path):
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--out", str(tmp_path)]
    result = finished(command)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert float(re.search(r"test accuracy (\d\.\d+)", result.stdout)[1]) >= 0.95
    assert re.search(r"accuracy: \S+ - batch_size: \S+ - loss: \S+ - noise_scale: ", result.stdout)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    log = cabs.read_run(tmp_path / "run.jsonl")
    assert sum(numbers["examples"] for numbers in log.measurements) == 8 * 1437
    sizes = {decision.batch_size for decision in log.decisions}
    assert min(sizes) == 16
    assert max(sizes) >= 32


def test_what_is_held_back_while_loading_is_shown_where_loading_fails():
    program = "import os, quiet\nwith quiet.loading():\n    os.write(2, b'held ')\n    {}"
    shown = {}
    for last in ("pass", "import nothing_of_this_name"):
        command = [sys.executable, "-c", program.format(last)]
        result = finished(command, cwd=EXAMPLE.parent)
        shown[last] = result.stderr
    assert shown["pass"] == ""
    assert shown["import nothing_of_this_name"].startswith("held Traceback")
