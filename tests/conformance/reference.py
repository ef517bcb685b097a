"""Gradients of single examples in NumPy, by complex steps, and the statistics they have."""

import numpy as np

import cabs
from tests.conformance import operations

STEP = 1e-30


def gradients_one_by_one(losses_of, parameters, batch):
    """Return each example's gradient, shape (m, parameters), to the last digits of float64.

    By the complex-step derivative (Squire and Trapp, SIAM Review 40, 1998): the imaginary part of
    a loss at w + ih is h times its derivative, and nothing is subtracted.
    """
    wide = {name: np.asarray(one, np.float64) for name, one in parameters.items()}
    batch = {
        name: one.astype(np.float64) if one.dtype.kind == "f" else one
        for name, one in batch.items()
    }
    columns = []
    for name, one in wide.items():
        for place in np.ndindex(one.shape):
            moved = one.astype(np.complex128)
            moved[place] += 1j * STEP
            losses = losses_of(operations, {**wide, name: moved}, batch)
            columns.append(np.imag(losses) / STEP)
    return np.stack(columns, axis=1)


def statistics_of(rows, sizes=None):
    """Return the statistics of gradients, shape (m, parameters), in groups of these sizes."""
    sizes = sizes or [1] * len(rows)
    groups = np.split(rows, np.cumsum(sizes)[:-1])
    square_sum = sum(len(group) * np.sum(group.mean(axis=0) ** 2) for group in groups)
    norm_squared = np.sum(rows.mean(axis=0) ** 2)
    return cabs.GradientStatistics(len(rows), len(sizes), square_sum, norm_squared)


def flat(gradients, names):
    """Return all elements of named gradients in float64, in the order of the names."""
    return np.concatenate([np.asarray(gradients[name], np.float64).ravel() for name in names])


def assert_near(found, expected, rtol):
    """Assert that statistics are the same to rounding."""
    found = found.read() if hasattr(found, "read") else found
    assert (found.examples, found.groups) == (expected.examples, expected.groups)
    square_sum = expected.group_square_sum
    assert abs(found.group_square_sum - square_sum) <= rtol * square_sum + 1e-30
    # Where gradients nearly cancel, the batch's own gradient carries their rounding errors.
    slack = rtol * (expected.gradient_norm_squared * square_sum / expected.examples) ** 0.5
    slack += rtol**2 * square_sum + 1e-30
    assert abs(found.gradient_norm_squared - expected.gradient_norm_squared) <= slack
    # The trace is a small difference of these two where gradients nearly agree.
    if expected.groups > 1:
        slack = rtol * square_sum / (expected.groups - 1) + 1e-30
        assert abs(found.variance_trace - expected.variance_trace) <= 2 * slack
