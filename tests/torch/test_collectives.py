"""What statistics add to the collectives of a step is what the documentation says."""

import json
from pathlib import Path

import pytest

from tests.torch.collectives import STEPS, counted

pytestmark = pytest.mark.slow

FOUND = Path(__file__).parents[2] / "docs" / "benchmarks" / "collectives.json"


# Those of fully_shard take seconds each, in the profiler.
CASES = [
    pytest.param(one, marks=[] if STEPS[one][0] == "ddp" else pytest.mark.slow) for one in STEPS
]


@pytest.mark.parametrize("label", CASES)
def test_the_table_of_collectives_is_what_a_step_has(four, label):
    written = json.loads(FOUND.read_text(encoding="utf-8"))["steps"]
    assert four.all(counted, label) == [written[f"PyTorch, 4 ranks: {label}"]] * 4
