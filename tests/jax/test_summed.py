"""Gradients that are the sum of the examples' own, which are squared, against a float64 loop."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import cabs_jax
from cabs.gradients import outer_products
from cabs_jax import taps
from cabs_jax.norms import arrays, reductions
from cabs_jax.rules import parameter_gradients
from tests.jax import test_networks as networks
from tests.jax import test_operations as operations
from tests.jax.reference import (
    assert_exact,
    assert_same,
    draw,
    gradients_one_by_one,
    mean_loss,
)


@contextmanager
def summed(chunk=2**18):
    """Sum wherever gradients are formed, so many elements at a time; yield at which operations."""
    found = []
    at = taps.Taps.at

    def look(self, meeting, modes):
        tap = at(self, meeting, modes)
        if tap is not None and tap.is_summed:
            found.append(meeting.name)
        return tap

    with (
        mock.patch.object(outer_products, "ADDED", 0),
        mock.patch.object(parameter_gradients, "_has_threads", return_value=False),
        mock.patch.object(reductions, "_CHUNK", chunk),
        mock.patch.object(arrays, "_SUMMED", chunk),
        mock.patch.object(taps.Taps, "at", look),
    ):
        yield found


@pytest.mark.parametrize("chunk", [1, 2**18])
@pytest.mark.parametrize(
    ("name", "test"),
    [
        (
            "dot_general",
            operations.test_products_with_any_axes_batched_contracted_or_free_are_exact,
        ),
        (
            "conv_general_dilated",
            operations.test_convolutions_of_any_layout_stride_dilation_padding_and_groups_are_exact,
        ),
        (
            "conv_general_dilated",
            lambda: operations.test_wide_kernels_are_taken_a_row_at_a_time_and_are_exact(200),
        ),
    ],
)
def test_every_kind_of_operation_is_exact(name, test, chunk):
    with summed(chunk) as found:
        test()
    assert name in found


def normalized(h, p):
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    return jnp.tanh(h * p["v"] + p["v2"]) @ p["m"] + p["v"]


def branched(h, p):
    return lax.cond(h[0, 0] > 0, lambda h: jnp.tanh(h @ p["m"]) + p["v"], jnp.sin, h)


def composed(h, p):
    norm = jnp.sqrt(jnp.sum(p["m"] ** 2, axis=0))
    return jnp.tanh(h @ (p["m"] / norm)) @ p["s"][1].T


def tied(h, p):
    rows = p["m"][jnp.array([0, 2, 1, 0, 0])] + h
    return jnp.tanh(rows @ p["m"]) @ p["m2"]


BLOCKS = networks.BLOCKS | {
    "scale and shift": normalized,
    "a branch by the example": branched,
    "a matrix that is computed": composed,
    "a table and a matrix": tied,
}


@pytest.mark.parametrize("name", sorted(BLOCKS))
@pytest.mark.parametrize(("examples", "chunk"), [(1, 2**18), (7, 32)])
def test_every_kind_of_use_is_exact(name, examples, chunk):
    def loss_fn(parameters, example):
        return jnp.sum(jnp.sin(BLOCKS[name](jnp.sin(example @ parameters["first"]), parameters)))

    with jax.enable_x64(True), summed(chunk) as found:
        parameters = networks.parameters(0) | {"first": draw(8, 6, networks.WIDTH)}
        assert_exact(loss_fn, parameters, draw(9, examples, networks.LENGTH, 6))
    assert "dot_general" in found


def test_a_step_that_is_not_jitted_is_exact_and_masks_leave_examples_out():
    def loss_fn(parameters, example):
        return jnp.sum(jnp.sin(normalized(example, parameters)))

    with jax.enable_x64(True), summed(32):
        parameters, batch = networks.parameters(0), draw(9, 8, networks.LENGTH, networks.WIDTH)
        assert_exact(loss_fn, parameters, batch, jitted=(False,))
        mask = jnp.arange(8) % 3 > 0
        rows = gradients_one_by_one(loss_fn, parameters, batch[mask])
        step = jax.jit(cabs_jax.value_and_grad(loss_fn))
        (_, statistics), gradients = step(parameters, batch.at[0].set(jnp.nan), mask=mask)
        _, expected = jax.value_and_grad(mean_loss(loss_fn))(parameters, batch[mask])
        assert_same(gradients, expected, ulps=64)
        assert float(statistics.group_square_sum) == pytest.approx((rows**2).sum(), rel=1e-10)


def test_gradients_in_half_precision_are_summed_in_single():
    def loss_fn(matrix, example):
        # Every cotangent is 1, and every gradient 1 over the number of examples.
        return jnp.sum((example @ matrix).astype(jnp.float32))

    matrix, batch = jnp.zeros((2, 3), jnp.bfloat16), jnp.ones((768, 5, 2), jnp.bfloat16)
    with summed(8) as found:
        (_, statistics), gradient = jax.jit(cabs_jax.value_and_grad(loss_fn))(matrix, batch)
    assert found == ["dot_general"]
    assert gradient.dtype == jnp.bfloat16
    # In half precision a sum of 768 equal numbers stops at 256 times the first.
    np.testing.assert_allclose(np.asarray(gradient, np.float64), 5.0, rtol=1e-2)
    assert float(statistics.group_square_sum) == pytest.approx(768 * 6 * 25.0, rel=1e-2)


def convolved(parameters, example):
    found = lax.conv(example, parameters["kernel"], (1, 1), "SAME") * parameters["scale"]
    return jnp.sum(jnp.tanh(found.reshape(-1) @ parameters["matrix"]))


KERNEL = {
    "kernel": draw(0, 4, 2, 3, 3),
    "scale": draw(1, 1, 4, 1, 1),
    "matrix": draw(2, 4 * 25, 3),
}
IMAGES = draw(3, 6, 1, 2, 5, 5)


@pytest.mark.parametrize("options", [{"bitwise": True}, {"sample": 3}, {}])
def test_what_spares_nothing_and_what_shall_be_exact_to_the_bit_is_left_to_jax(options):
    step = jax.jit(cabs_jax.value_and_grad(convolved, **options))
    plain = jax.jit(jax.value_and_grad(mean_loss(convolved)))(KERNEL, IMAGES)
    with summed() as found, mock.patch.object(outer_products, "ADDED", 16):
        (_, _), gradients = step(KERNEL, IMAGES)
    # A matrix of one position spares nothing.
    assert found == ([] if options else ["conv_general_dilated", "mul"])
    assert_same(gradients, plain[1], ulps=64)


def test_a_kernel_of_few_positions_spares_nothing():
    with summed() as found, mock.patch.object(outer_products, "ADDED", 25):
        jax.eval_shape(cabs_jax.value_and_grad(convolved), KERNEL, IMAGES)
    assert found == ["mul"]


@pytest.mark.parametrize("is_jitted", [False, True])
def test_loss_and_gradients_are_differentiated_again_as_plain_ones(is_jitted):
    def loss_fn(parameters, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ parameters["in"]) @ parameters["out"]))

    parameters, batch = {"in": draw(0, 4, 4), "out": draw(1, 4, 4)}, draw(2, 3, 32, 4)
    made = cabs_jax.value_and_grad(loss_fn)
    plain = jax.value_and_grad(mean_loss(loss_fn))

    def penalized(step, parameters, batch):
        loss, gradients = step(parameters, batch)
        return loss + sum(jnp.sum(jnp.square(one)) for one in jax.tree.leaves(gradients))

    def measured(parameters, batch):
        (loss, _), gradients = made(parameters, batch)
        return loss, gradients

    found, expected = (
        jax.grad(partial(penalized, jax.jit(one) if is_jitted else one), argnums=(0, 1))
        for one in (measured, plain)
    )
    with summed() as at:
        jax.eval_shape(made, parameters, batch)
        assert at
        assert_same(found(parameters, batch), expected(parameters, batch), ulps=256)
        (_, one), (_, other) = (
            jax.jvp(lambda p, step=step: step(p, batch)[0], (parameters,), (parameters,))
            for step in (measured, plain)
        )
    assert float(jnp.abs(other)) > 0.1
    assert_same(one, other, ulps=64)
