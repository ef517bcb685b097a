"""Calls outside of ``jit``: compiled once for each structure, and never for another one."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cabs_jax
from cabs_jax import gradient
from tests.jax.reference import draw

WEIGHT, BATCH = draw(0, 3), draw(1, 8, 3)


@pytest.fixture
def measured(monkeypatch):
    """Return a list that grows: whether it was traced what is measured, not run at once."""
    found = []
    measure = gradient.measure

    def noted(traced, *args):
        found.append(any(isinstance(one, jax.core.Tracer) for one in traced.own.leaves))
        return measure(traced, *args)

    monkeypatch.setattr(gradient, "measure", noted)
    return found


def assert_scaled(found, factor, batch=BATCH):
    """Assert that statistics are those of ``factor * sin(weight @ x)``."""
    (loss, statistics), gradients = found
    weight, rows = np.asarray(WEIGHT, float), np.asarray(batch, float)
    factor = np.broadcast_to(np.asarray(factor, float), len(rows))
    each = (factor * np.cos(rows @ weight))[:, None] * rows
    np.testing.assert_allclose(float(loss), np.mean(factor * np.sin(rows @ weight)), rtol=1e-4)
    np.testing.assert_allclose(gradients, each.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics.group_square_sum, np.sum(each**2), rtol=1e-5)


def test_a_structure_is_compiled_once_whatever_function_has_it(measured):
    for seed in range(4):
        batch = draw(10 + seed, 8, 3)
        call = cabs_jax.value_and_grad(lambda w, x: 2.5 * jnp.sin(w @ x))
        assert_scaled(call(WEIGHT, batch), 2.5, batch)
    assert measured == [True]


def test_arrays_that_a_loss_closes_over_are_those_of_the_call(measured):
    held = {}
    call = cabs_jax.value_and_grad(lambda w, x: jnp.sum(held["factors"]) * jnp.sin(w @ x))
    for factor in (0.5, -3.0):
        held["factors"] = jnp.full(7, factor)
        assert_scaled(call(WEIGHT, BATCH), 7 * factor)
    assert measured == [True]
    watched = weakref.ref(held.setdefault("last", jnp.full(7, 0.125)))
    held["factors"] = held.pop("last")
    assert_scaled(call(WEIGHT, BATCH), 0.875)
    held.clear()
    gc.collect()
    assert watched() is None


def test_an_array_of_numpy_is_read_at_each_call(measured):
    factor = np.full(1, 0.25, np.float32)
    call = cabs_jax.value_and_grad(lambda w, x: jnp.sum(factor * jnp.sin(w @ x)))
    for value in (0.25, 4.0):
        factor[:] = value
        assert_scaled(call(WEIGHT, BATCH), value)
    assert measured == [True]


def test_numbers_and_branches_that_change_are_seen_and_compile_only_when_they_come_again(measured):
    held = {"function": jnp.sin}
    call = cabs_jax.value_and_grad(lambda w, x: held["factor"] * held["function"](w @ x))
    for factor in (1.125, 2.125, 3.125, 2.125, 2.125):
        held["factor"] = factor
        assert_scaled(call(WEIGHT, BATCH), factor)
    assert measured == [True, False, False, True]
    held["function"] = lambda h: -jnp.sin(h)
    assert_scaled(call(WEIGHT, BATCH), -2.125)
    assert measured == [True, False, False, True, False]


@pytest.mark.parametrize("is_array", [False, True])
def test_a_custom_derivative_is_that_of_the_call(is_array):
    held = {}

    @jax.custom_vjp
    def scaled(h):
        return h

    scaled.defvjp(lambda h: (h, None), lambda _, cotangent: (held["factor"] * cotangent,))
    call = cabs_jax.value_and_grad(lambda w, x: 1.5 * jnp.sin(scaled(w @ x)))
    weight, rows = np.asarray(WEIGHT, float), np.asarray(BATCH, float)
    each = 1.5 * np.cos(rows @ weight)[:, None] * rows
    for factor in (1.0, 2.0, 2.0, -3.0, 1.0):
        held["factor"] = jnp.float32(factor) if is_array else factor
        (_, statistics), gradients = call(WEIGHT, BATCH)
        np.testing.assert_allclose(gradients, factor * each.mean(axis=0), rtol=1e-4, atol=1e-6)
        square_sum = factor**2 * np.sum(each**2)
        np.testing.assert_allclose(statistics.group_square_sum, square_sum, rtol=1e-5)


def test_activations_with_a_custom_derivative_are_compiled_once(measured):
    call = cabs_jax.value_and_grad(lambda w, x: jax.nn.relu(w @ x) - jax.nn.relu(-(w @ x)))
    for _ in range(3):
        (_, statistics), _ = call(WEIGHT, BATCH)
        np.testing.assert_allclose(statistics.group_square_sum, np.sum(np.square(BATCH)), rtol=1e-5)
    assert measured == [True]


def test_options_and_settings_are_those_of_the_call(measured):
    def loss_fn(w, x):
        return 0.75 * jnp.sin(w @ x)

    whole = cabs_jax.value_and_grad(loss_fn)
    assert_scaled(whole(WEIGHT, BATCH), 0.75)
    (_, sampled), _ = cabs_jax.value_and_grad(loss_fn, sample=3)(WEIGHT, BATCH)
    assert int(sampled.estimated) == 5
    _, gradients = cabs_jax.value_and_grad(loss_fn, argnums=(0,))(WEIGHT, BATCH)
    assert isinstance(gradients, tuple)
    assert measured == [True] * 3
    mask = jnp.arange(8) < 5
    assert_scaled(whole(WEIGHT, BATCH, mask=mask), 0.75, BATCH[:5])
    assert_scaled(whole(WEIGHT, BATCH, mask=jnp.arange(8) < 4), 0.75, BATCH[:4])
    assert measured == [True] * 4
    with jax.enable_x64(True):
        assert whole(np.asarray(WEIGHT, float), np.asarray(BATCH, float))[1].dtype == jnp.float64


def test_effects_happen_at_each_call(measured, capfd):
    def loss_fn(w, x):
        jax.debug.print("here")
        return 0.625 * jnp.sin(w @ x)

    call = cabs_jax.value_and_grad(loss_fn)
    for _ in range(2):
        assert_scaled(call(WEIGHT, BATCH), 0.625)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("here") == 2
    assert measured == [False, False]


def test_inside_of_jit_nothing_is_compiled_apart():
    step = cabs_jax.value_and_grad(lambda w, x: 0.375 * jnp.sin(w @ x))
    program = str(jax.make_jaxpr(step)(WEIGHT, BATCH))
    assert "name=<lambda>" not in program
    assert_scaled(jax.jit(step)(WEIGHT, BATCH), 0.375)
