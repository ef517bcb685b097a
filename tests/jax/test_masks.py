"""Examples that a mask leaves out count nowhere, whatever is in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cabs_jax
from tests.jax.reference import assert_same, draw, gradients_one_by_one, mean_loss

WEIGHT = draw(0, 4, 3)
COUNT = 5
MASK = np.array([False, True, True, False, True, True, False, True])


def norm(weight, example):
    return jnp.linalg.norm(example["x"] @ weight)


def logarithm(weight, example):
    return jnp.sum(jnp.log(jnp.abs(example["x"] @ weight)))


def noisy(weight, example):
    drawn = jax.random.uniform(example["key"], (3,))
    rows = jnp.where(example["is_odd"], drawn, 1.0) * example["times"].astype(jnp.float32)
    return jnp.sqrt(jnp.sum((example["x"] @ weight * rows) ** 2))


def batch_of(bad):
    x = np.array(draw(1, 8, 4))
    x[~MASK] = bad
    times = np.where(MASK, np.arange(1, 9), 0)
    return {
        "x": jnp.asarray(x),
        "key": jax.random.split(jax.random.key(0), 8),
        "is_odd": jnp.arange(8) % 2 == 1,
        "times": jnp.asarray(times, jnp.int32),
    }


def assert_those_that_count(found, loss_fn, batch):
    (loss, statistics), gradient = found
    kept = jax.tree.map(lambda leaf: leaf[np.flatnonzero(MASK)], batch)
    expected, plain = jax.value_and_grad(mean_loss(loss_fn))(WEIGHT, kept)
    assert_same((loss, gradient), (expected, plain), ulps=64)
    rows = gradients_one_by_one(loss_fn, WEIGHT, kept)
    read = statistics.read()
    assert (read.examples, read.groups) == (COUNT, COUNT)
    assert read.variance_trace == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-4)


@pytest.mark.parametrize("loss_fn", [norm, logarithm, noisy], ids=lambda one: one.__name__)
@pytest.mark.parametrize("bad", [0.0, np.inf, np.nan])
def test_a_gradient_that_is_infinite_where_nothing_counts_counts_nowhere(bad, loss_fn):
    batch = batch_of(bad)
    measured = cabs_jax.value_and_grad(loss_fn)
    for step in (measured, jax.jit(measured)):
        assert_those_that_count(step(WEIGHT, batch, mask=jnp.asarray(MASK)), loss_fn, batch)


def test_examples_along_another_axis_are_left_out_as_well():
    batch = batch_of(0.0)
    turned = {"x": batch["x"].T}
    measured = jax.jit(cabs_jax.value_and_grad(norm, in_axes=(None, {"x": 1})))
    assert_those_that_count(measured(WEIGHT, turned, mask=jnp.asarray(MASK)), norm, batch)


def test_a_mask_of_a_traced_batch_in_which_nothing_counts_is_no_crash():
    (loss, statistics), gradient = jax.jit(cabs_jax.value_and_grad(noisy))(
        WEIGHT, batch_of(0.0), mask=jnp.zeros(8, bool)
    )
    assert float(loss) == 0.0
    assert gradient.shape == WEIGHT.shape
    assert int(statistics.examples) == 0


def test_what_else_a_loss_returns_is_that_of_an_example_that_counts():
    def with_aux(weight, example):
        return norm(weight, example), example["x"]

    batch = batch_of(np.nan)
    (_, _, aux), _ = cabs_jax.value_and_grad(with_aux, has_aux=True)(
        WEIGHT, batch, mask=jnp.asarray(MASK)
    )
    np.testing.assert_array_equal(aux[~MASK], np.broadcast_to(batch["x"][1], (3, 4)))
    np.testing.assert_array_equal(aux[MASK], batch["x"][MASK])
