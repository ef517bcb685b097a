"""Writing a run log: what was decided, whole after a kill and a resume too."""

import json
import os
import resource
import signal
import sys
from contextlib import contextmanager

import pytest

from cabs import Controller, RunLog, read_run
from tests.core.logs import write
from tests.core.strategies import feed
from tests.processes import killed_when

pytestmark = pytest.mark.filterwarnings("ignore:the batch size is 1:RuntimeWarning")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


@contextmanager
def full_disk(size):
    """Let no file grow beyond a size, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


def test_the_header_says_format_version_and_settings(path):
    write(path, Controller(16, smoothing=0.9), 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4
    assert (lines[0]["format"], lines[0]["version"]) == ("cabs.run_log", 1)
    assert lines[0]["start"]["configuration"]["smoothing"] == 0.9
    assert lines[1]["measurements"] == {"examples": 16, "accuracy": 0.5}


PROGRAM = """
import sys
from cabs import Controller, RunLog
controller = Controller(16)
log = RunLog(sys.argv[1], controller)
while True:
    log.write(controller.update(learning_rate=0.1, variance_trace=500.0, loss=1.0))
    print(controller.step, flush=True)
"""


def test_a_killed_run_loses_at_most_the_line_being_written(path):
    command = [sys.executable, "-c", PROGRAM, str(path)]
    written = killed_when(command, lambda printed: printed.count("\n") >= 50).split("\n")[:-1]
    run = read_run(path)
    assert len(run.decisions) >= int(written[-1])
    assert [decision.step for decision in run.decisions] == list(range(len(run.decisions)))


@pytest.mark.parametrize("saved_at", [0, 3, 5])
@pytest.mark.parametrize("cut", [0, 30])
@pytest.mark.parametrize("opened_first", [False, True])
def test_a_resumed_run_leaves_the_log_of_an_uninterrupted_one(
    path, tmp_path, saved_at, cut, opened_first
):
    write(tmp_path / "whole.jsonl", Controller(16), 9)
    controller = Controller(16)
    write(path, controller, saved_at)
    state = controller.state_dict()
    write(path, controller, 2, mode="a")
    os.truncate(path, path.stat().st_size - cut)
    before = path.read_bytes()
    resumed = Controller(16)
    if not opened_first:
        resumed.load_state_dict(state)
    with RunLog(path, resumed, mode="a") as log:
        assert path.read_bytes() == before
        resumed.load_state_dict(state)
        for step in range(saved_at, 9):
            decision = resumed.update(
                learning_rate=0.1, variance_trace=100.0 + 50.0 * step, loss=1.0
            )
            log.write(decision, examples=16, accuracy=0.5)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    # What was set aside ends with a whole line, so that more can be set aside behind it.
    dropped = (tmp_path / "run.jsonl.dropped").read_bytes()
    assert dropped.endswith(b"\n")
    tail = dropped[:-1] if cut else dropped
    assert before.endswith(tail)
    assert path.read_bytes().startswith(before[: len(before) - len(tail)])


@pytest.mark.parametrize("left", [b"", b'{"format', b'{"format": "cabs.run_log", "version'])
def test_a_run_killed_before_its_header_was_whole_starts_anew(path, left):
    path.write_bytes(left)
    decisions = write(path, Controller(16), 2, mode="a")
    assert read_run(path).decisions == decisions


def test_some_other_file_is_not_taken_for_a_log_that_was_just_begun(path):
    path.write_bytes(b"my notes")
    with pytest.raises(ValueError, match="no whole line"):
        RunLog(path, Controller(16), mode="a")
    assert path.read_bytes() == b"my notes"


def test_the_log_of_another_run_with_the_same_settings_is_not_continued(path):
    write(path, Controller(16), 5)
    before = path.read_bytes()
    other = Controller(16)
    feed(other, [{"learning_rate": 0.1, "variance_trace": 9000.0, "loss": 1.0}] * 5)
    with pytest.raises(ValueError, match="does not follow from what"):
        write(path, other, 1, mode="a")
    assert path.read_bytes() == before


def test_a_line_that_could_not_be_written_is_taken_back(path):
    controller = Controller(16)
    with RunLog(path, controller) as log:
        log.write(controller.update(learning_rate=0.1, variance_trace=9.0, loss=1.0))
        decision = controller.update(learning_rate=0.1, variance_trace=9.0, loss=1.0)
        with full_disk(path.stat().st_size + 50):
            for _ in range(2):
                with pytest.raises(OSError, match=r"only 50 of \d+ bytes"):
                    log.write(decision)
        log.write(decision)
    assert read_run(path).decisions[1] == decision


def test_a_log_can_start_in_the_middle_of_a_run(path):
    controller = Controller(16)
    feed(controller, [{"learning_rate": 0.1, "variance_trace": 300.0, "loss": 1.0}] * 4)
    decisions = write(path, controller, 2, mode="a")
    run = read_run(path)
    assert (run.start.step, run.decisions) == (4, decisions)


def test_a_log_with_a_gap_or_other_settings_is_not_continued(path):
    write(path, Controller(16), 2)
    before = path.read_bytes()
    ahead = Controller(16)
    feed(ahead, [{"learning_rate": 0.1, "variance_trace": 300.0, "loss": 1.0}] * 4)
    with pytest.raises(ValueError, match="holds 2 decisions from step 0 on, and cannot go on with"):
        write(path, ahead, 1, mode="a")
    with pytest.raises(ValueError, match=r"other settings: every = 1 there and 2 here"):
        RunLog(path, Controller(16, every=2), mode="a")
    assert path.read_bytes() == before


def test_a_log_that_exists_is_not_overwritten_unasked(path):
    write(path, Controller(16), 2)
    with pytest.raises(FileExistsError):
        RunLog(path, Controller(16))
    assert len(read_run(path).decisions) == 2
    write(path, Controller(16), 1, mode="w")
    assert len(read_run(path).decisions) == 1


def test_decisions_are_written_once_and_in_order(path):
    controller = Controller(16)
    with RunLog(path, controller) as log:
        decision = controller.update(learning_rate=0.1, variance_trace=9.0, loss=1.0)
        log.write(decision)
        with pytest.raises(
            ValueError, match=r"of step 0 does not follow from what .* goes on with step 1"
        ):
            log.write(decision)


def test_the_decisions_of_another_controller_are_refused(path):
    controller, other = Controller(16), Controller(16)
    feed(other, [{"learning_rate": 0.1, "variance_trace": 9000.0, "loss": 1.0}] * 2)
    with RunLog(path, controller) as log:
        for _ in range(2):
            log.write(controller.update(learning_rate=0.1, variance_trace=9.0, loss=1.0))
        controller.load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match="after loading a state open its log again"):
            log.write(controller.update(learning_rate=0.1, variance_trace=9.0, loss=1.0))
    assert len(read_run(path).decisions) == 2


def test_two_logs_on_one_path_notice_each_other(path):
    first, second = Controller(16), Controller(16)
    write(path, first, 2)
    second.load_state_dict(first.state_dict())
    observation = {"learning_rate": 0.1, "variance_trace": 9.0, "loss": 1.0}
    with RunLog(path, first, mode="a") as one, RunLog(path, second, mode="a") as two:
        one.write(first.update(**observation))
        with pytest.raises(ValueError, match="was changed by somebody else"):
            two.write(second.update(**observation))
        one.write(first.update(**observation))
    assert len(read_run(path).decisions) == 4


def test_a_measurement_that_is_no_number_changes_nothing(path):
    write(path, Controller(16), 3)
    before = path.read_bytes()
    controller = Controller(16)
    with RunLog(path, controller, mode="a") as log:
        decision = controller.update(learning_rate=0.1, variance_trace=100.0, loss=1.0)
        with pytest.raises(TypeError, match="examples must be a number"):
            log.write(decision, examples="16")
    assert path.read_bytes() == before


def test_on_a_full_disk_no_empty_log_is_left(path):
    with full_disk(20), pytest.raises(OSError, match="only 20 of"):
        RunLog(path, Controller(16))
    assert not path.exists()


def test_an_unknown_mode_is_refused(path):
    with pytest.raises(ValueError, match="mode must be 'x', 'w' or 'a', got mode = 'r'"):
        RunLog(path, Controller(16), mode="r")
