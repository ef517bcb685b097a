"""Whatever is trained on several devices, in whatever shares, is what one process trains."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cabs_jax
from tests.jax.test_meshes import IS_OLD
from tests.one_process import MOST, RATE, SPED_UP, STEPS, assert_as_one_process, cases

KINDS = {"auto": AxisType.Auto, "fsdp": AxisType.Auto, "explicit": AxisType.Explicit}
WAYS = {kind: ["exact", "added"] for kind in KINDS if not (IS_OLD and kind == "explicit")}
WAYS |= {kind: ["exact", "added", "groups"] for kind in ("checked", "unchecked")}


def loss_fn(parameters, example):
    *layers, last = parameters
    hidden = example["x"]
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        hidden = jnp.tanh(hidden @ weight + bias)
    scores = jax.nn.log_softmax(jnp.mean(hidden, axis=0) @ last)
    return -jnp.sum(scores * example["y"])


def masked_mean(parameters, batch, mask):
    losses = jax.vmap(loss_fn, (None, 0))(parameters, batch)
    return jnp.sum(losses * mask) / jnp.sum(mask)


def weighed(case, parameters, microbatches, masks, examples):
    """Return parts, gradients and losses of microbatches, as their shares of those of a batch."""
    part, total, loss = None, None, 0.0
    for batch, mask in zip(microbatches, masks, strict=True):
        if case.way == "groups":
            one, found = jax.value_and_grad(masked_mean)(parameters, batch, mask.astype(case.dtype))
            mine = cabs_jax.PartialStatistics.of_group(jnp.sum(mask), found)
        else:
            measured = cabs_jax.value_and_grad(loss_fn)
            (one, statistics), found = measured(parameters, batch, mask=mask)
            mine = statistics.partial
        share = (jnp.sum(mask) / examples).astype(case.dtype)
        found = jax.tree.map(lambda leaf, share=share: share * leaf, found)
        part = mine if part is None else part + mine
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        loss = loss + share * one
    return part, total, loss


def stepped(parameters, gradients):
    return jax.tree.map(lambda one, gradient: one - RATE * gradient, parameters, gradients)


def of_a_mesh(case, mesh):
    """Return a step that sees whole batches, which the mesh spreads over its devices."""

    def step(parameters, microbatches, masks, examples):
        if case.way == "exact":
            ((batch, mask),) = zip(microbatches, masks, strict=True)
            found = cabs_jax.value_and_grad(loss_fn)(parameters, batch, mask=mask)
            (_, statistics), gradients = found
        else:
            part, gradients, loss = weighed(case, parameters, microbatches, masks, examples)
            statistics = part.complete(gradients, loss=loss)
        return statistics, stepped(parameters, gradients)

    def place(leaf):
        is_cut = case.engine == "fsdp" and leaf.shape[-1] % case.devices == 0
        spec = P(*[None] * (leaf.ndim - 1), "data") if is_cut else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return step, [place(leaf) for leaf in case.parameters()]


def of_devices(case, mesh):
    """Return a step in which devices see their own shares, and add up."""
    is_checked = case.engine == "checked"
    to_varying = getattr(jax.lax, "pcast", None)
    cast = partial(to_varying, to="varying") if to_varying else jax.lax.pvary

    def step(parameters, microbatches, masks, examples):
        if case.way == "exact":
            ((batch, mask),) = zip(microbatches, masks, strict=True)
            measured = cabs_jax.value_and_grad(loss_fn, axis_name="data")
            (_, statistics), gradients = measured(parameters, batch, mask=mask)
            return statistics, stepped(parameters, gradients)
        own = [cast(leaf, ("data",)) for leaf in parameters] if is_checked else parameters
        part, gradients, loss = weighed(case, own, microbatches, masks, examples)
        part, gradients, loss = jax.lax.psum((part, gradients, loss), "data")
        return part.complete(gradients, loss=loss), stepped(parameters, gradients)

    specs = {"in_specs": (P(), P("data"), P("data"), P()), "out_specs": P()}
    return jax.shard_map(step, mesh=mesh, check_vma=is_checked, **specs), case.parameters()


def dealt(case, step, count):
    """Return microbatches of all devices behind each other, filled up, and what of them counts."""
    inputs, labels = case.data(step, count)
    batches, masks = [], []
    for pieces in case.dealt(step, count):
        places = np.concatenate([np.resize(piece, MOST) for piece in pieces])
        masks.append(np.concatenate([np.arange(MOST) < len(piece) for piece in pieces]))
        y = np.eye(4, dtype=case.dtype)[labels[places]]
        batches.append({"x": inputs[places], "y": y})
    return batches, masks


def placed(mesh, leaf):
    """Return an array of all devices, of which each process gives what lies on its own."""
    each = len(leaf) // jax.process_count()
    mine = leaf[jax.process_index() * each :][:each]
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine)


def train(case):
    kinds = (KINDS.get(case.engine, AxisType.Auto),)
    devices = jax.devices()[: case.devices]
    mesh = jax.make_mesh((case.devices,), ("data",), axis_types=kinds, devices=devices)
    step, parameters = (of_a_mesh if case.engine in KINDS else of_devices)(case, mesh)
    step, controller, found = jax.jit(step), case.controller(), []
    with jax.set_mesh(mesh):
        for number in range(STEPS):
            count = controller.batch_size
            shares = jax.tree.map(partial(placed, mesh), dealt(case, number, count))
            statistics, parameters = step(parameters, *shares, count)
            statistics = statistics.read()
            decided = controller.update(statistics, learning_rate=SPED_UP * RATE)
            found.append((statistics, decided.batch_size))
    return found, process_allgather(parameters, tiled=True)


CASES = [(engine, way) for engine, ways in WAYS.items() for way in ways]


# Each engine, and each way, on two devices and on four.
@pytest.mark.parametrize(
    ("engine", "way", "devices"), [(*one, (4, 2)[at % 2]) for at, one in enumerate(CASES)]
)
@given(data=st.data())
@settings(max_examples=1)
def test_devices_are_one_process(engine, way, devices, data):
    case = data.draw(cases(devices, engine, [way]))
    # The first that is drawn has one of everything, in single precision.
    assume(len(case.widths) > 1)
    case = replace(case, is_double=devices > 2, microbatches=1 if way == "exact" else 2)
    with jax.enable_x64(case.is_double):
        assert_as_one_process(case, *train(case))
