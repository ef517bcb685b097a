"""Inside ``shard_map``, statistics are those of a device's own examples, or of all, or an error."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cabs_jax
from tests.jax.reference import assert_same, draw, gradients_one_by_one, mean_loss

DEVICES, EVERYWHERE = 4, P()
PARAMETERS = {"w": draw(0, 5, 4), "b": draw(1, 4)}
BATCH = {"x": draw(2, 16, 5), "y": draw(3, 16, 4)}


def loss_fn(parameters, example):
    hidden = jax.nn.relu(example["x"] @ parameters["w"] + parameters["b"])
    return -jnp.sum(jax.nn.log_softmax(hidden) * example["y"])


def on_devices(step, out_specs=EVERYWHERE, **options):
    """Return a step in which each device has its share of the batch."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data")), "out_specs": out_specs}
    return jax.shard_map(step, mesh=mesh, **specs, **options)


def cast(tree):
    to_varying = getattr(jax.lax, "pcast", None)
    one = partial(to_varying, to="varying") if to_varying else jax.lax.pvary
    return jax.tree.map(lambda leaf: one(leaf, ("data",)), tree)


ROWS = gradients_one_by_one(loss_fn, PARAMETERS, BATCH)
SHARES = ROWS.reshape(DEVICES, -1, ROWS.shape[1])
MEANS = SHARES.mean(axis=1)


def from_groups(parameters, batch):
    """Take the statistics of devices as groups, as the documentation says."""
    gradients = jax.grad(mean_loss(loss_fn))(parameters, batch)
    part = cabs_jax.PartialStatistics.of_group(len(batch["y"]), gradients)
    return jax.lax.psum(part, "data").complete(jax.lax.pmean(gradients, "data"))


def test_groups_of_gradients_that_jax_has_added_up_are_an_error():
    for step in (on_devices(from_groups), jax.jit(on_devices(from_groups))):
        with pytest.raises(ValueError, match="JAX has added up what the devices have"):
            step(PARAMETERS, BATCH)


@pytest.mark.parametrize("is_jitted", [False, True])
@pytest.mark.parametrize("is_checked", [False, True])
def test_groups_of_a_devices_own_gradients_are_exact(is_checked, is_jitted):
    if is_checked:
        step = on_devices(lambda p, batch: from_groups(cast(p), batch))
    else:
        step = on_devices(from_groups, check_vma=False)
    found = (jax.jit(step) if is_jitted else step)(PARAMETERS, BATCH).read()
    trace = 4 * MEANS.var(axis=0, ddof=1).sum()
    assert (found.examples, found.groups) == (16, DEVICES)
    assert found.variance_trace == pytest.approx(trace, rel=1e-4)


@pytest.mark.parametrize("is_jitted", [False, True])
def test_parameters_that_are_the_same_on_all_devices_give_own_statistics(is_jitted):
    def step(parameters, batch):
        (loss, statistics), gradients = cabs_jax.value_and_grad(loss_fn)(parameters, batch)
        assert statistics.summed == ("data",)
        with pytest.raises(ValueError, match=r"are no mean\. Name these axes in axis_name="):
            statistics.partial  # noqa: B018
        numbers = jnp.stack([loss, statistics.variance_trace, statistics.gradient_norm_squared])
        return numbers[None], gradients

    def plain(parameters, batch):
        return jax.grad(mean_loss(loss_fn))(parameters, batch)

    step = on_devices(step, (P("data"), P()))
    numbers, gradients = (jax.jit(step) if is_jitted else step)(PARAMETERS, BATCH)
    assert_same(gradients, jax.jit(on_devices(plain))(PARAMETERS, BATCH), ulps=64)
    _, traces, squares = np.asarray(numbers).T
    np.testing.assert_allclose(traces, SHARES.var(axis=1, ddof=1).sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(squares, (MEANS**2).sum(axis=1), rtol=1e-4)


@pytest.mark.parametrize("is_checked", [False, True])
def test_own_gradients_add_up_to_the_statistics_of_all_examples(is_checked):
    def step(parameters, batch):
        own = cast(parameters) if is_checked else parameters
        (_, statistics), gradients = cabs_jax.value_and_grad(loss_fn)(own, batch)
        part = jax.lax.psum(statistics.partial, "data")
        return part.complete(jax.lax.pmean(gradients, "data"))

    found = jax.jit(on_devices(step, check_vma=is_checked))(PARAMETERS, BATCH).read()
    assert found.variance_trace == pytest.approx(ROWS.var(axis=0, ddof=1).sum(), rel=1e-4)


def test_a_part_of_all_devices_and_the_gradient_of_one_are_an_error():
    def mixed(parameters, batch):
        gradients = jax.grad(mean_loss(loss_fn))(cast(parameters), batch)
        part = cabs_jax.PartialStatistics.of_group(len(batch["y"]), gradients)
        statistics = jax.lax.psum(part, "data").complete(gradients)
        return jax.lax.pmean(statistics.variance_trace, "data")

    with pytest.raises(ValueError, match="must be over the same devices"):
        jax.jit(on_devices(mixed))(PARAMETERS, BATCH)


def test_a_group_that_all_devices_share_is_said_to_be_one():
    def step(parameters, batch):
        gradients = jax.grad(mean_loss(loss_fn))(parameters, batch)
        halved = jax.tree.map(lambda leaf: leaf / DEVICES, gradients)
        part = cabs_jax.PartialStatistics.of_group(16, halved, axis_name=())
        return (part + part).complete(halved)

    found = jax.jit(on_devices(step))(PARAMETERS, BATCH).read()
    assert (found.examples, found.groups) == (32, 2)
    assert found.gradient_norm_squared == pytest.approx((ROWS.mean(axis=0) ** 2).sum(), rel=1e-4)
    assert found.variance_trace == pytest.approx(0.0, abs=1e-3)


def on_shards(step, specs):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (specs, P("data")), "out_specs": specs}
    return lambda is_checked: jax.jit(jax.shard_map(step, mesh=mesh, **specs, check_vma=is_checked))


@pytest.mark.parametrize("is_checked", [False, True])
def test_a_loss_that_gathers_parameters_is_an_error(is_checked):
    def gathered(parameters, example):
        whole = jax.lax.all_gather(parameters["b"], "data", tiled=True)
        return loss_fn({**parameters, "b": whole}, example)

    def step(parameters, batch):
        return cabs_jax.value_and_grad(gathered)(cast_all(parameters), batch)[1]

    def cast_all(parameters):
        return {**parameters, "w": cast(parameters["w"])} if is_checked else parameters

    with pytest.raises(ValueError, match="passes through all_gather over 'data'"):
        on_shards(step, {"w": P(), "b": P("data")})(is_checked)(PARAMETERS, BATCH)


@pytest.mark.parametrize("is_checked", [False, True])
def test_a_loss_that_sums_over_devices_is_an_error(is_checked):
    def summed(parameters, example):
        hidden = jax.lax.psum(jnp.sum(example["x"] * parameters["w"][:, 0]), "data")
        return (hidden + parameters["b"][0]) ** 2

    def step(parameters, batch):
        return cabs_jax.value_and_grad(summed)(parameters, batch)[1]

    with pytest.raises(ValueError, match=r"passes through psum\w* over 'data'"):
        on_shards(step, P())(is_checked)(PARAMETERS, BATCH)


@pytest.mark.parametrize("is_checked", [False, True])
def test_a_collective_that_is_held_fixed_is_exact(is_checked):
    def centred(parameters, example):
        mean = jax.lax.pmean(jax.lax.stop_gradient(example["x"]), "data")
        return loss_fn(parameters, {**example, "x": example["x"] - 0.1 * mean})

    def step(parameters, batch):
        own = cast(parameters) if is_checked else parameters
        (_, statistics), _ = cabs_jax.value_and_grad(centred)(own, batch)
        return statistics.group_square_sum[None]

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data"), "check_vma": is_checked}
    found = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(PARAMETERS, BATCH)
    # The n-th example of each device meets the n-th of the others.
    shares = BATCH["x"].reshape(DEVICES, -1, 5)
    moved = {**BATCH, "x": (shares - 0.1 * shares.mean(axis=0)).reshape(-1, 5)}
    rows = gradients_one_by_one(loss_fn, PARAMETERS, moved).reshape(DEVICES, -1, ROWS.shape[1])
    np.testing.assert_allclose(found, (rows**2).sum(axis=(1, 2)), rtol=1e-4)


def test_the_gradient_of_a_loss_that_is_the_same_on_all_devices_is_that_of_jax():
    def same(parameters, example):
        total = jax.lax.psum(jax.lax.stop_gradient(parameters["w"][0, 0]), "data")
        return (total + parameters["b"][0] * example["y"][0]) ** 2

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P()), "out_specs": P()}
    plain, measured = (
        jax.jit(jax.shard_map(step, mesh=mesh, **specs))(PARAMETERS, BATCH)
        for step in (
            jax.grad(mean_loss(same)),
            lambda p, batch: cabs_jax.value_and_grad(same)(p, batch)[1],
        )
    )
    np.testing.assert_allclose(measured["b"], plain["b"], rtol=1e-6)


def test_a_device_on_which_no_example_counts_has_a_loss_of_zero():
    def step(parameters, batch, mask):
        (loss, _), _ = cabs_jax.value_and_grad(loss_fn)(cast(parameters), batch, mask=mask)
        return jax.lax.psum(loss * jnp.sum(mask, dtype=loss.dtype), "data")

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    step = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    found = step(PARAMETERS, BATCH, jnp.arange(16) < 6)
    few = jax.tree.map(lambda leaf: leaf[:6], BATCH)
    assert float(found) / 6 == pytest.approx(float(mean_loss(loss_fn)(PARAMETERS, few)), rel=1e-5)
