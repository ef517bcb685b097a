"""The example on several ranks, which torchrun starts."""

import cabs
from tests.examples.test_digits import run


def test_two_ranks_decide_alike(tmp_path):
    starter = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    accuracy, log = run(tmp_path, "--epochs", "4", starter=starter)
    assert accuracy >= 0.9
    assert cabs.read_run(tmp_path / "run.1.jsonl").decisions == log.decisions
    assert sum(numbers["examples"] for numbers in log.measurements) == 4 * 1437
    assert any(numbers["examples"] % 2 for numbers in log.measurements)
