"""Networks with control flow, drawn block by block, with parameters that are used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import cabs_jax
from tests.jax.reference import assert_exact, assert_same, draw, mean_loss

LENGTH, WIDTH = 5, 4


def recurrent(h, p):
    def cell(state, row):
        state = jnp.tanh(row @ p["m"] + state @ p["m2"] + p["v"])
        return state, state

    return lax.scan(cell, p["v2"], h)[1]


def stacked(h, p):
    def layer(h, each):
        m, v = each
        return jnp.tanh(h @ m + v), None

    return lax.scan(jax.checkpoint(layer), h, (p["s"], p["s"][:, 0]))[0]


def routed(h, p):
    return jax.vmap(lambda row: lax.cond(row[0] > 0, lambda r: r @ p["m"], jnp.sin, row))(h)


BLOCKS = {
    "matrix": lambda h, p: h @ p["m"],
    "twice the same matrix": lambda h, p: jnp.tanh(h @ p["m"]) @ p["m"].T,
    "recurrence": recurrent,
    "stacked layers": stacked,
    "routing": routed,
    "jitted": lambda h, p: jax.jit(lambda h, m: jax.nn.silu(h @ m))(h, p["m"]),
}


def parameters(index):
    return {
        "m": draw(3 * index, WIDTH, WIDTH),
        "m2": draw(3 * index + 1, WIDTH, WIDTH),
        "v": 1.0 + 0.3 * draw(3 * index + 2, WIDTH),
        "v2": draw(3 * index + 3, WIDTH),
        "s": 0.5 * draw(3 * index + 5, 3, WIDTH, WIDTH),
    }


@pytest.mark.slow
@given(
    names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    is_shared=st.booleans(),
    is_double=st.booleans(),
    examples=st.sampled_from([2, 8]),
)
@settings(max_examples=6)
def test_random_networks_are_exact(names, is_shared, is_double, examples):
    def loss_fn(parameters, example):
        h = parameters["table"][example["ids"]] * example["scale"]
        for index, name in enumerate(names):
            h = BLOCKS[name](h, parameters["blocks"][0 if is_shared else index])
        scores = jnp.tanh(h) @ parameters["table"].T
        return -jnp.mean(jax.nn.log_softmax(scores)[:, 1]) + 0.1 * jnp.sum(scores**2)

    with jax.enable_x64(is_double):
        blocks = [parameters(index) for index in range(1 if is_shared else len(names))]
        ids = np.random.default_rng(1).integers(0, 7, (examples, LENGTH))
        batch = {"ids": jnp.asarray(ids), "scale": draw(2, examples, 1)}
        # The loop itself is in the precision of the network.
        rtol = None if is_double else 5e-4
        assert_exact(loss_fn, {"table": draw(0, 7, WIDTH), "blocks": blocks}, batch, rtol=rtol)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_each_block_is_exact_with_jit_and_without(name):
    def loss_fn(parameters, example):
        return jnp.sum(jnp.sin(BLOCKS[name](example, parameters)))

    assert_exact(loss_fn, parameters(0), draw(9, 8, LENGTH, WIDTH), jitted=(True, False))


def test_a_network_of_some_size_is_the_same_to_the_bit_if_that_is_wanted():
    def loss_fn(parameters, x):
        for m in parameters:
            x = jax.nn.gelu(x @ m) + x
        return jnp.mean(jnp.square(x))

    matrices = [0.05 * draw(index, 128, 128) for index in range(3)]
    batch = draw(5, 16, 64, 128)
    plain = jax.jit(jax.value_and_grad(mean_loss(loss_fn)))(matrices, batch)
    (loss, _), gradients = jax.jit(cabs_jax.value_and_grad(loss_fn, bitwise=True))(matrices, batch)
    assert_same((loss, gradients), plain)
    (loss, _), gradients = jax.jit(cabs_jax.value_and_grad(loss_fn))(matrices, batch)
    assert_same((loss, gradients), plain, ulps=64)
