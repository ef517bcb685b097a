"""Gradients and statistics of split batches, against a float64 loop over the examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cabs
import cabs_jax
from tests.jax.reference import draw, flat, gradients_one_by_one, mean_loss


def loss_fn(parameters, example):
    hidden = jnp.tanh(example["x"] @ parameters["in"] + parameters["bias"])
    return -jax.nn.log_softmax(hidden @ parameters["out"])[example["y"]]


def drawn(seed, examples):
    """Return parameters and a batch."""
    parameters = {"in": draw(seed, 4, 6), "bias": draw(seed + 1, 6), "out": draw(seed + 2, 6, 3)}
    labels = np.random.default_rng(seed).integers(0, 3, examples)
    return parameters, {"x": draw(seed + 3, examples, 4), "y": jnp.asarray(labels)}


def doubled(tree):
    """Return the same numbers in float64."""
    return jax.tree.map(
        lambda one: jnp.asarray(one, jnp.float64) if one.dtype == jnp.float32 else one, tree
    )


def rows_of(parameters, batch):
    """Return each example's gradient, shape (m, parameters), in float64."""
    with jax.enable_x64(True):
        return gradients_one_by_one(loss_fn, doubled(parameters), doubled(batch))


def assert_near(found, expected, rtol):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.max(np.abs(expected)))


measured = jax.jit(cabs_jax.value_and_grad(loss_fn))
plain = jax.jit(jax.grad(mean_loss(loss_fn)))


def weighted(total, gradients, weight):
    if total is None:
        return jax.tree.map(lambda one: weight * one, gradients)
    return jax.tree.map(lambda one, other: one + weight * other, total, gradients)


def exact(parameters, pieces, examples):
    """Return gradients and exact statistics of a batch from its pieces."""
    dtype = jax.tree.leaves(parameters)[0].dtype
    parts, total = cabs_jax.PartialStatistics.zero(dtype), None
    for piece in pieces:
        (_, statistics), gradients = measured(parameters, piece)
        parts += statistics.partial
        total = weighted(total, gradients, len(piece["y"]) / examples)
    return total, parts.complete(total)


@pytest.mark.slow
# At most three at a time: pieces are then of two at least, and one example shows no variance.
def test_replicas_have_the_gradient_and_the_statistics_of_the_batch_together():
    with jax.enable_x64(True):
        parameters, batch = drawn(1, 14)
        shares = cabs.split(batch, max_microbatch=4, replicas=2)
        assert [[len(piece["y"]) for piece in share] for share in shares] == [[3, 4], [3, 4]]
        pieces = [piece for share in shares for piece in share]
        gradients, statistics = exact(parameters, pieces, 14)
        trace = float(statistics.variance_trace)
    rows = rows_of(parameters, batch)
    assert_near(flat(gradients), rows.mean(axis=0), 1e-10)
    assert trace == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-9)


def test_pieces_that_are_filled_up_after_the_split_count_no_example_twice():
    # Filled up before, some piece could hold nothing but what is masked.
    with jax.enable_x64(True):
        parameters, batch = drawn(2, 11)
        parts, total = cabs_jax.PartialStatistics.zero(jnp.float64), None
        for piece in cabs.split(jax.device_get(batch), max_microbatch=4):
            filled, mask = cabs_jax.pad(piece, 4)
            (_, statistics), gradients = measured(parameters, filled, mask=mask)
            parts += statistics.partial
            total = weighted(total, gradients, len(piece["y"]) / 11)
        found = parts.complete(total).read()
    rows = rows_of(parameters, batch)
    assert (found.examples, found.groups) == (11, 11)
    assert_near(flat(total), rows.mean(axis=0), 1e-10)
    assert found.variance_trace == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-9)


def is_out_of_memory(error):
    return "RESOURCE_EXHAUSTED" in str(error)


@pytest.mark.parametrize("kind", [RuntimeError, jax.errors.JaxRuntimeError])
def test_a_run_that_is_out_of_memory_goes_on_with_the_same_gradient(kind):
    cap, tried = cabs.MemoryCap(64), []

    def step(pieces):
        tried.append([len(piece["y"]) for piece in pieces])
        if max(tried[-1]) > 4:
            raise kind("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.")
        return jax.block_until_ready(exact(parameters, pieces, 16))

    with jax.enable_x64(True):
        parameters, batch = drawn(3, 16)
        with pytest.warns(RuntimeWarning, match="the cap is lowered from"):
            gradients, statistics = cap.run(step, batch, out_of_memory=is_out_of_memory)
        trace = float(statistics.variance_trace)
    assert tried == [[16], [8, 8], [4, 4, 4, 4]]
    rows = rows_of(parameters, batch)
    assert_near(flat(gradients), rows.mean(axis=0), 1e-10)
    assert trace == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-9)


def test_another_runtime_error_passes_through():
    def step(_):
        raise RuntimeError("INTERNAL: something else")

    cap = cabs.MemoryCap(4)
    with pytest.raises(RuntimeError, match="something else"):
        cap.run(step, jnp.ones(4), out_of_memory=is_out_of_memory)
    assert cap.examples == 4


def test_random_keys_are_split_with_their_examples():
    keys = jax.random.split(jax.random.key(0), 5)
    pieces = cabs.split({"key": keys, "x": np.arange(5)}, max_microbatch=2)
    data = np.concatenate([jax.random.key_data(piece["key"]) for piece in pieces])
    np.testing.assert_array_equal(data, jax.random.key_data(keys))


def test_a_traced_batch_is_split_by_its_shape():
    @jax.jit
    def total(x):
        return sum(jnp.sum(piece) for piece in cabs.split(x, max_microbatch=2))

    assert float(total(jnp.arange(5.0))) == 10.0
