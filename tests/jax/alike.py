"""What processes do whose controllers, or sizes of batches, differ: the same on each of them."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cabs
import cabs_jax
from tests.jax.collectives import once, twice
from tests.jax.test_meshes import IS_OLD

ENGINES = ["auto", "fsdp", "gathered", "checked", "unchecked", *([] if IS_OLD else ["explicit"])]
DIFFER = "the processes do not train alike"


def trained(engine, way, loss_fn, examples, controller):
    """Take a step, with so many examples of this process, and update its controller."""
    kind = AxisType.Explicit if engine == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,))
    sharding = NamedSharding(mesh, P("data"))
    is_manual = engine in ("checked", "unchecked")

    def step(parameters, batch, mask, fingerprint):
        if engine == "gathered":
            parameters = jax.lax.with_sharding_constraint(parameters, NamedSharding(mesh, P()))
        axes = {"axis_name": "data"} if is_manual else {}
        measured = cabs_jax.value_and_grad(loss_fn, **axes)
        if way == "exact":
            found = measured(parameters, batch, mask=mask, fingerprint=fingerprint)
            (_, statistics), gradients = found
        else:
            # With axis_name the part is that of all devices.
            (loss, statistics), gradients = measured(parameters, batch, mask=mask)
            part = statistics.partial
            statistics = part.complete(gradients, loss=loss, fingerprint=fingerprint, **axes)
        return statistics, jax.tree.map(lambda one, by: one - 0.1 * by, parameters, gradients)

    if is_manual:
        specs = {"in_specs": (P(), *[P("data")] * 3), "out_specs": P()}
        step = jax.shard_map(step, mesh=mesh, check_vma=engine == "checked", **specs)
    lie = NamedSharding(mesh, P("data" if engine in ("fsdp", "gathered") else None))
    parameters = {
        name: jax.make_array_from_callback(one.shape, lie, lambda at, one=one: one[at])
        for name, one in {"in": np.eye(8), "bias": np.ones(8), "out": np.ones((8, 4))}.items()
    }
    batch = {"x": np.ones((examples, 8)), "y": np.ones((examples, 4))}
    mask = np.arange(examples) < examples - 1
    place = partial(jax.make_array_from_process_local_data, sharding)
    batch, mask = jax.tree.map(place, (batch, mask))
    with jax.set_mesh(mesh):
        fingerprint = cabs_jax.fingerprint(controller, sharding)
        statistics, _ = jax.jit(step)(parameters, batch, mask, fingerprint)
    controller.update(statistics, learning_rate=0.1)
    return statistics


def check(rank, count):
    """Go through all that can differ, on each of the processes at once."""
    for engine in ENGINES:
        # One for each of two devices, where XLA sends the same for it as for more.
        examples = 4 if engine == "fsdp" else 2
        for way, loss_fn in (("exact", once), ("exact", twice), ("completed", twice)):
            step = partial(trained, engine, way, loss_fn)
            controller = cabs.Controller(16)
            number = controller.fingerprint
            statistics = step(examples, controller)
            assert int(statistics.fingerprint) == number
            assert int(statistics.examples) == (examples - 1) * count
            mine = cabs.Controller(16 + (rank == count - 1))
            with pytest.raises(RuntimeError, match=DIFFER):
                step(examples, mine)
            with pytest.raises(RuntimeError, match=DIFFER):
                step(examples * (1 + rank), cabs.Controller(16 * (1 + rank)))
            if way == "exact":
                with pytest.raises(RuntimeError, match=DIFFER):
                    step(examples * (1 + rank), cabs.Controller(16))
            step(examples, controller)
            assert (controller.step, mine.step) == (2, 0)
    check_shares(rank)


def check_shares(rank):
    """See that no process has a share that another one has too, unless that is an error."""
    devices = np.array(jax.devices()).reshape(2, -1)
    for lie, axes in ((devices, "data"), (devices.T, ("data", "model"))):
        mesh = Mesh(lie, ("data", "model"))
        own = cabs_jax.fingerprint(cabs.Controller(16 + rank), NamedSharding(mesh, P(axes)))
        number = cabs.Controller(16 + rank).fingerprint
        assert {int(one.data[0]) for one in own.addressable_shards} == {number}
    with pytest.raises(ValueError, match="several processes have the same, and are not compared"):
        cabs_jax.fingerprint(cabs.Controller(16), NamedSharding(mesh, P("data")))
