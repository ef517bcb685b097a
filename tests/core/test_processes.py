"""Programs that tests run: a hang is told of, with what was printed, and leaves nothing."""

import os
import re
import sys
import time

import pytest

from tests.processes import finished, killed_when

# Its child keeps what it prints to open, and says its own number.
PARENT = """
import os, sys, time
number = os.fork()
if number == 0:
    time.sleep(1000.0)
print(f"child {number}", flush=True)
print("it is stuck", file=sys.stderr, flush=True)
%s
"""


def is_there(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            return ") Z " not in file.read()
    except FileNotFoundError:
        return False


def test_a_program_that_hangs_fails_says_what_it_printed_and_is_ended_with_all_its_processes():
    hangs = [sys.executable, "-c", PARENT % "time.sleep(1000.0)"]
    with pytest.raises(AssertionError, match="did not end within 2 seconds") as failure:
        finished(hangs, limit=2.0)
    message = str(failure.value)
    assert "it is stuck" in message
    number = int(re.search(r"child (\d+)", message)[1])
    deadline = time.monotonic() + 10.0
    while is_there(number) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_there(number)


def test_a_program_is_looked_at_while_it_prints_and_all_of_that_is_told():
    program = "number = 0\nwhile True:\n    number += 1; print(number, flush=True)"
    printed = killed_when([sys.executable, "-c", program], lambda printed: "\n500\n" in printed)
    lines = printed.split("\n")[:-1]
    assert lines == [str(number) for number in range(1, 1 + len(lines))]


def test_what_a_program_leaves_behind_holds_nobody_up():
    done = finished([sys.executable, "-c", PARENT % "os._exit(3)"], limit=60.0)
    assert (done.returncode, done.stderr) == (3, "it is stuck\n")
    os.kill(int(done.stdout.split()[1]), 9)
