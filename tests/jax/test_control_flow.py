"""Calls, checkpoints, loops and branches that parameters go through."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import cabs_jax
from tests.jax.reference import assert_exact, draw

M, V = draw(0, 4, 4), draw(1, 4)
PARAMETERS = {"m": 0.5 * M, "v": V}
BATCH = draw(2, 8, 4)


@jax.custom_jvp
def scaled_tanh(x, scale):
    return jnp.tanh(x) * scale


@scaled_tanh.defjvp
def _(primals, tangents):
    (x, scale), (dx, ds) = primals, tangents
    return scaled_tanh(x, scale), 2.0 * dx * scale + ds * jnp.tanh(x)


@jax.custom_vjp
def layer(x, m):
    return x @ m


layer.defvjp(
    lambda x, m: (x @ m, (x, m)), lambda kept, ct: (3.0 * ct @ kept[1].T, jnp.outer(*kept[:1], ct))
)


def matrix(p, x):
    return jnp.tanh(x @ p["m"] + p["v"])


def scan_with_parameters_in_the_carry(p, x):
    def step(carry, row):
        m, h = carry
        return (m, jnp.tanh(h @ m + row)), None

    return lax.scan(step, (p["m"], x), jnp.stack([x, 2.0 * x]))[0][1]


def scan_that_changes_a_parameter_without_the_example(p, x):
    def step(carry, _):
        m, h = carry
        return (jnp.sin(m), jnp.tanh(h @ m)), None

    return lax.scan(step, (p["m"], x), length=3)[0][1]


def scan_whose_outputs_are_parameters(p, x):
    def step(h, row):
        return jnp.tanh(h @ p["m"]), (row, h)

    h, (rows, _) = lax.scan(step, x, p["m"])
    return h @ rows


def nested_scans(p, x):
    def outer(h, m):
        return lax.scan(lambda h, v: (jnp.tanh(h * v + h @ m), None), h, jnp.stack([p["v"], V]))

    return lax.scan(outer, x, jnp.stack([p["m"], M]), reverse=True, unroll=2)[0]


def weights_made_outside_of_the_loop(p, x):
    m = p["m"] * jnp.exp(p["v"])
    return lax.scan(lambda h, _: (jnp.tanh(h @ m), None), x, length=3)[0]


def while_whose_result_is_stopped(p, x):
    scale = lax.while_loop(lambda s: s < 5.0, lambda s: s * 2.0, jnp.abs(p["v"][0]) + 1.0)
    return x @ p["m"] * lax.stop_gradient(scale)


def branches_by_the_example(p, x):
    return lax.cond(x[0] > 0, lambda: x @ p["m"], lambda: jnp.sin(x) * p["v"])


def branches_with_the_same_matrix(p, x):
    return lax.switch(
        (x[0] > 0).astype(jnp.int32), [lambda: x @ p["m"], lambda: jnp.sin(x @ p["m"].T)]
    )


def branches_by_a_parameter(p, x):
    return lax.cond(p["v"][0] > 0, lambda: x @ p["m"], lambda: x + p["v"])


def branch_that_returns_a_parameter(p, x):
    return lax.cond(x[0] > 0, lambda: p["v"], lambda: x) @ p["m"]


def gradient_inside(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["m"]) ** 2))(x)


PROGRAMS = {
    "jit": lambda p, x: jax.jit(matrix)(p, x),
    "jit twice": lambda p, x: (f := jax.jit(matrix))(p, f(p, x)),
    "jit of parameters": lambda p, x: x @ jax.jit(lambda m: jnp.transpose(m))(p["m"]),
    "checkpoint": lambda p, x: jax.checkpoint(matrix)(p, x),
    "checkpoint with a policy": lambda p, x: jax.checkpoint(
        matrix, policy=jax.checkpoint_policies.dots_saveable
    )(p, x),
    "checkpoint of parameters": lambda p, x: x @ jax.checkpoint(jnp.sin)(p["m"]),
    "custom jvp": lambda p, x: scaled_tanh(x @ p["m"], p["v"]),
    "custom vjp": lambda p, x: layer(x, p["m"]),
    "fori loop": lambda p, x: lax.fori_loop(0, 3, lambda _, h: matrix(p, h), x),
    "vmap inside": lambda p, x: jax.vmap(partial(matrix, p))(jnp.stack([x, x + 1.0])),
    "initial state": lambda p, x: lax.scan(lambda h, r: (h * r, None), p["v"], x)[0] @ p["m"],
    **{
        function.__name__.replace("_", " "): function
        for function in (
            scan_with_parameters_in_the_carry,
            scan_that_changes_a_parameter_without_the_example,
            scan_whose_outputs_are_parameters,
            nested_scans,
            weights_made_outside_of_the_loop,
            while_whose_result_is_stopped,
            branches_by_the_example,
            branches_with_the_same_matrix,
            branches_by_a_parameter,
            branch_that_returns_a_parameter,
            gradient_inside,
        )
    },
}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_programs_are_exact(name):
    def loss_fn(parameters, x):
        return jnp.sum(jnp.sin(PROGRAMS[name](parameters, x)))

    assert_exact(loss_fn, PARAMETERS, BATCH, jitted=(True, False))


def test_outputs_that_turn_out_to_be_the_same_for_all_examples_are_exact():
    @jax.jit
    def both(x):
        return x * 2.0, jnp.full((4,), 3.0)

    def loss_fn(parameters, x):
        doubled, constant = both(x)
        return jnp.sum(jnp.sin(constant * parameters["v"])) + jnp.sum(doubled @ parameters["m"])

    assert_exact(loss_fn, PARAMETERS, BATCH)


def test_a_while_loop_that_gradients_go_through_is_an_error_that_names_the_parameter():
    def loss_fn(parameters, x):
        grown = 1.0 + jnp.abs(parameters["v"][0])
        return lax.while_loop(lambda y: y < 9.0, lambda y: y + grown, x[0])

    with pytest.raises(cabs_jax.UncoveredParameterError, match=r"argument 0\['v'\].* while"):
        cabs_jax.value_and_grad(loss_fn)(PARAMETERS, BATCH)


@pytest.mark.parametrize("loop", [lax.scan, jax.checkpoint])
def test_gradients_of_a_recurrent_matrix_are_not_formed(loop):
    def loss_fn(matrix, rows):
        def cell(h, row):
            return jnp.tanh(h @ matrix + row), None

        if loop is lax.scan:
            return jnp.sum(lax.scan(cell, rows[0], rows)[0])
        return jnp.sum(jax.checkpoint(cell)(cell(rows[0], rows[1])[0], rows[2])[0])

    measured = jax.jit(cabs_jax.value_and_grad(loss_fn))
    matrix, batch = 0.1 * draw(0, 96, 96), draw(1, 64, 4, 96)
    text = measured.lower(matrix, batch).as_text()
    assert "64x96x96x" not in text
    assert np.isfinite(measured(matrix, batch)[0][1].group_square_sum)
    assert_exact(loss_fn, matrix, batch[:3])
