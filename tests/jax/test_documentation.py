"""What the documentation says about several devices runs as it is printed, on four of them."""

import re
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

import cabs
import cabs_jax
from tests.jax.reference import draw, flat, gradients_one_by_one

PAGE = Path(__file__).parents[2] / "docs" / "jax.rst"


def printed():
    """Return the programs of the section, and what each prints."""
    (section,) = re.findall(r"^Several devices\n-+\n(.*)", PAGE.read_text(), re.M | re.S)
    blocks = re.findall(r"^\.\. test(?:code|output)::\n\n((?:   .*\n|\n)+)", section, re.M)
    return [
        (textwrap.dedent(code), output.strip())
        for code, output in zip(blocks[::2], blocks[1::2], strict=True)
    ]


def loss_fn(parameters, example):
    hidden = jax.nn.relu(example["x"] @ parameters["w"])
    return -jax.nn.log_softmax(hidden)[example["y"]]


def test_each_step_on_devices_is_that_of_one_process(capsys):
    batch = {"x": np.asarray(draw(1, 128, 5)), "y": np.arange(128) % 3}
    names = {"jax": jax, "cabs": cabs, "cabs_jax": cabs_jax, "loss_fn": loss_fn, "batch": batch}
    names["parameters"] = {"w": draw(0, 5, 3)}
    manual, several = printed()
    for program, output in (manual, several):
        before = jax.device_get(names["parameters"])
        rows = gradients_one_by_one(loss_fn, before, batch)
        exec(program, names)
        assert capsys.readouterr().out.strip() == output
        assert names["mesh"].size == 4
        read = names["statistics"].read()
        assert read.variance_trace == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-4)
        moved = flat(before) - flat(names["parameters"])
        np.testing.assert_allclose(moved, 0.5 * rows.mean(axis=0), rtol=1e-3, atol=1e-6)
    assert int(names["statistics"].fingerprint) == cabs.Controller(128).fingerprint
