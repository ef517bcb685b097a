"""What a compiled program sends between devices, and what statistics add to that."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cabs_jax
from tests.collectives import difference

DEVICES = 4


def reduced_in(function, *args):
    """Return how many elements each collective of the compiled program has, by its kind."""
    found = {}
    pattern = r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
    for line in jax.jit(function).lower(*args).compile().as_text().splitlines():
        match = re.search(pattern, line)
        if match is not None:
            shapes = re.findall(r"\w\d+\[([\d,]*)\]", line[: match.start()])
            sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
            found.setdefault(match[1], []).append(sum(sizes))
    return found


def kept(step, args):
    """Return a step whose gradients are sharded as the parameters are."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, args[0])

    def sharded(parameters, *others):
        found, gradients = step(parameters, *others)
        return found, jax.lax.with_sharding_constraint(gradients, shardings)

    return sharded


def once(parameters, example):
    hidden = jnp.tanh(example["x"] @ parameters["in"] + parameters["bias"])
    return jnp.sum((hidden @ parameters["out"] - example["y"]) ** 2)


def twice(parameters, example):
    hidden = jnp.tanh(jnp.tanh(example["x"] @ parameters["in"]) @ parameters["in"])
    return jnp.sum((hidden @ parameters["out"] - example["y"]) ** 2)


# By what a step is called: its loss, how its parameters lie, and what has a step of each device.
STEPS = {
    "``value_and_grad``, three parameters, used once": (once, "the same", "jit"),
    "``value_and_grad``, three parameters, one used twice": (twice, "the same", "jit"),
    "``value_and_grad``, three parameters, sharded with their gradients": (once, "cut", "jit"),
    "``value_and_grad`` by ``axis_name``, three parameters": (once, "the same", "shard_map"),
}


def counted(label):
    """Return how many collectives a plain step has, and what statistics add to them."""
    plain, measured, args = steps(label)
    return difference(reduced_in(plain, *args), reduced_in(measured, *args, None))


def compared(label):
    """Return how many collectives a step with statistics has, and what a fingerprint adds."""
    _, measured, args = steps(label)
    numbers = jax.device_put(jnp.zeros(DEVICES, jnp.int32), args[1]["x"].sharding)
    return difference(*(reduced_in(measured, *args, one) for one in (None, numbers)))


def steps(label):
    """Return a plain step, one with statistics that takes a fingerprint, and arguments of both."""
    loss, lie, engine = STEPS[label]
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    shapes = {"in": (8, 8), "bias": (8,), "out": (8, 4)}
    parameters = {name: jnp.ones(shape) for name, shape in shapes.items()}
    batch = {"x": jnp.ones((32, 8)), "y": jnp.ones((32, 4))}
    specs = P("data" if lie == "cut" else None), P("data")
    args = [
        jax.device_put(tree, NamedSharding(mesh, spec))
        for tree, spec in zip((parameters, batch), specs, strict=True)
    ]

    def mean(parameters, batch):
        return jnp.mean(jax.vmap(loss, (None, 0))(parameters, batch))

    def with_fingerprint(axes=None):
        measured = cabs_jax.value_and_grad(loss, axis_name=axes)
        return lambda *args: measured(*args[:2], fingerprint=args[2])

    if engine == "shard_map":
        share = partial(jax.shard_map, mesh=mesh, out_specs=P(), check_vma=False)
        plain = share(
            lambda *args: jax.lax.pmean(jax.value_and_grad(mean)(*args), "data"), in_specs=specs
        )
        measured = share(with_fingerprint("data"), in_specs=(*specs, P("data")))
    else:
        plain, measured = jax.value_and_grad(mean), with_fingerprint()
        if lie == "cut":
            plain, measured = kept(plain, args), kept(measured, args)
    return plain, measured, args
