"""A training run that is killed again and again is the run that was left alone, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("CABS_KILLS", "5"))


@pytest.mark.parametrize(("workers", "options"), [(0, []), (2, []), (2, ["--drop-last"])])
def test_a_killed_run_is_the_one_that_was_left_alone(tmp_path, workers, options):
    script = Path(__file__).with_name("survival.py")
    command = [sys.executable, script, tmp_path / "runs"]
    command += ["--kills", str(KILLS), "--workers", str(workers), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # Workers whose parent was killed complain before they end; that is all there may be.
    assert done.returncode == 0, done.stderr
    assert f"{KILLS} kills" in done.stdout
    assert "all equal to the bit" in done.stdout
    print(done.stdout)
