"""Reading a run log: what is read is what was decided, and all else is refused."""

import json
import math
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from cabs import Controller, RunLog, read_run
from cabs.control import decide
from cabs.runs import records
from cabs.runs.replay import NotDecidedError, Replay
from tests.core.logs import write
from tests.core.strategies import controllers, feed, observations

pytestmark = pytest.mark.filterwarnings("ignore:the batch size is 1:RuntimeWarning")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


@given(controllers(), observations)
def test_every_decision_reads_back_to_the_bit_and_can_be_recomputed(controller, observed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        with RunLog(path, controller) as log:
            decisions = feed(controller, observed)
            for decision in decisions:
                log.write(decision)
        run = read_run(path)
    assert repr(run.decisions) == repr(decisions)
    assert run.configuration == controller.configuration
    assert not run.cut_off
    state = run.start
    for decision in run.decisions:
        state, recomputed = decide(run.configuration, state, decision.observation)
        assert repr(recomputed) == repr(decision)


def test_values_that_are_not_finite_stay_json(path):
    controller = Controller(16)
    with RunLog(path, controller) as log:
        decision = controller.update(
            learning_rate=math.inf, variance_trace=[math.nan, -math.inf], loss=1.0
        )
        log.write(decision, accuracy=math.nan, examples=np.int64(16), decision=1)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    run = read_run(path)
    assert repr(run.decisions) == repr([decision])
    assert math.isnan(run.measurements[0]["accuracy"])
    assert type(run.measurements[0]["examples"]) is int


def test_a_line_that_was_cut_off_is_left_out_and_said(path):
    decisions = write(path, Controller(16), 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    run = read_run(path)
    assert run.cut_off
    assert run.decisions == decisions[:2]


def write_spoiled(path, steps, old, new):
    """Write some steps of a run, and replace what the first decision's line holds."""
    write(path, Controller(16), steps)
    header, line, rest = path.read_bytes().split(b"\n", 2)
    assert old in line
    path.write_bytes(b"\n".join([header, line.replace(old, new, 1), rest]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole line"),
        (b"no newline", "no whole line"),
        (b"text\n", "its first line is no JSON"),
        (b"[]\n", "is no run log"),
        (b"{}\n", "is no run log"),
        (b"\xff\xfe\n", "is no run log"),
        (b'{"format": "cabs.run_log", "version": 7}\n', "version 7, expected 1"),
        (b'{"format": "cabs.run_log", "version": 1}\n', "line 1: this is no state"),
    ],
)
def test_what_is_no_run_log_is_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_run(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"batch_size": 16', b'"batch_size": 90', "batch_size = 90, recomputed 16"),
        (b'"loss": 1.0', b'"loss": 1e400', "loss = Infinity, which is no number"),
        (b'"learning_rate": 0.1', b'"learning_rate": []', "it has no learning_rate"),
        (b'"loss": 1.0', b'"loss": 1.0, "loss": 1.0', "names a value twice"),
        (b'"loss": 1.0', b'"loss": ' + b"[" * 100_000, "nested too deeply"),
        (b'"reason": "minimum"', b'"reason": "rule"', "reason = rule, recomputed minimum"),
        (b'"step": 0', b'"step": 1', "step = 1, recomputed 0"),
    ],
)
def test_a_line_that_was_not_decided_is_refused(path, old, new, message):
    write_spoiled(path, 3, old, new)
    with pytest.raises(ValueError, match=f"line 2, .*{message}"):
        read_run(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"step": 0', b'"step": 0.0', "step = 0.0, which is no integer"),
        (b'"step": 0', b'"step": false', "step = false, which is no integer"),
        (b'"step": 0', b'"step": 00', "it is no JSON: Expecting ',' delimiter, at character 11"),
        (b'"raw": 10.0', b'"raw": true', "raw = true, which is no number"),
        (b'"raw": 10.0', b'"raw": NaN', "raw = NaN, which is no number"),
        (b'"raw": 10.0', b'"raw": "ten"', 'raw = "ten", which is no number'),
        (b'"raw": 10.0', b'"raw": 1' + b"0" * 400, "raw = 10+\\.\\.\\., which is no number"),
        (b'"raw": 10.0, ', b"", "it lacks raw"),
        (b'"reason": "minimum"', b'"reason": ["minimum"]', "which is none"),
        (b'"accuracy": 0.5', b'"accuracy": null', "measurement 'accuracy' = null"),
        (b'"accuracy"', b'"examples"', "names a value twice"),
        (b'{"examples": 16, "accuracy": 0.5}', b"[16]", "expected names and values"),
        (b'"variance_trace": 100.0', b'"variance_trace": []', "it has no variance_trace"),
        (b'"variance_trace": 100.0', b'"variance_trace": null', "variance_trace is missing"),
        (b'"learning_rate": 0.1', b'"learning_rate": -0.1', "must be at least 0"),
        (b'{"step"', b'[{"step"', "it is no JSON"),
        (b"}}", b"}} 7", "it is no JSON: Extra data"),
        (b"16", b"\xff", "byte 168 is no UTF-8"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_words(path, old, new, message):
    write_spoiled(path, 2, old, new)
    with pytest.raises(NotDecidedError, match=f"line 2, is not what was decided: .*{message}"):
        read_run(path)


def test_an_empty_line_is_refused(path):
    write(path, Controller(16), 2)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(NotDecidedError, match=r"line 4, .*it is no JSON"):
        read_run(path)


def test_the_error_says_line_step_and_every_field_that_differs(path):
    controller = Controller(16)
    feed(controller, [{"learning_rate": 0.1, "variance_trace": 300.0, "loss": 1.0}] * 4)
    write(path, controller, 3)
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b'"step": 5', b'"step": 7').replace(
            b'"reason": "rule"', b'"reason": "minimum"'
        )
    )
    with Replay(path) as replay, pytest.raises(NotDecidedError) as refused:
        list(replay)
    # The first line with a wrong reason comes before the one with a wrong step.
    assert (refused.value.line, refused.value.step) == (2, 4)
    assert refused.value.differences == {"reason": ("minimum", "rule")}
    path.write_bytes(content.replace(b'"step": 5', b'"step": 7'))
    with Replay(path) as replay, pytest.raises(NotDecidedError) as refused:
        list(replay)
    assert (refused.value.line, refused.value.step) == (3, 5)
    assert refused.value.differences == {"step": (7, 5)}
    assert (replay.state.step, replay.lines) == (5, 2)


def test_other_words_of_the_same_json_are_read_alike(path):
    decisions = write(path, Controller(16), 3)
    header, *lines = path.read_text().splitlines()
    reworded = [json.dumps(json.loads(line), sort_keys=True) for line in lines]
    path.write_text("\n".join([header, *reworded, ""]).replace("16.0", "1.6e+1"))
    assert read_run(path).decisions == decisions


def test_what_is_handed_out_is_what_follows_also_in_the_sign_of_zero(path):
    controller = Controller(16)
    with RunLog(path, controller) as log:
        log.write(controller.update(learning_rate=0.0, variance_trace=1.0, loss=1.0))
    path.write_bytes(path.read_bytes().replace(b'"raw": 0.0', b'"raw": -0.0'))
    assert math.copysign(1.0, read_run(path).decisions[0].raw) == 1.0


def test_a_sum_over_groups_that_overflows_is_written_and_read(path):
    controller = Controller(16)
    decision = controller.update(
        learning_rate=[1e-307, 1e-307], variance_trace=[1e308, 1e308], loss=1.0
    )
    assert decision.average_variance_trace == math.inf
    with RunLog(path, Controller(16)) as log:
        log.write(decision)
    assert read_run(path).decisions == [decision]


def test_reading_goes_on_where_it_stopped_and_ends_at_a_line_that_is_not_whole(path):
    decisions = write(path, Controller(16), 5)
    path.write_bytes(path.read_bytes()[:-9])
    with Replay(path) as replay:
        first, _ = next(iter(replay))
        assert (replay.lines, replay.cut_off) == (2, False)
        rest = [decision for decision, _ in replay]
        assert [first, *rest] == decisions[:4]
        assert (replay.lines, replay.cut_off) == (5, True)
        # The run writes the rest of its line.
        with path.open("ab") as file:
            file.write(b"......}}\n")
        assert list(replay) == []


def test_reading_keeps_no_decision(path):
    write(path, Controller(16), 1500)
    tracemalloc.start()
    try:
        with Replay(path) as replay:
            count = sum(1 for _ in replay)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 1500
    assert most < 150_000


@pytest.mark.parametrize(
    "observation",
    [
        {"learning_rate": 0.1, "variance_trace": 900.0, "loss": 1.5},
        {"learning_rate": 1e-05, "variance_trace": 1e16, "loss": 0.1 + 0.2},
        {"learning_rate": [0.1, 0.2], "variance_trace": [-1.0, 2e-7], "loss": 1.0},
        {"learning_rate": 0.1, "variance_trace": 900.0, "loss": -1.5},
    ],
)
def test_lines_as_they_are_written_are_read_without_a_parser_of_json(observation):
    controller = Controller(16, every=2)
    unmeasured = {name: observation[name] for name in ("learning_rate", "loss")}
    for told in (observation, unmeasured):
        decision = controller.update(**told)
        line = records.write_record(decision, {"examples": 16, "accuracy": 0.5, "shift": -3})
        read = records._read_as_written(line)
        assert repr(read) == repr(records._read_json(line))
        assert read == (decision, {"examples": 16, "accuracy": 0.5, "shift": -3})


@pytest.mark.parametrize(
    "measurements", [{}, {"a, b": 1}, {'quoted "': 2}, {"é": 0.5}, {"a: b": 3, "": 4}, {"\\": 1}]
)
def test_measurements_of_any_name_are_read(path, measurements):
    controller = Controller(16)
    with RunLog(path, controller) as log:
        decision = controller.update(learning_rate=0.1, variance_trace=9.0, loss=1.0)
        log.write(decision, **measurements)
    assert read_run(path).measurements == [measurements]


def test_a_whole_number_in_the_header_is_the_float_that_it_stands_for(path):
    controller = Controller(16)
    with RunLog(path, controller) as log:
        decision = controller.update(learning_rate=0.1, variance_trace=math.nan, loss=1.0)
        log.write(decision)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"learning_rate_factor": 1.0', b'"learning_rate_factor": 1'))
    assert repr(read_run(path).decisions) == repr([decision])
