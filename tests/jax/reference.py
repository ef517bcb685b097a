"""A plain loop over the examples, in NumPy and float64, against which everything is held."""

import jax
import jax.numpy as jnp
import numpy as np

import cabs_jax


def flat(tree):
    """Return all elements of a pytree, in float64 or complex128."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    wide = [leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64) for leaf in leaves]
    return np.concatenate([leaf.ravel() for leaf in wide])


def one_of(batch, index):
    return jax.tree.map(lambda array: array[index], batch)


def gradients_one_by_one(loss_fn, parameters, batch, options=None):
    """Return each example's gradient, shape (m, parameters)."""
    gradient = jax.jit(jax.grad(loss_fn), compiler_options=options)
    count = len(jax.tree.leaves(batch)[0])
    return np.stack([flat(gradient(parameters, one_of(batch, index))) for index in range(count)])


def mean_loss(loss_fn):
    def mean(parameters, batch):
        return jnp.mean(jax.vmap(loss_fn, (None, 0))(parameters, batch))

    return mean


def assert_same(found, expected, ulps=0, largest=0.0):
    """Assert that two pytrees are equal, to the bit or up to so many units in the last place.

    ``largest`` is that of what was added up: what cancels has an error of its size, of a few units.
    """
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        if ulps:
            slack = ulps * float(jnp.finfo(one.dtype).eps)
            scale = float(jnp.max(jnp.abs(other), initial=0.0))
            floor = 4 * largest * slack / ulps
            np.testing.assert_allclose(one, other, rtol=slack, atol=slack * scale + floor)
        else:
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def assert_exact(loss_fn, parameters, batch, *, jitted=(True,), rtol=None, options=None):
    """Assert that statistics are the loop's, and loss and gradients those of JAX to rounding.

    ``options`` are those that XLA compiles with.
    """
    single = jax.tree.leaves(parameters)[0].dtype in (jnp.float32, jnp.complex64)
    rtol = rtol or (2e-5 if single else 1e-10)
    rows = gradients_one_by_one(loss_fn, parameters, batch, options)
    square_sum = float((abs(rows) ** 2).sum())
    gradient_norm_squared = float((abs(rows.mean(axis=0)) ** 2).sum())
    for is_jitted in jitted:
        measured = cabs_jax.value_and_grad(loss_fn)
        plain = jax.value_and_grad(mean_loss(loss_fn))
        if is_jitted:
            measured, plain = (jax.jit(one, compiler_options=options) for one in (measured, plain))
        (loss, statistics), gradients = measured(parameters, batch)
        # For tiny products XLA chooses a loop that depends on what else it compiles, and on the
        # processor; networks of some size are held to the bit.
        expected = plain(parameters, batch)
        assert_same((loss, gradients), expected, ulps=64, largest=float(abs(rows).max()))
        assert (int(statistics.examples), int(statistics.groups)) == (len(rows), len(rows))
        np.testing.assert_allclose(
            float(statistics.group_square_sum), square_sum, rtol=rtol, atol=1e-30
        )
        # Where gradients nearly cancel, the batch's own gradient carries their rounding errors.
        slack = (
            rtol * (gradient_norm_squared * square_sum / len(rows)) ** 0.5 + rtol**2 * square_sum
        )
        np.testing.assert_allclose(
            float(statistics.gradient_norm_squared),
            gradient_norm_squared,
            rtol=rtol,
            atol=slack + 1e-30,
        )


def draw(seed, *shape, dtype=None):
    """Return an array of normal numbers."""
    numbers = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(numbers, dtype or jnp.result_type(float))
