"""Batches and parameters on meshes of devices, against a loop over the examples and plain JAX."""

from contextlib import nullcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cabs_jax
from cabs_jax.norms import arrays, reductions
from tests.jax.collectives import kept, reduced_in
from tests.jax.reference import assert_same, draw, gradients_one_by_one, mean_loss

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Older releases have no gradient of a product over a batch that is sharded by an Explicit axis.
IS_OLD = jax.__version_info__ < (0, 9)


def network(parameters, example):
    """Use jitted functions, a product of matrices, rows, and a matrix that is used twice."""
    hidden = jax.nn.relu(example["x"] @ parameters["in"] + parameters["bias"])
    hidden = jnp.tanh(hidden @ parameters["twice"]) @ parameters["twice"]
    scores = jax.nn.log_softmax(hidden @ parameters["out"])
    return -jnp.sum(scores * example["y"])


def loop(parameters, example):
    """Use a layer in each iteration of a loop, one of them in all, and a checkpoint."""

    @jax.checkpoint
    def layer(hidden, weight):
        hidden = jax.nn.relu(hidden @ weight + parameters["bias"])
        return jnp.tanh(hidden @ parameters["twice"]), None

    hidden, _ = jax.lax.scan(layer, example["x"] @ parameters["in"], parameters["layers"])
    return jnp.sum(hidden @ parameters["out"] * example["y"]) + 0.1 * jnp.sum(parameters["in"] ** 2)


def sequence(parameters, example):
    """Use rows of a batch of sequences, a table of which a row is sharded, and random numbers."""
    rows = jnp.stack([example["x"], 2.0 * example["x"], jnp.sin(example["x"])])
    hidden = jax.nn.silu(rows @ parameters["in"] * parameters["bias"])
    noise = jax.random.normal(example["key"], (8,))
    hidden = jnp.concatenate([hidden, hidden**2], axis=0) @ parameters["twice"] + noise
    return jnp.sum(jnp.tanh(hidden @ parameters["out"]) @ example["y"])


LOSSES = {one.__name__: one for one in (network, loop, sequence)}
PARAMETERS = {
    "in": draw(0, 4, 8),
    "bias": draw(1, 8),
    "twice": 0.4 * draw(2, 8, 8),
    "layers": 0.4 * draw(3, 3, 8, 8),
    "out": draw(4, 8, 4),
}
BATCH = {
    "x": draw(5, 16, 4),
    "y": draw(6, 16, 4),
    "key": jax.random.split(jax.random.key(0), 16),
}
# Sharded by the axis that shards no example.
MODEL = {
    "in": P(None, "model"),
    "bias": P("model"),
    "twice": P(None, "model"),
    "layers": P(None, "model", None),
    "out": P(None, None),
}


def mesh_of(kinds):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)


def placed(mesh, tree, spec):
    specs = spec if isinstance(spec, dict) else dict.fromkeys(tree, spec)
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in tree.items()
    }


def context(mesh, is_set):
    return jax.set_mesh(mesh) if is_set else nullcontext()


@cache
def rows_of(loss_fn):
    return gradients_one_by_one(loss_fn, PARAMETERS, BATCH)


@cache
def plain_of(loss_fn, examples):
    """Return the mean loss and its gradients, over examples with these numbers."""
    batch = jax.tree.map(lambda leaf: leaf[jnp.array(examples)], BATCH)
    return jax.device_get(jax.jit(jax.value_and_grad(mean_loss(loss_fn)))(PARAMETERS, batch))


def assert_exact(found, loss_fn, examples=slice(None), sampled=None):
    """Assert that loss, gradients and statistics are those of a loop over some examples."""
    (loss, statistics, *_), gradients = found
    expected = plain_of(loss_fn, tuple(np.arange(16)[examples]))
    rows = rows_of(loss_fn)[examples]
    assert_same(jax.device_get((loss, gradients)), expected, ulps=512)
    read = statistics.read()
    assert (read.examples, read.groups) == (len(rows), len(rows))
    taken = rows if sampled is None else rows[:sampled]
    scale = len(rows) / len(taken)
    assert read.group_square_sum == pytest.approx(scale * (taken**2).sum(), rel=5e-5)
    assert read.gradient_norm_squared == pytest.approx((rows.mean(axis=0) ** 2).sum(), rel=1e-4)


@pytest.mark.skipif(IS_OLD, reason="JAX has no such gradient")
@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kinds", [(EXPLICIT, EXPLICIT), (EXPLICIT, AUTO)])
def test_a_batch_sharded_by_an_explicit_axis_is_exact_as_in_jax(kinds, name, is_set):
    mesh, loss_fn = mesh_of(kinds), LOSSES[name]
    parameters, batch = placed(mesh, PARAMETERS, P()), placed(mesh, BATCH, P("data"))
    with context(mesh, is_set):
        plain = jax.jit(jax.value_and_grad(mean_loss(loss_fn)))(parameters, batch)
        measured = cabs_jax.value_and_grad(loss_fn)
        found = jax.jit(measured)(parameters, batch)
    assert_exact(found, loss_fn)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(plain[1]), strict=True):
        assert jax.typeof(one) == jax.typeof(other)


@pytest.mark.skipif(IS_OLD, reason="JAX has no such gradient")
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_sharded_by_an_explicit_axis_is_exact_without_jit(name):
    mesh, loss_fn = mesh_of((EXPLICIT, EXPLICIT)), LOSSES[name]
    parameters, batch = placed(mesh, PARAMETERS, P()), placed(mesh, BATCH, P("data"))
    with jax.set_mesh(mesh):
        assert_exact(cabs_jax.value_and_grad(loss_fn)(parameters, batch), loss_fn)


@pytest.mark.skipif(IS_OLD, reason="JAX has no such gradient")
@pytest.mark.parametrize("is_jitted", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_parameters_that_are_on_no_mesh_go_with_a_batch_on_an_explicit_one(name, is_jitted):
    mesh, loss_fn = mesh_of((EXPLICIT, EXPLICIT)), LOSSES[name]

    def step(parameters, batch):
        found = cabs_jax.value_and_grad(loss_fn)(parameters, batch)
        return found, jax.tree.map(lambda one, by: one - 0.1 * by, parameters, found[1])

    with jax.set_mesh(mesh):
        batch = placed(mesh, BATCH, P("data"))
        found, moved = (jax.jit(step) if is_jitted else step)(PARAMETERS, batch)
    assert_exact(found, loss_fn)
    expected = jax.tree.map(lambda one, by: one - 0.1 * by, PARAMETERS, jax.device_get(found[1]))
    assert_same(jax.device_get(moved), jax.device_get(expected), ulps=4)


@pytest.mark.skipif(IS_OLD, reason="JAX has no such gradient")
def test_a_batch_on_a_mesh_as_jax_makes_it_is_exact():
    mesh = jax.make_mesh((4,), ("data",))
    with jax.set_mesh(mesh):
        parameters, batch = placed(mesh, PARAMETERS, P()), placed(mesh, BATCH, P("data"))
        assert_exact(jax.jit(cabs_jax.value_and_grad(network))(parameters, batch), network)


@pytest.mark.slow
@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize("kinds", [(AUTO, AUTO), (AUTO, EXPLICIT)])
def test_a_batch_sharded_by_an_axis_that_is_not_explicit_is_exact(kinds, is_set):
    mesh = mesh_of(kinds)
    # JAX allows an Explicit axis to shard nothing of a batch that another one shards.
    parameters, batch = placed(mesh, PARAMETERS, P()), placed(mesh, BATCH, P("data"))
    for name, loss_fn in LOSSES.items():
        if (name, kinds[1]) == ("sequence", EXPLICIT) and not is_set:
            continue
        with context(mesh, is_set):
            assert_exact(jax.jit(cabs_jax.value_and_grad(loss_fn))(parameters, batch), loss_fn)


SOME = np.arange(16) % 3 > 0


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [(AUTO, AUTO), *([] if IS_OLD else [(EXPLICIT, EXPLICIT)])])
def test_masks_samples_and_what_else_is_returned_are_those_of_a_sharded_batch(kinds):
    mesh = mesh_of(kinds)

    def with_aux(parameters, example):
        return network(parameters, example), example["x"]

    with jax.set_mesh(mesh):
        parameters, batch = placed(mesh, PARAMETERS, P()), placed(mesh, BATCH, P("data"))
        mask = jax.device_put(SOME, NamedSharding(mesh, P("data")))
        for loss_fn in (network, sequence):
            masked = jax.jit(cabs_jax.value_and_grad(loss_fn))(parameters, batch, mask=mask)
            assert_exact(masked, loss_fn, examples=SOME)
        sampled = jax.jit(cabs_jax.value_and_grad(network, sample=8))(parameters, batch)
        assert_exact(sampled, network, sampled=8)
        with_more = jax.jit(cabs_jax.value_and_grad(with_aux, has_aux=True))(parameters, batch)
        assert_exact(with_more, network)
        assert with_more[0][2].shape == (16, 4)


@pytest.mark.parametrize("name", ["network", "loop"])
@pytest.mark.parametrize("kinds", [(AUTO, AUTO), *([] if IS_OLD else [(EXPLICIT, AUTO)])])
def test_parameters_that_are_sharded_are_measured_whole(kinds, name):
    mesh, loss_fn = mesh_of(kinds), LOSSES[name]
    batch = placed(mesh, BATCH, P("data"))
    with jax.set_mesh(mesh):
        # By the axis that shards no example, and is not Explicit.
        parameters = placed(mesh, PARAMETERS, MODEL)
        assert_exact(jax.jit(cabs_jax.value_and_grad(loss_fn))(parameters, batch), loss_fn)


@pytest.mark.skipif(IS_OLD, reason="JAX has no such gradient")
def test_verify_takes_examples_out_of_a_batch_that_an_explicit_axis_shards():
    mesh = mesh_of((EXPLICIT, EXPLICIT))
    parameters, batch = placed(mesh, PARAMETERS, P()), placed(mesh, BATCH, P("data"))
    pictures = {name: jnp.stack([BATCH[name], 0.5 * BATCH[name]], axis=1) for name in ("x", "y")}
    pictures = placed(mesh, pictures, P("data"))

    def of_both(parameters, example):
        halves = (jax.tree.map(lambda leaf, at=at: leaf[at], example) for at in range(2))
        return sum(network(parameters, half) for half in halves)

    with jax.set_mesh(mesh):  # JAX wants one where it is not compiled
        assert cabs_jax.verify(network, parameters, batch).error < 1e-5
        assert cabs_jax.verify(of_both, parameters, pictures).error < 1e-5


@pytest.mark.skipif(IS_OLD, reason="JAX has no such gradient")
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_mask_may_lie_anywhere_also_where_a_sample_is_measured(is_sharded):
    mesh = mesh_of((EXPLICIT, EXPLICIT))
    with jax.set_mesh(mesh):
        parameters, batch = placed(mesh, PARAMETERS, P()), placed(mesh, BATCH, P("data"))
        spec = P("data") if is_sharded else P()

        def step(parameters, batch, count, **options):
            mask = jax.sharding.reshard(jnp.arange(16) < count, spec)
            return cabs_jax.value_and_grad(network, **options)(parameters, batch, mask=mask)

        for options in ({}, {"sample": 5}):
            found = jax.jit(partial(step, **options))(parameters, batch, 13)
            assert_exact(found, network, examples=slice(13), **{"sampled": 5} if options else {})


def layers(parameters, example):
    """Use each parameter once."""
    hidden = jax.nn.relu(example["x"] @ parameters["in"] + parameters["bias"])
    return jnp.sum(jnp.tanh(hidden @ parameters["out"]) * example["y"])


@pytest.mark.parametrize("kinds", [(AUTO, AUTO), *([] if IS_OLD else [(EXPLICIT, AUTO)])])
@pytest.mark.parametrize(("loss_fn", "more"), [(layers, []), (network, [3])])
def test_statistics_add_a_number_a_parameter_to_the_collective_there_is(kinds, loss_fn, more):
    mesh = mesh_of(kinds)
    args = placed(mesh, PARAMETERS, P()), placed(mesh, BATCH, P("data"))
    plain = reduced_in(jax.value_and_grad(mean_loss(loss_fn)), *args)
    measured = reduced_in(cabs_jax.value_and_grad(loss_fn), *args)
    (elements,) = plain["all-reduce"]
    assert plain.keys() == measured.keys() == {"all-reduce"}
    # Where a weight is used twice, whether squares have cancelled is asked of all devices.
    *small, large = sorted(measured["all-reduce"])
    assert small == more
    assert elements < large <= elements + 5


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")])
def test_of_parameters_sharded_as_the_batch_nothing_is_gathered_more_often(spec):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AUTO,))
    parameters = {name: PARAMETERS[name] for name in ("in", "bias", "out")}
    parameters = placed(mesh, parameters, {"in": spec, "bias": P("data"), "out": spec})
    args = parameters, placed(mesh, BATCH, P("data"))
    plain, measured = jax.value_and_grad(mean_loss(layers)), cabs_jax.value_and_grad(layers)
    before, after = reduced_in(plain, *args), reduced_in(measured, *args)
    (elements,) = before.pop("all-reduce")
    assert after == {**before, "all-reduce": [elements + 3]}
    # Where gradients are left in pieces, a number more of each, for its norm.
    after = reduced_in(kept(measured, args), *args)
    assert sum(after.pop("all-reduce")) == elements + 6
    assert after == before


def pictures(parameters, example):
    """Use a kernel, a scale, and a matrix of as many positions as there are pixels."""
    layout = ("NHWC", "HWIO", "NHWC")
    hidden = jax.lax.conv_general_dilated(
        example["x"][None], parameters["kernel"], (1, 1), "SAME", dimension_numbers=layout
    )
    return jnp.sum(jnp.tanh(jnp.sin(hidden * parameters["bias"]) @ parameters["out"]))


@pytest.mark.parametrize("is_bitwise", [False, True])
def test_examples_that_are_taken_some_at_a_time_do_not_move_between_devices(
    monkeypatch, is_bitwise
):
    monkeypatch.setattr(reductions, "_CHUNK", 1)
    monkeypatch.setattr(arrays, "_SUMMED", 1)
    mesh = mesh_of((AUTO, AUTO))
    parameters = PARAMETERS | {"kernel": draw(7, 3, 3, 4, 8)}
    parameters = {name: parameters[name] for name in ("kernel", "bias", "out")}
    batch = {"x": draw(8, 16, 6, 6, 4)}
    args = placed(mesh, parameters, P()), placed(mesh, batch, P("data"))
    plain = reduced_in(jax.value_and_grad(mean_loss(pictures)), *args)
    step = cabs_jax.value_and_grad(pictures, bitwise=is_bitwise)
    measured = reduced_in(step, *args)
    (elements,) = plain["all-reduce"]
    # One, and outside of the loops.
    assert measured == {"all-reduce": [elements + len(parameters)]}
    rows = gradients_one_by_one(pictures, parameters, batch)
    (_, statistics), gradients = jax.jit(step)(*args)
    assert statistics.read().group_square_sum == pytest.approx((rows**2).sum(), rel=5e-5)
    expected = jax.grad(mean_loss(pictures))(parameters, batch)
    assert_same(jax.device_get(gradients), jax.device_get(expected), ulps=512)


@pytest.mark.parametrize("kinds", [(AUTO, AUTO), *([] if IS_OLD else [(EXPLICIT, AUTO)])])
def test_norms_in_a_metric_are_those_of_a_sharded_batch(kinds):
    mesh = mesh_of(kinds)
    step = cabs_jax.value_and_grad(
        network, metric=lambda found: jax.tree.map(lambda g: 1.0 / (jnp.abs(g) + 0.1), found)
    )
    (_, alone), _ = jax.jit(step)(PARAMETERS, BATCH)
    args = placed(mesh, PARAMETERS, P()), placed(mesh, BATCH, P("data"))
    (_, spread), _ = jax.jit(step)(*args)
    assert spread.read().group_square_sum == pytest.approx(alone.read().group_square_sum, rel=1e-5)
    norms = spread.read().gradient_norm_squared, alone.read().gradient_norm_squared
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
