"""What several processes train together is what one process trains."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.jax.test_devices_properties import CASES
from tests.processes import finished

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_processes_are_one_process():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "tests.jax.processes", str(port), "2"]
    run = partial(finished, limit=300.0, cwd=ROOT)
    with ThreadPoolExecutor() as pool:
        ended = [*pool.map(run, ([*program, str(rank)] for rank in range(2)))]
    for one in ended:
        assert one.returncode == 0, one.stderr
        for engine, way in CASES:
            assert f"as one process: {engine}, {way}\n" in one.stdout
