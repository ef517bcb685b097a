"""How much estimates vary, as the documentation calculates it."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from cabs import GradientStatistics

PAGE = Path(__file__).parents[2] / "docs" / "trainers.rst"
DRAWS = 4000


def deviation(groups, dimension):
    """Return the standard deviation of an estimate, relative to the trace."""
    return math.sqrt(2.0 / ((groups - 1) * dimension))


@pytest.mark.parametrize("sizes", [[1] * 8, [16] * 8, [1, 2, 3, 4, 5, 30], [4] * 64])
@pytest.mark.parametrize(
    "spectrum", [np.ones(1), np.ones(20), 1.0 / np.arange(1, 41), 0.5 ** np.arange(10)]
)
def test_estimates_vary_as_calculated(sizes, spectrum):
    rng = np.random.default_rng(0)
    m, mean = sum(sizes), np.ones(len(spectrum))
    square_sum, gradient = np.zeros(DRAWS), np.zeros((DRAWS, len(spectrum)))
    for size in sizes:
        noise = rng.standard_normal(gradient.shape) * np.sqrt(spectrum / size)
        square_sum += size * np.square(mean + noise).sum(axis=1)
        gradient += (mean + noise) * (size / m)
    norms = np.square(gradient).sum(axis=1)
    traces = GradientStatistics(m, len(sizes), square_sum, norms).variance_trace
    trace, dimension = spectrum.sum(), spectrum.sum() ** 2 / np.square(spectrum).sum()
    expected = deviation(len(sizes), dimension)
    assert traces.mean() / trace == pytest.approx(1.0, abs=4.0 * expected / math.sqrt(DRAWS))
    assert traces.std() / trace == pytest.approx(expected, rel=0.1)


def rows(last):
    """Return the numbers of the three rows of a table, whose last column is named."""
    table = PAGE.read_text().split(last)[1]
    lines = re.findall(r"^(?:8|512|16,384) .*$", table, re.M)[:3]
    return [
        [float(one.replace(",", "")) for one in re.findall(r"\d[\d,]*(?:\.\d+)?(?=,? |,|$)", line)]
        for line in lines
    ]


def test_the_printed_hops_and_bytes_are_those_of_rings_and_trees():
    for replicas, ring, sent, with_microbatches, tree, time in rows("time in a tree"):
        assert ring == 2 * (replicas - 1)
        assert sent == pytest.approx(2 * 64 * (replicas - 1) / replicas, abs=0.005)
        both = 2 * (64 + 8 * 1024) * (replicas - 1) / replicas
        assert with_microbatches == pytest.approx(both, abs=0.005)
        assert tree == 2 * math.ceil(math.log2(replicas))
        assert time == 5 * tree


def test_the_printed_deviations_are_as_calculated():
    for replicas, *printed in rows("groups, averaged, d = 1"):
        calculated = [
            100 * deviation(groups, dimension)
            for groups in (replicas, 32 * replicas)
            for dimension in (1, 10, 100)
        ]
        calculated.append(calculated[0] * math.sqrt(0.05 / 1.95))
        # Two digits.
        assert printed == pytest.approx(calculated, rel=0.05)
