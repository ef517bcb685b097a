"""Fingerprints are compared in the sum that gradients take anyway, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cabs
import cabs_jax
from tests.jax.collectives import DEVICES, STEPS, compared, once, reduced_in
from tests.jax.reference import assert_same, draw
from tests.jax.test_meshes import IS_OLD

PARAMETERS = {"in": draw(0, 8, 8), "bias": draw(1, 8), "out": draw(2, 8, 4)}
BATCH = {"x": draw(3, 16, 8), "y": draw(4, 16, 4)}
NUMBERS = st.integers(0, 2**20 - 1)
ENGINES = ["auto", "checked", "unchecked", *([] if IS_OLD else ["explicit"])]
WAYS = ["exact", "completed"]


def mesh_of(engine="auto", devices=DEVICES):
    kind = AxisType.Explicit if engine == "explicit" else AxisType.Auto
    chosen = jax.devices()[:devices]
    return jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=chosen)


def placed(mesh, tree, axis="data"):
    return jax.device_put(tree, NamedSharding(mesh, P(axis)))


def step_of(engine, way, mesh):
    """Return a step that measures, from parameters, a batch, and fingerprints."""
    axes = {"axis_name": "data"} if engine in ("checked", "unchecked") else {}
    measured = cabs_jax.value_and_grad(once, **axes)

    def step(parameters, batch, fingerprint):
        if way == "exact":
            return measured(parameters, batch, fingerprint=fingerprint)
        (loss, statistics), gradients = measured(parameters, batch)
        part = statistics.partial
        statistics = part.complete(gradients, loss=loss, fingerprint=fingerprint, **axes)
        return (loss, statistics), gradients

    if axes:
        specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
        step = jax.shard_map(step, mesh=mesh, check_vma=engine == "checked", **specs)
    return jax.jit(step)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_devices_are_told_a_difference_and_are_told_none_that_is_not(engine, way):
    mesh = mesh_of(engine)
    step, batch = step_of(engine, way, mesh), placed(mesh, BATCH)
    parameters = placed(mesh, PARAMETERS, None)

    @given(numbers=st.lists(NUMBERS, min_size=DEVICES, max_size=DEVICES), is_same=st.booleans())
    @settings(max_examples=30)
    def told(numbers, is_same):
        if is_same:
            numbers = [numbers[0]] * DEVICES
        is_alike = len(set(numbers)) == 1
        fingerprints = placed(mesh, np.array(numbers, np.int32))
        (_, statistics), _ = step(parameters, batch, fingerprints)
        assert int(statistics.fingerprint) == (numbers[0] if is_alike else -1)
        controller = cabs.Controller(16)
        if is_alike:
            controller.update(statistics, learning_rate=0.1)
        else:
            with pytest.raises(RuntimeError, match="the processes do not train alike"):
                controller.update(statistics, learning_rate=0.1)
        assert controller.step == is_alike

    with jax.set_mesh(mesh):
        told()


@pytest.mark.parametrize("bit", range(20))
def test_each_bit_is_compared(bit):
    mesh = mesh_of()
    numbers = np.full(DEVICES, 12345, np.int32)
    numbers[-1] ^= 1 << bit
    step = step_of("auto", "completed", mesh)
    (_, statistics), _ = step(PARAMETERS, placed(mesh, BATCH), placed(mesh, numbers))
    assert int(statistics.fingerprint) == -1


def test_a_fingerprint_of_the_controller_has_no_more_bits_than_are_compared():
    for size in range(16, 500):
        assert cabs.Controller(size, sizes=cabs.BatchSizes.range(16, 512)).fingerprint < 2**20


@pytest.mark.parametrize("label", STEPS)
def test_a_fingerprint_adds_numbers_to_a_collective_and_no_collective(label):
    added = compared(label)
    assert (added["added"], added["numbers added"]) == (0, 20)


def test_a_fingerprint_goes_with_gradients_in_double_precision():
    with jax.enable_x64(True):
        mesh = mesh_of()
        parameters = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PARAMETERS)
        batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), BATCH)
        fingerprints = placed(mesh, np.full(DEVICES, 7, np.int32))
        given = parameters, placed(mesh, batch), fingerprints
        found = reduced_in(lambda *args: step_of("auto", "exact", mesh)(*args), *given)
        assert len(found["all-reduce"]) == 1


def test_everything_else_is_as_it_is_without():
    mesh = mesh_of()
    batch = placed(mesh, BATCH)
    (loss, statistics), gradients = step_of("auto", "exact", mesh)(
        PARAMETERS, batch, cabs_jax.fingerprint(cabs.Controller(16), batch["x"].sharding)
    )
    expected = jax.jit(cabs_jax.value_and_grad(once))(PARAMETERS, batch)
    assert_same((loss, gradients), (expected[0][0], expected[1]))
    assert statistics.read() == expected[0][1].read()


@pytest.mark.parametrize("engine", ENGINES)
def test_one_device_compares_nothing(engine):
    mesh = mesh_of(engine, devices=1)
    own = cabs_jax.fingerprint(cabs.Controller(16), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        batch, parameters = placed(mesh, BATCH), placed(mesh, PARAMETERS, None)
        for way in WAYS:
            step = step_of(engine, way, mesh)
            with_one, without = (
                step.lower(parameters, batch, one).compile().as_text().split("metadata")[0]
                for one in (own, None)
            )
            assert with_one == without
        (_, statistics), _ = step(parameters, batch, own)
        assert statistics.fingerprint is None
        assert statistics.read().examples == 16


def test_outside_of_jit_and_with_aux_fingerprints_are_compared():
    mesh = mesh_of()
    measured = cabs_jax.value_and_grad(lambda p, one: (once(p, one), one["y"]), has_aux=True)
    for last, expected in ((5, 5), (6, -1)):
        fingerprints = placed(mesh, np.array([5, 5, 5, last], np.int32))
        (_, statistics, aux), _ = measured(
            PARAMETERS, placed(mesh, BATCH), fingerprint=fingerprints
        )
        assert int(statistics.fingerprint) == expected
        np.testing.assert_array_equal(aux, BATCH["y"])


def test_what_is_told_goes_through_jit_scans_and_trees():
    mesh = mesh_of()
    batch = placed(mesh, BATCH)
    alike = cabs_jax.fingerprint(cabs.Controller(16), NamedSharding(mesh, P("data")))
    unlike = alike + placed(mesh, np.array([0, 0, 1, 0], np.int32))

    @jax.jit
    def steps(parameters, batch, each):
        def step(parameters, fingerprint):
            measured = cabs_jax.value_and_grad(once)
            (_, statistics), by = measured(parameters, batch, fingerprint=fingerprint)
            return jax.tree.map(lambda one, by: one - 0.01 * by, parameters, by), statistics

        return jax.lax.scan(step, parameters, each)[1]

    found = jax.jit(lambda statistics: statistics)(
        steps(PARAMETERS, batch, jnp.stack([alike, unlike]))
    )
    first, second = (jax.tree.map(lambda leaf, at=at: leaf[at], found) for at in range(2))
    assert first.read().examples == 16
    with pytest.raises(RuntimeError, match="do not train alike"):
        second.read()


def test_a_part_holds_no_fingerprint():
    mesh = mesh_of()
    fingerprints = placed(mesh, np.full(DEVICES, 5, np.int32))
    step = step_of("auto", "exact", mesh)
    (_, statistics), _ = step(PARAMETERS, placed(mesh, BATCH), fingerprints)
    with pytest.raises(ValueError, match=r"give fingerprint= to complete\(\), once"):
        _ = statistics.partial


@pytest.mark.parametrize("wrong", [5, np.float32([1, 2, 3, 4]), np.zeros((4, 1), np.int32)])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_fingerprint_of_each_device_is_refused(way, wrong):
    with pytest.raises(TypeError, match=r"make it with cabs_jax.fingerprint\(controller"):
        step_of("auto", way, mesh_of())(PARAMETERS, BATCH, wrong)


@pytest.mark.parametrize("is_checked", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_inside_shard_map_a_fingerprint_needs_the_axes(way, is_checked):
    def own(batch, fingerprint):
        measured = cabs_jax.value_and_grad(once)
        if way == "exact":
            return measured(PARAMETERS, batch, fingerprint=fingerprint)
        part = cabs_jax.PartialStatistics(4, 4, jnp.sum(batch["x"]))
        return part.complete(batch, fingerprint=fingerprint)

    mesh = mesh_of()
    specs = {"in_specs": (P("data"), P("data")), "out_specs": P()}
    with pytest.raises(ValueError, match="fingerprint inside shard_map must come with axis_name"):
        jax.shard_map(own, mesh=mesh, check_vma=is_checked, **specs)(BATCH, np.zeros(4, np.int32))


def test_a_fingerprint_lies_where_the_examples_do():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    number = cabs.Controller(16).fingerprint
    for spec, shares in ((P("data"), 2), (P(("data", "model"), None), 4), (P(None, "data"), 1)):
        found = cabs_jax.fingerprint(cabs.Controller(16), NamedSharding(mesh, spec))
        assert found.sharding.spec[0] == (spec[0] if spec[0] else None)
        assert found.dtype == jnp.int32
        assert found.tolist() == [number] * shares
    with pytest.raises(TypeError, match=r"sharding must be the jax.NamedSharding of the batch"):
        cabs_jax.fingerprint(cabs.Controller(16), mesh)
