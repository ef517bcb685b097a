"""Mistakes that are easily made, by others and here: one test each, named after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cabs
import cabs_jax
from tests.jax.reference import assert_exact, draw


def test_loss_scaling_scales_the_statistics_by_its_square():
    def loss_fn(weight, x):
        return jnp.sum(jnp.tanh(x.astype(jnp.bfloat16) @ weight.astype(jnp.bfloat16))).astype(
            jnp.float32
        )

    weight, batch = draw(0, 8, 8), draw(1, 8, 8)
    (_, plain), _ = jax.jit(cabs_jax.value_and_grad(loss_fn))(weight, batch)
    scaled_loss = lambda weight, x: 1024.0 * loss_fn(weight, x)  # noqa: E731
    (_, scaled), _ = jax.jit(cabs_jax.value_and_grad(scaled_loss))(weight, batch)
    np.testing.assert_allclose(
        scaled.group_square_sum, plain.group_square_sum * 1024.0**2, rtol=2e-2
    )


def test_parameters_that_are_not_used_count_nothing():
    found = cabs_jax.verify(
        lambda p, x: p["a"] * x, {"a": 2.0, "b": jnp.ones(3)}, jnp.array([1.0, 2.0])
    )
    assert found.error == 0.0
    assert found.rows[1].rule == "no gradient"


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable", "everything_saveable"])
def test_activation_checkpointing_is_exact(policy):
    def block(h, m):
        return jnp.tanh(h @ m)

    def loss_fn(parameters, x):
        for m in parameters:
            x = jax.checkpoint(block, policy=getattr(jax.checkpoint_policies, policy))(x, m)
        return jnp.sum(x)

    assert_exact(loss_fn, [draw(0, 4, 4), draw(1, 4, 4)], draw(2, 8, 3, 4))


def test_padding_ids_add_to_no_row():
    def loss_fn(table, ids):
        rows = table.at[ids].get(mode="fill", fill_value=0.0)
        return jnp.sum(jnp.sin(rows + 0.5))

    ids = jnp.array([[0, 1, 99, 99], [2, 2, 1, 99]] * 4)
    assert_exact(loss_fn, draw(0, 3, 4), ids)


@pytest.mark.parametrize("rows", [9, 700])
def test_tied_weights_count_the_cross_terms(rows):
    def loss_fn(parameters, ids):
        hidden = jnp.tanh(parameters["table"][ids] @ parameters["m"])
        return -jnp.mean(jax.nn.log_softmax(hidden @ parameters["table"].T)[:, 0])

    ids = jnp.asarray(np.random.default_rng(0).integers(0, 9, (8, 6)))
    parameters = {"table": draw(0, rows, 40), "m": draw(1, 40, 40)}
    assert_exact(loss_fn, parameters, ids)
    rules = {row.name: row.rule for row in cabs_jax.verify(loss_fn, parameters, ids).rows}
    assert rules["argument 0['table']"] == (
        "lookup + matrix" if rows == 700 else "formed at gather + formed at dot_general"
    )


def test_dropout_has_the_same_mask_in_both_passes():
    def loss_fn(matrix, example):
        keep = jax.random.bernoulli(example["key"], 0.5, (4,))
        return jnp.sum(jnp.where(keep, jnp.tanh(example["x"] @ matrix), 0.0))

    batch = {"x": draw(0, 8, 3), "key": jax.random.split(jax.random.key(0), 8)}
    assert_exact(loss_fn, draw(1, 3, 4), batch)


def test_keys_of_a_padded_batch_are_those_of_the_smaller_one():
    whole = jax.random.key_data(jax.random.split(jax.random.key(0), 8))
    some = jax.random.key_data(jax.random.split(jax.random.key(0), 5))
    np.testing.assert_array_equal(whole[:5], some)


def test_a_grid_bounds_the_number_of_compilations():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(3000, 6)).astype(np.float32)
    targets = (inputs @ rng.normal(size=6) + 2.0 * rng.normal(size=3000)).astype(np.float32)
    grid = cabs.BatchSizes.geometric(8, 512)
    controller = cabs.Controller(8, sizes=grid)
    sampler = cabs.BatchSampler(len(inputs), controller, seed=0)
    compiled = []

    @jax.jit
    def step(weight, batch, mask):
        compiled.append(batch["x"].shape)
        loss_fn = lambda w, example: 0.5 * (w @ example["x"] - example["y"]) ** 2  # noqa: E731
        (loss, statistics), gradient = cabs_jax.value_and_grad(loss_fn)(weight, batch, mask=mask)
        return weight - 0.05 * gradient, loss, statistics.variance_trace

    weight, raw = jnp.zeros(6), set()
    while len(raw) < 300:
        for indices in sampler:
            batch = {"x": inputs[indices], "y": targets[indices]}
            weight, loss, trace = step(weight, *cabs_jax.pad(batch, grid))
            # A rate that moves takes the rule through the whole grid.
            rate = 3.0 * (1.0 + np.sin(len(raw) / 30.0))
            raw.add(controller.update(learning_rate=rate, variance_trace=trace, loss=loss).raw)
    assert len(compiled) <= len(grid)
    assert len(compiled) >= 4
