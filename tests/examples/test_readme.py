"""The README is true: its loop runs as printed, and its test command is the one that is run."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_loop_of_the_readme_runs_and_its_batch_grows():
    (loop,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    torch.manual_seed(0)
    names = {}
    exec(compile(loop, str(README), "exec"), names)
    assert names["sampler"].epoch == 5
    assert names["controller"].held_steps == 0
    assert names["controller"].batch_size >= 24


def test_continuous_integration_runs_the_readmes_test_command():
    commands = re.findall(r"```sh\n(.*?)\n```", README.read_text(), flags=re.DOTALL)
    (tests,) = (command for command in commands if "nox -s tests" in command)
    assert tests in (README.parent / ".ci" / "run").read_text().splitlines()
