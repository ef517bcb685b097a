"""The command line: every answer has its exit status, and every error is one line."""

import builtins
import io
import os
import signal
import sys

import pytest

from cabs import BatchSizes, Controller, RunLog
from cabs.__main__ import main
from tests.core.logs import write
from tests.core.strategies import feed
from tests.processes import finished


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


def run(*arguments, **settings):
    return finished([sys.executable, "-W", "error", "-m", "cabs", *map(str, arguments)], **settings)


def spoil(path, old, new):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


# replay


def test_a_log_whose_decisions_follow_is_confirmed(path):
    write(path, Controller(16), 5)
    result = run("replay", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{path}: decisions made again and the same: 5 (steps 0 to 4)\n"


def test_a_log_from_the_middle_of_a_run_and_an_empty_one_are_confirmed(path, capsys):
    controller = Controller(16)
    feed(controller, [{"learning_rate": 0.1, "variance_trace": 300.0, "loss": 1.0}] * 4)
    write(path, controller, 2)
    assert main(["replay", str(path)]) == 0
    assert "the same: 2 (steps 4 to 5)" in capsys.readouterr().out
    write(path, Controller(16), 0, mode="w")
    assert main(["replay", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: decisions made again and the same: 0\n"


def test_a_line_that_was_cut_off_is_no_difference_and_is_said(path, capsys):
    write(path, Controller(16), 3)
    os.truncate(path, path.stat().st_size - 5)
    assert main(["replay", str(path)]) == 0
    said = capsys.readouterr().out
    assert "the same: 2 (steps 0 to 1)\nthe last line was cut off, and is left out\n" in said


def test_the_first_decision_that_differs_is_reported_with_every_field(path):
    write(path, Controller(16), 5)
    spoil(path, b'"step": 3, ', b'"step": 9, ')
    header, *lines = path.read_bytes().splitlines(keepends=True)
    assert b'"rule"' in lines[3]
    lines[3] = lines[3].replace(b'"rule"', b'"hysteresis"')
    path.write_bytes(b"".join([header, *lines]))
    result = run("replay", path)
    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"{path}, line 5: the decision of step 3 is another"
    assert lines[1] == "  step    logged 9, recomputed 3"
    assert lines[2] == "  reason  logged hysteresis, recomputed rule"
    assert lines[-1] == "decisions before it made again and the same: 3"


def test_a_damaged_line_is_reported_in_its_place(path, capsys):
    write(path, Controller(16), 3)
    spoil(path, b'"step": 1, ', b'"step": 1 ')
    assert main(["replay", str(path)]) == 1
    said = capsys.readouterr().out
    assert "line 3, where the decision of step 1 belongs: it is no JSON" in said
    assert said.endswith("decisions before it made again and the same: 1\n")


# Errors


@pytest.mark.parametrize("command", ["replay", "show", "plot"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run.jsonl: No such file or directory"),
        (b"", "is no run log: it has no whole line"),
        (b"my notes\n", "is no run log: its first line is no JSON"),
        (b'{"a": 1}\n', "is no run log: it is {'a': 1}"),
        (b'{"format": "cabs.run_log", "version": 2}\n', "version 2, expected 1"),
        (b"[" * 100_000 + b"\n", "is no run log: its first line is no JSON"),
    ],
)
def test_what_is_no_log_is_one_line_on_stderr(path, capsys, command, content, message):
    if content is not None:
        path.write_bytes(content)
    assert main([command, str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"python -m cabs: error: {path}")
    assert message in said.err
    assert said.err.count("\n") == 1


def test_a_folder_is_no_log(tmp_path):
    result = run("replay", tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"python -m cabs: error: {tmp_path}: Is a directory\n"


@pytest.mark.parametrize("command", ["show", "plot"])
def test_nothing_is_shown_or_drawn_of_a_log_that_was_not_decided(path, capsys, command):
    write(path, Controller(16), 3)
    spoil(path, b'"step": 1, ', b'"step": 7, ')
    assert main([command, str(path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "line 3, is not what was decided: step 1 is logged with step = 7, recomp" in said.err
    assert not path.with_suffix(".png").exists()


@pytest.mark.parametrize("arguments", [[], ["draw"], ["show"], ["replay", "a", "b"]])
def test_arguments_that_make_no_sense_are_a_usage_error(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert "usage: python -m cabs" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="there are no such pipes")
@pytest.mark.parametrize("command", ["replay", "show"])
def test_a_closed_pipe_ends_quietly(path, command):
    write(path, Controller(16), 3)
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "wb") as pipe:
        result = finished([sys.executable, "-m", "cabs", command, str(path)], stdout=pipe)
    assert (result.returncode, result.stderr) == (141, "")


# show


def table(path, capsys):
    assert main(["show", str(path)]) == 0
    rows = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    return {name: value.strip() for name, value in rows}


def test_the_summary_says_what_the_log_holds(path, capsys):
    controller = Controller(16, sizes=BatchSizes.range(16, 64), smoothing=0.5)
    traces = [160.0, 320.0, 1e5, 640.0, float("nan"), 640.0]
    with RunLog(path, controller) as log:
        for trace in traces:
            used = controller.batch_size
            decision = controller.update(learning_rate=0.1, variance_trace=trace, loss=2.0)
            log.write(decision, examples=used, accuracy=0.5, time=1.5)
    rows = table(path, capsys)
    assert rows["first batch size"] == "16"
    assert rows["sizes"] == "16 to 64"
    assert rows["smoothing"] == "0.5"
    assert rows["max_growth"] == "None"
    assert rows["decisions"] == "6"
    assert rows["steps"] == "0 to 5"
    assert rows["examples seen"] == str(16 + 16 + 16 + 64 + 64 + 64)
    assert rows["batch size"] == "smallest 16, median 64, largest 64, last 64"
    assert rows["reason: maximum"] == "3 (50.0%)"
    assert rows["reason: minimum"] == "2 (33.3%)"
    assert rows["reason: variance not finite"] == "1 (16.7%)"
    assert rows["held"] == "1 of the steps"
    assert rows["averaged loss"] == "first 2, last 2"
    assert rows["averaged variance"].startswith("first 160, last ")
    assert rows["learning rate lowered"] == "66.7% of the steps"
    assert rows["other measurements"] == "accuracy, time"
    assert rows["last line"] == "whole"


def test_a_log_without_decisions_or_with_a_cut_off_line_has_a_summary(path, capsys):
    write(path, Controller(16), 0)
    assert table(path, capsys)["decisions"] == "0"
    write(path, Controller(16), 2, mode="w")
    os.truncate(path, path.stat().st_size - 5)
    rows = table(path, capsys)
    assert (rows["decisions"], rows["last line"]) == ("1", "cut off, and left out")


def test_what_was_never_measured_and_counted_at_some_steps_only_is_said(path, capsys):
    controller = Controller(16)
    with RunLog(path, controller) as log:
        for count in ({"examples": 16}, {}, {"examples": float("inf")}, {"examples": 8.5}):
            decision = controller.update(
                learning_rate=0.1, variance_trace=float("nan"), loss=float("nan")
            )
            log.write(decision, **count)
    rows = table(path, capsys)
    assert rows["averaged loss"] == rows["averaged variance"] == "none"
    assert rows["examples seen"] == "24.5, in 2 of the steps"
    assert rows["held"] == "4 of the steps"


def test_the_median_of_an_even_number_is_the_middle(path, capsys):
    controller = Controller(16, smoothing=0.0)
    with RunLog(path, controller) as log:
        for trace in (200.0, 300.0, 410.0, 500.0):
            log.write(controller.update(learning_rate=0.1, variance_trace=trace, loss=1.0))
    assert table(path, capsys)["batch size"] == "smallest 20, median 35.5, largest 50, last 50"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (BatchSizes.range(16, 64, multiple_of=16), "16 to 64 in steps of 16"),
        (BatchSizes.geometric(16, 64), "16, 32, 64"),
        (BatchSizes([16, 64]), "16, 64"),
        (BatchSizes([16]), "16"),
        (BatchSizes.geometric(16, 10**9, factor=1.5), "45 from 16 to 895643918"),
    ],
)
def test_the_sizes_are_told_in_one_line(path, capsys, sizes, words):
    write(path, Controller(16, sizes=sizes), 1)
    assert table(path, capsys)["sizes"] == words


def test_names_that_would_break_the_table_or_the_terminal_are_escaped(path):
    controller = Controller(16)
    with RunLog(path, controller) as log:
        decision = controller.update(learning_rate=0.1, variance_trace=9.0, loss=1.0)
        log.write(decision, **{"two\nlines": 1, "\x1b[31mred": 2, "größe": 3, "\ud800": 4})
    result = run("show", path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (0, "")
    line = next(line for line in result.stdout.splitlines() if line.startswith("other"))
    assert line.split("  ", 1)[1].strip() == r"'\x1b[31mred', gr\xf6\xdfe, 'two\nlines', '\ud800'"


# plot


def test_the_picture_lies_beside_the_log_or_where_it_is_asked_for(path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write(path, Controller(16), 30)
    assert main(["plot", str(path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.png'} was drawn\n"
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(path), "-o", str(tmp_path / "other.svg")]) == 0
    assert b"<svg" in (tmp_path / "other.svg").read_bytes()


def test_the_log_is_never_drawn_over(path, tmp_path, capsys):
    write(path, Controller(16), 3)
    before = path.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(path)
    for output in (path, link):
        assert main(["plot", str(path), "-o", str(output)]) == 2
        assert f"{output} is the log itself" in capsys.readouterr().err
    path.rename(tmp_path / "run.png")
    assert main(["plot", str(tmp_path / "run.png")]) == 2
    assert (tmp_path / "run.png").read_bytes() == before


def test_a_picture_that_cannot_be_written_is_one_line_on_stderr(path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write(path, Controller(16), 3)
    for output in (tmp_path / "none" / "run.png", tmp_path / "run.jpeg2"):
        assert main(["plot", str(path), "-o", str(output)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_empty_log_is_not_drawn(path, capsys):
    pytest.importorskip("matplotlib")
    write(path, Controller(16), 0)
    assert main(["plot", str(path)]) == 2
    assert "the run holds no decision to be drawn" in capsys.readouterr().err


def test_without_matplotlib_the_command_says_what_to_install(path, capsys, monkeypatch):
    write(path, Controller(16), 3)
    original = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["plot", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.endswith("plotting needs Matplotlib: pip install 'cabs-batch-size[plot]'\n")


def test_an_output_that_is_no_terminal_and_no_file_is_written_to(path, monkeypatch):
    write(path, Controller(16), 1)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(["replay", str(path)]) == 0
    assert "the same: 1 (steps 0 to 0)" in sys.stdout.getvalue()
