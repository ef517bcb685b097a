"""The language model learns from any text, with its tables tied, while CABS sets the batch size."""

import re
import sys
from pathlib import Path

import pytest

import cabs
from tests.processes import finished

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "shakespeare.py"
PLAYS = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"


def run(*options):
    command = [sys.executable, "-W", "error", str(EXAMPLE), *map(str, options)]
    return finished(command)


@pytest.mark.parametrize(
    "text",
    [
        ROOT / "README.md",
        pytest.param(
            PLAYS,
            marks=pytest.mark.skipif(not PLAYS.exists(), reason="the plays are not at hand"),
        ),
    ],
)
def test_the_loss_falls(tmp_path, text, backend):
    small = ("--steps", 60, "--width", 32, "--layers", 2, "--length", 32)
    result = run("--text", text, "--backend", backend, "--out", tmp_path, *small)
    assert result.returncode == 0, result.stderr
    first, last = map(float, re.search(r"loss (.*) at first, (.*) at last", result.stdout).groups())
    assert last < first - 0.3
    log = cabs.read_run(tmp_path / "run.jsonl")
    assert len(log.decisions) == 60
    assert not any(decision.held for decision in log.decisions)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_text_is_said_in_one_line(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("To be")
    for text, message in (("nowhere", "there is no"), (short, "must hold more than 64")):
        result = run("--text", text, "--out", tmp_path)
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr
