"""What the documentation says about ``shard_map`` runs as it is printed, on four devices."""

import re
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

import cabs_jax
from tests.jax.reference import draw, flat, gradients_one_by_one

PAGE = Path(__file__).parents[2] / "docs" / "jax.rst"


def printed():
    """Return the program of the section, and what it prints."""
    (section,) = re.findall(r"^Several devices\n-+\n(.*)", PAGE.read_text(), re.M | re.S)
    code, output = re.findall(r"^\.\. test(?:code|output)::\n\n((?:   .*\n|\n)+)", section, re.M)
    return textwrap.dedent(code), output.strip()


def loss_fn(parameters, example):
    hidden = jax.nn.relu(example["x"] @ parameters["w"])
    return -jax.nn.log_softmax(hidden)[example["y"]]


def test_the_step_inside_of_shard_map_is_that_of_one_process(capsys):
    parameters = {"w": draw(0, 5, 3)}
    batch = {"x": np.asarray(draw(1, 128, 5)), "y": np.arange(128) % 3}
    rows = gradients_one_by_one(loss_fn, parameters, batch)
    program, output = printed()
    known = {"jax": jax, "cabs_jax": cabs_jax, "loss_fn": loss_fn, "batch": batch}
    exec(program, names := known | {"parameters": parameters})
    assert capsys.readouterr().out.strip() == output
    assert names["mesh"].size == 4
    read = names["statistics"].read()
    assert read.variance_trace == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-4)
    moved = flat(parameters) - flat(names["parameters"])
    np.testing.assert_allclose(moved, 0.5 * rows.mean(axis=0), rtol=1e-3, atol=1e-6)
