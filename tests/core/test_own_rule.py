"""A batch-size rule of a user's own drives a controller, and is in its states and logs."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import cabs
from cabs.control import CABS, Configuration, Known, Reason, Rule, register_batch_size_rule
from tests.processes import finished


@register_batch_size_rule
@dataclass(frozen=True)
class LossOnly(Rule):
    """So many examples a unit of the loss."""

    scale: float = 10.0

    def asked(self, rates: tuple[float, ...], known: Known) -> float | Reason:
        del rates
        loss = known.averages.loss
        return Reason.NO_PROGRESS if loss > 9.0 else self.scale * loss


def updated(controller: cabs.Controller, loss: float) -> cabs.control.Decision:
    return controller.update(learning_rate=0.1, variance_trace=1.0, loss=loss)


def test_it_is_asked_for_sizes():
    controller = cabs.Controller(sizes=[8, 16, 32, 64], rule=LossOnly(), smoothing=0.0)
    assert controller.batch_size == 8
    assert [updated(controller, loss).batch_size for loss in (1.6, 3.1, 20.0, 6.3)] == [
        *(16, 32, 32, 64)
    ]


def test_where_it_has_no_value_the_size_is_held_with_a_reason():
    decision = updated(cabs.Controller(16, rule=LossOnly()), 20.0)
    assert (decision.batch_size, decision.reason.value) == (16, "no progress")


def test_its_log_is_replayed(tmp_path):
    controller = cabs.Controller(16, rule=LossOnly(scale=12.0))
    path = tmp_path / "run.jsonl"
    with cabs.RunLog(path, controller) as log:
        decisions = [updated(controller, 8.0 / step) for step in range(1, 9)]
        for decision in decisions:
            log.write(decision)
    run = cabs.read_run(path)
    assert run.configuration.rule == LossOnly(scale=12.0)
    assert run.decisions == decisions


OWN = """
from dataclasses import dataclass
from cabs.control import Rule, register_batch_size_rule

@register_batch_size_rule
@dataclass(frozen=True)
class FromAFile(Rule):
    def asked(self, rates, known):
        return 10.0 * known.averages.loss
"""


def test_the_command_line_imports_what_registers_it(tmp_path):
    (tmp_path / "own_rules.py").write_text(OWN)
    program = "import cabs, own_rules; from tests.core.logs import write"
    program += "; write('run.jsonl', cabs.Controller(16, rule=own_rules.FromAFile()), 5)"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(tmp_path)))}
    options = {"cwd": tmp_path, "env": environment}
    done = finished([sys.executable, "-c", program], **options)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "cabs", "replay", "run.jsonl"]
    done = finished([*command, "--import", "own_rules"], **options)
    assert "made again and the same: 5" in done.stdout, done.stderr
    done = finished(command, **options)
    assert done.returncode == 2
    assert "import the module that registers it" in done.stderr


def test_its_state_is_loaded_and_another_setting_refused():
    controller = cabs.Controller(16, rule=LossOnly())
    updated(controller, 5.0)
    resumed = cabs.Controller(16, rule=LossOnly())
    resumed.load_state_dict(controller.state_dict())
    assert updated(resumed, 4.0) == updated(controller, 4.0)
    with pytest.raises(ValueError, match="rule"):
        cabs.Controller(16, rule=LossOnly(scale=1.0)).load_state_dict(controller.state_dict())


def test_one_that_nobody_registered_is_refused_with_the_way_out():
    @dataclass(frozen=True)
    class Unknown(LossOnly):
        pass

    with pytest.raises(TypeError, match="register_batch_size_rule"):
        cabs.Controller(16, rule=Unknown())
    values = Configuration(16, rule=LossOnly()).to_json()
    with pytest.raises(ValueError, match="import the module that registers it"):
        Configuration.from_json({**values, "rule": {"name": "Unknown", "scale": 1.0}})


def test_what_is_no_rule_is_not_registered():
    @dataclass
    class Mutable(Rule):
        def asked(self, rates: tuple[float, ...], known: Known) -> float:
            return rates[0] * known.averages.loss

    with pytest.raises(TypeError, match="frozen=True"):
        register_batch_size_rule(Mutable)
    with pytest.raises(TypeError, match="subclass"):
        register_batch_size_rule(SimpleNamespace)


def test_a_name_that_another_rule_has_is_refused():
    with pytest.raises(ValueError, match="another name"):
        register_batch_size_rule(dataclass(frozen=True)(type("CABS", (CABS,), {})))


def test_a_rule_defined_once_more_takes_the_place_of_the_first():
    again = dataclass(frozen=True)(type("LossOnly", (LossOnly,), {"__module__": __name__}))
    try:
        assert register_batch_size_rule(again) is again
        assert cabs.Controller(16, rule=again()).batch_size == 16
    finally:
        register_batch_size_rule(LossOnly)
