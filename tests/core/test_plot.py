"""The picture of a run shows what the log holds."""

import builtins
import math

import pytest
from hypothesis import given, settings

from cabs import Controller, RunLog, read_run
from cabs.control import initial_state
from cabs.plot import plot_run
from cabs.runs.replay import Run
from tests.core.strategies import controllers, feed, observations, strange


@pytest.fixture
def run(tmp_path):
    controller = Controller(16)
    with RunLog(tmp_path / "run.jsonl", controller) as log:
        for step in range(40):
            used = controller.batch_size
            loss = float("nan") if step == 7 else 1.0
            decision = controller.update(
                learning_rate=0.1, variance_trace=300.0 + 50.0 * step, loss=loss
            )
            log.write(decision, examples=used)
    return read_run(tmp_path / "run.jsonl")


def test_the_axis_is_examples_seen_and_the_sizes_are_those_chosen(run, tmp_path):
    figure = plot_run(run)
    _, sizes = figure.axes
    chosen = {line.get_label(): line for line in sizes.lines}["chosen"]
    assert list(chosen.get_ydata()) == [numbers["examples"] for numbers in run.measurements]
    assert chosen.get_xdata()[-1] == sum(numbers["examples"] for numbers in run.measurements)
    assert sizes.get_xlabel() == "examples seen"
    # Each size is drawn over the examples that it was used for, up to where they were all seen.
    assert chosen.get_drawstyle() == "steps-pre"
    assert figure.axes[0].get_yscale() == "log"
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_without_examples_the_axis_is_the_step(run):
    run.measurements[3].clear()
    assert plot_run(run).axes[1].get_xlabel() == "step"


def test_an_empty_run_is_refused(run):
    run.decisions.clear()
    with pytest.raises(ValueError, match="no decision to be drawn"):
        plot_run(run)


def test_without_matplotlib_the_error_says_what_to_install(run, monkeypatch):
    original = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"cabs-batch-size\[plot\]"):
        plot_run(run)


@pytest.mark.parametrize("count", [-1, math.nan, math.inf, 10**400])
def test_a_count_of_no_batch_makes_the_axis_the_step(run, count):
    run.measurements[3]["examples"] = count
    assert plot_run(run).axes[1].get_xlabel() == "step"


@pytest.mark.filterwarnings("ignore:the batch size is 1:RuntimeWarning")
@settings(max_examples=10)
@given(controllers(), observations, strange)
def test_whatever_was_decided_can_be_drawn(tmp_path_factory, controller, observed, loss):
    last = {"learning_rate": 0.1, "variance_trace": 9.0, "loss": loss}
    decisions = feed(controller, [*observed, last])
    numbers = [{"examples": 16} for _ in decisions]
    start = initial_state(controller.configuration)
    run = Run(controller.configuration, start, decisions, numbers, cut_off=False)
    plot_run(run).savefig(tmp_path_factory.mktemp("drawn") / "run.png")


def test_many_decisions_are_drawn_with_the_legend_in_its_place(run):
    run.decisions.extend(run.decisions * 600)
    run.measurements.extend(run.measurements * 600)
    assert {panel.get_legend()._loc for panel in plot_run(run).axes} == {1}
