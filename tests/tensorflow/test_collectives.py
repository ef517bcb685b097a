"""What statistics add to the collectives of a step is what the documentation says."""

import json
from pathlib import Path

import pytest

from tests.tensorflow.collectives import REPLICAS, STEPS, counted

FOUND = Path(__file__).parents[2] / "docs" / "benchmarks" / "collectives.json"


@pytest.mark.parametrize("label", STEPS)
def test_the_table_of_collectives_is_what_a_step_has(mirrored, label):
    written = json.loads(FOUND.read_text(encoding="utf-8"))["steps"]
    assert counted(mirrored, label) == written[f"TensorFlow, {REPLICAS} replicas: {label}"]
