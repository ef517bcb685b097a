"""Programs that somebody wrote to break the adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import cabs_jax
from tests.jax.reference import assert_exact, draw

X = draw(2, 8, 4)
WEIGHTS = {"w": draw(0, 4), "flat": draw(1, 384), "k": jnp.ones(())}


def constant_beside_the_example(x):
    """Return two values from one program, of which the second is no example's."""
    return jax.jit(lambda x: (2.0 * x, 3.0 * jnp.ones(4)))(x)


def into_a_checkpoint(p, x):
    a, c = constant_beside_the_example(x)
    return jnp.sum(jax.checkpoint(lambda c, w: c * w)(c, p["w"]) * x) + jnp.sum(a)


def into_a_product(p, x):
    a, c = constant_beside_the_example(x)
    return jnp.sum(jax.jit(lambda c, w: w @ c)(c, p["w"]) * x) + jnp.sum(a)


def into_a_loop(p, x):
    _, c = constant_beside_the_example(x)
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h * w), None), c, jnp.stack([p["w"], p["w"] ** 2]))
    return jnp.sum(h * x)


def from_branches(p, x):
    c = lax.cond(p["k"] > 0, jnp.ones_like, jnp.zeros_like, x)
    return jnp.sum(c * p["w"] * x)


def slices_of_a_reshaped_matrix_in_a_checkpoint(p, x):
    @jax.checkpoint
    def block(w, x):
        return jnp.sum(jnp.tanh((x @ w[:, :32]) * (x @ w[:, 32:64])) * (x @ w[:, 64:]))

    return block(p["flat"].reshape(4, 96), x)


def a_penalty_by_a_number_from_a_loop(p, x):
    def step(carry, row):
        h, count = carry
        return (jnp.tanh(h * p["w"] + row), count + 1.0), None

    (h, count), _ = lax.scan(step, (x, 0.0), jnp.stack([x, x]))
    return jnp.sum(h) + 0.1 * count * jnp.sum(p["flat"] ** 2)


@pytest.mark.parametrize(
    "loss_fn",
    [
        into_a_checkpoint,
        into_a_product,
        into_a_loop,
        from_branches,
        slices_of_a_reshaped_matrix_in_a_checkpoint,
        a_penalty_by_a_number_from_a_loop,
    ],
)
def test_programs_are_exact(loss_fn):
    # Few examples: bits are not what is tested here.
    assert_exact(loss_fn, WEIGHTS, X[:4])


@pytest.mark.parametrize("mode", [None, "clip", "fill"])
def test_numbers_of_rows_in_a_type_too_narrow_for_the_table(mode):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 255, (8, 6)), jnp.uint8)

    def loss_fn(table, ids):
        return jnp.sum(jnp.sin(jnp.take(table, ids, axis=0, mode=mode)))

    # Without these, as the tests are compiled, XLA adds the rows of a plain gradient up wrongly.
    options = {"xla_cpu_use_fusion_emitters": True}
    assert_exact(loss_fn, draw(0, 300, 4), ids, options=options)


def test_numbers_of_rows_that_are_out_of_range():
    def loss_fn(table, ids):
        return jnp.sum(jnp.sin(table[ids]))

    assert_exact(loss_fn, draw(0, 5, 3), jnp.array([[0, 5], [1, 7], [2, 2], [4, 3]] * 2))


def test_a_table_that_is_looked_up_as_it_is_transposed_and_in_a_product():
    def loss_fn(table, ids):
        rows, moved = table[ids], table.transpose(0, 2, 1)[ids]
        scores = jnp.einsum("tba,vab->tv", moved, table)
        return jnp.sum(jnp.sin(rows) * jnp.arange(4.0)) + jnp.sum(jnp.cos(scores))

    ids = jnp.asarray(np.random.default_rng(0).integers(0, 40, (8, 3)))
    for rows in (60, 900):
        assert_exact(loss_fn, 0.3 * draw(0, rows, 6, 4), ids)


def test_complex_penalties():
    def loss_fn(w, x):
        return jnp.sum(jnp.abs(x @ w) ** 2) + 0.1 * jnp.sum(jnp.abs(w) ** 2)

    def drawn(*shape):
        return lax.complex(draw(0, *shape), draw(1, *shape))

    with jax.numpy_dtype_promotion("standard"):
        assert_exact(loss_fn, drawn(70, 70), drawn(8, 70), rtol=1e-4)


def test_a_while_loop_beside_the_loss_needs_no_gradient():
    @jax.jit
    def both(p, x):
        count = lax.while_loop(lambda c: c < 5.0, lambda c: c + 1.0 + jnp.abs(p["k"]), x[0])
        return jnp.sum(x * p["w"]), count

    (loss, _, count), _ = cabs_jax.value_and_grad(both, has_aux=True)(WEIGHTS, X)
    assert count.shape == (8,)
    assert np.isfinite(loss)
