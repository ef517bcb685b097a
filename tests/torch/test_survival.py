"""Training that is killed goes on as if it had been left alone, and leaves nobody behind."""

import os
import sys
import threading
from pathlib import Path

import pytest
import torch

import cabs_torch
from tests.processes import finished

HERE = Path(__file__).parent
KILLS = int(os.environ.get("CABS_KILLS", "3"))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "options"), [(0, []), (2, []), (2, ["--drop-last"])])
def test_a_killed_run_is_the_one_that_was_left_alone(tmp_path, workers, options):
    command = [sys.executable, HERE / "survival.py", tmp_path / "runs"]
    command += ["--kills", str(KILLS), "--workers", str(workers), *options]
    done = finished(command, limit=300.0 + 10.0 * KILLS)
    # Workers whose parent was killed complain before they end; that is all there may be.
    assert done.returncode == 0, done.stderr
    assert f"{KILLS} kills" in done.stdout
    assert "all equal to the bit" in done.stdout
    print(done.stdout)


@pytest.mark.slow
# A process that is started anew has first to import everything.
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fork", ["--kills", "100"]),
        ("fork", ["--kills", "20", "--without-handles"]),
        ("spawn", ["--kills", "4", "--longest", "8"]),
        ("forkserver", ["--kills", "4", "--longest", "8"]),
    ],
)
def test_workers_end_when_whoever_started_them_is_gone_whenever_that_was(method, options):
    done = finished([sys.executable, "-W", "ignore", HERE / "orphans.py", method, *options])
    assert done.returncode == 0, done.stderr
    assert "none of which is left" in done.stdout


def test_workers_live_on_when_the_thread_that_started_them_has_ended():
    loader = cabs_torch.loader(list(range(400)), 10, num_workers=2, shuffle=False)
    with loader:
        batches, drawn = iter(loader), []
        thread = threading.Thread(target=lambda: drawn.append(next(batches)))
        thread.start()
        thread.join()
        drawn.extend(batches)
    assert torch.cat(drawn).tolist() == list(range(400))
