"""The example on several ranks, which torchrun starts."""

import pytest

import cabs
from tests.examples.test_digits import run


@pytest.mark.parametrize("rule", ["cabs", "progress"])
def test_two_ranks_decide_alike(tmp_path, rule):
    starter = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    options = "--epochs", "4", "--rule", rule
    accuracy, log = run(tmp_path, *options, starter=starter, says="steps on 2 ranks\n")
    # How many steps there are depends on the clock where the rule measures what one takes.
    assert accuracy >= (0.9 if rule == "cabs" else 0.5)
    assert cabs.read_run(tmp_path / "run.1.jsonl").decisions == log.decisions
    assert sum(numbers["examples"] for numbers in log.measurements) == 4 * 1437
    assert any(numbers["examples"] % 2 for numbers in log.measurements)
    # The mean of both clocks, from the second step's statistics on.
    timed = [one.observation.seconds is not None for one in log.decisions]
    assert timed.count(True) >= (len(timed) - 3 if rule == "progress" else 0)
