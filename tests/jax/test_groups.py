"""Statistics from microbatches and devices, and under JAX's transformations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cabs
import cabs_jax
from tests.jax.reference import assert_same, draw, gradients_one_by_one, mean_loss

PARAMETERS = {"m": draw(0, 4, 3), "v": draw(1, 3)}
BATCH = draw(2, 8, 5, 4)


def loss_fn(parameters, rows):
    return jnp.sum(jnp.tanh(rows @ parameters["m"] + parameters["v"]))


def expected(groups):
    """Return the statistics of groups of examples that follow one another."""
    rows = gradients_one_by_one(loss_fn, PARAMETERS, BATCH)
    means = rows.reshape(groups, -1, rows.shape[1]).mean(axis=1)
    square_sum = len(rows) / groups * (means**2).sum()
    return cabs.GradientStatistics(len(rows), groups, square_sum, (means.mean(axis=0) ** 2).sum())


def assert_near(statistics, reference):
    read = statistics.read()
    assert (read.examples, read.groups) == (reference.examples, reference.groups)
    assert read.group_square_sum == pytest.approx(reference.group_square_sum, rel=1e-5)
    assert read.gradient_norm_squared == pytest.approx(reference.gradient_norm_squared, rel=1e-5)


@pytest.mark.parametrize("is_exact", [False, True])
def test_microbatches_in_a_scan_add_up(is_exact):
    parts = BATCH.reshape(4, 2, 5, 4)

    @jax.jit
    def step(parameters):
        def add(carry, part):
            total, gradients = carry
            if is_exact:
                (_, statistics), mean = cabs_jax.value_and_grad(loss_fn)(parameters, part)
                group = statistics.partial
            else:
                mean = jax.grad(mean_loss(loss_fn))(parameters, part)
                group = cabs_jax.PartialStatistics.of_group(2, mean)
            return (total + group, jax.tree.map(lambda a, b: a + b / 4, gradients, mean)), None

        start = cabs_jax.PartialStatistics.zero(), jax.tree.map(jnp.zeros_like, parameters)
        (total, gradients), _ = jax.lax.scan(add, start, parts)
        return total.complete(gradients)

    assert_near(step(PARAMETERS), expected(8 if is_exact else 4))


def mesh(kind):
    return jax.make_mesh((2,), ("data",), axis_types=(kind,))


def varying(array):
    """Return an array that devices may differ in; older releases have another name for it."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, "data", to="varying")
    return jax.lax.pvary(array, "data")


@pytest.mark.parametrize("is_exact", [False, True])
def test_each_device_is_a_group_or_measures_its_own_share(is_exact):
    spec = PartitionSpec

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh(AxisType.Auto),
        in_specs=(spec(), spec("data")),
        out_specs=spec(),
    )
    def step(parameters, batch):
        own = jax.tree.map(varying, parameters)
        if is_exact:
            (_, statistics), mean = cabs_jax.value_and_grad(loss_fn)(own, batch)
            part = statistics.partial
        else:
            mean = jax.grad(mean_loss(loss_fn))(own, batch)
            part = cabs_jax.PartialStatistics.of_group(len(batch), mean)
        return jax.lax.psum(part, "data").complete(jax.lax.pmean(mean, "data"))

    assert_near(step(PARAMETERS, BATCH), expected(8 if is_exact else 2))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_over_several_devices_is_exact(kind):
    devices = mesh(kind)
    with jax.set_mesh(devices):
        batch = jax.device_put(BATCH, NamedSharding(devices, PartitionSpec("data")))
        if kind is AxisType.Explicit and jax.__version_info__ < (0, 9):
            # There is no gradient to measure: JAX itself asks how to shard it.
            with pytest.raises(Exception, match="Contracting dimensions are sharded"):
                jax.jit(jax.grad(mean_loss(loss_fn)))(PARAMETERS, batch)
            return
        (loss, statistics), gradients = jax.jit(cabs_jax.value_and_grad(loss_fn))(PARAMETERS, batch)
        plain = jax.jit(jax.value_and_grad(mean_loss(loss_fn)))(PARAMETERS, batch)
        # As in assert_exact: what is compiled for tiny products depends on the processor.
        assert_same((loss, gradients), plain, ulps=64)
        assert_near(statistics, expected(8))


def test_an_ensemble_is_measured_member_by_member():
    members = jax.tree.map(lambda p: jnp.stack([p, 2.0 * p]), PARAMETERS)
    measured = cabs_jax.value_and_grad(loss_fn)
    (_, statistics), _ = jax.jit(jax.vmap(measured, in_axes=(0, None)))(members, BATCH)
    (_, one), _ = measured(PARAMETERS, BATCH)
    np.testing.assert_allclose(statistics.group_square_sum[0], one.group_square_sum, rtol=1e-5)


def test_parameters_can_be_donated():
    @partial(jax.jit, donate_argnums=0)
    def step(parameters, batch):
        (_, statistics), gradients = cabs_jax.value_and_grad(loss_fn)(parameters, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients), statistics

    _, statistics = step(jax.tree.map(jnp.copy, PARAMETERS), BATCH)
    assert_near(statistics, expected(8))


def test_merging_complete_statistics_is_impossible():
    (_, statistics), _ = cabs_jax.value_and_grad(loss_fn)(PARAMETERS, BATCH)
    with pytest.raises(TypeError):
        statistics + statistics
