"""How many examples a statistic estimates, from call to number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cabs
import cabs_jax
from tests.jax.reference import draw, gradients_one_by_one

WEIGHT, BATCH = draw(0, 4), draw(1, 8, 4)


def loss_fn(weight, x):
    return jnp.tanh(x @ weight)


def measured(**options):
    return jax.jit(cabs_jax.value_and_grad(loss_fn, **options))


@pytest.mark.parametrize(
    ("sample", "counted", "estimated"), [(None, 8, 0), (8, 8, 0), (3, 8, 5), (3, 6, 3), (6, 3, 0)]
)
def test_examples_that_are_not_in_the_sample_are_estimated(sample, counted, estimated):
    mask = jnp.arange(8) < counted
    (_, statistics), _ = measured(sample=sample)(WEIGHT, BATCH, mask=mask)
    read = statistics.read()
    assert (read.examples, read.groups, read.estimated) == (counted, counted, estimated)
    assert statistics.partial.complete(WEIGHT).estimated == estimated
    if counted == 8:
        (_, statistics), _ = measured(sample=sample)(WEIGHT, BATCH)
        assert statistics.read().estimated == estimated


def test_the_number_of_estimated_examples_adds_up_in_a_scan():
    @jax.jit
    def total(weight, parts):
        def add(carry, part):
            (_, statistics), _ = cabs_jax.value_and_grad(loss_fn, sample=3)(weight, part)
            return carry + statistics.partial, None

        return jax.lax.scan(add, cabs_jax.PartialStatistics.zero(), parts)[0]

    parts = total(WEIGHT, BATCH.reshape(2, 4, 4))
    assert parts.estimated.dtype == jnp.int32
    assert (int(parts.examples), int(parts.estimated)) == (8, 2)
    assert int((parts + cabs_jax.PartialStatistics.of_group(5, WEIGHT)).estimated) == 2


def test_a_part_made_of_three_numbers_estimates_nothing_and_is_carried_through_a_scan():
    part = cabs_jax.PartialStatistics(jnp.int32(1), jnp.int32(1), jnp.float32(2.0))
    total, _ = jax.lax.scan(lambda carry, _: (carry + part, None), part, None, length=3)
    assert (int(total.examples), int(total.estimated)) == (4, 0)


def test_a_negative_variance_is_read_where_it_is_estimated_and_an_error_where_it_is_not():
    rows = gradients_one_by_one(loss_fn, WEIGHT, BATCH)
    order = np.argsort((rows**2).sum(axis=1))
    batch = np.asarray(BATCH)[order] * np.array([1e-3, *[1.0] * 7], np.float32)[:, None]
    rows = gradients_one_by_one(loss_fn, WEIGHT, batch)
    (_, statistics), gradient = measured(sample=1)(WEIGHT, batch)
    expected = (8 * (rows[0] ** 2).sum() - 8 * (rows.mean(axis=0) ** 2).sum()) / 7
    assert expected < 0.0
    assert statistics.read().variance_trace == pytest.approx(expected, rel=1e-5)
    parts = cabs_jax.PartialStatistics.zero()
    for row in batch:
        (_, statistics), _ = measured()(WEIGHT, row[None])
        parts += statistics.partial
    assert isinstance(parts.complete(gradient).read(), cabs.GradientStatistics)
    with pytest.raises(ValueError, match="variance would be negative"):
        parts.complete(8.0 * gradient).read()
