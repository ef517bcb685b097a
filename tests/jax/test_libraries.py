"""Models of the libraries that people write models with."""

import equinox
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import cabs_jax
from tests.jax.reference import assert_exact, draw
from tests.jax.test_loader import Run, over_arrays, same

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (8, 6)))


@pytest.fixture(autouse=True)
def _as_users_have_it():
    # These libraries promote types themselves.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
def test_a_linen_transformer_with_dropout_and_tied_embeddings():
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, ids):
            embed = flax.linen.Embed(11, 8)
            hidden = embed(ids)
            attend = flax.linen.MultiHeadDotProductAttention(2, deterministic=True)
            hidden += attend(flax.linen.LayerNorm()(hidden))
            hidden = flax.linen.remat(flax.linen.Dense)(8)(flax.linen.gelu(hidden))
            return embed.attend(flax.linen.Dropout(0.3, deterministic=False)(hidden))

    model = Model()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    parameters = model.init(keys, IDS[0])

    def loss_fn(parameters, example):
        scores = model.apply(parameters, example["ids"], rngs={"dropout": example["key"]})
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, example["ids"])
        return losses.mean()

    batch = {"ids": IDS, "key": jax.random.split(jax.random.key(2), 8)}
    assert_exact(loss_fn, parameters, batch)


@pytest.mark.slow
def test_an_nnx_network_with_convolutions_and_norms():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 6, (3, 3), strides=2, feature_group_count=2, rngs=rngs)
            self.norm = nnx.GroupNorm(6, num_groups=3, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
            self.out = nnx.LoRALinear(6, 3, lora_rank=2, rngs=rngs)

        def __call__(self, image):
            hidden = nnx.silu(self.norm(self.conv(image[None])))
            return self.out(self.attention(hidden.reshape(-1, 6)).mean(axis=0))

    graph, parameters, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(parameters, image):
        return jnp.sum(jnp.sin(nnx.merge(graph, parameters, rest)(image)))

    assert_exact(loss_fn, parameters, draw(0, 8, 6, 6, 2))


@pytest.mark.slow
def test_an_equinox_network_and_an_optax_step():
    keys = jax.random.split(jax.random.key(0), 2)
    model = equinox.nn.Sequential(
        [
            equinox.nn.Conv2d(1, 4, 3, key=keys[0]),
            equinox.nn.Lambda(lambda x: jax.nn.relu(x).reshape(-1)),
            equinox.nn.MLP(64, 3, width_size=8, depth=2, key=keys[1]),
        ]
    )
    parameters, static = equinox.partition(model, equinox.is_inexact_array)

    def loss_fn(parameters, image):
        scores = equinox.combine(parameters, static)(image[None])
        return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.argmax(image[0]) % 3)

    batch = draw(0, 8, 6, 6)
    assert_exact(loss_fn, parameters, batch)

    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(parameters, state, batch):
        (loss, statistics), gradients = cabs_jax.value_and_grad(loss_fn)(parameters, batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, loss, statistics

    state = optimizer.init(parameters)
    losses = []
    for _ in range(5):
        parameters, state, loss, statistics = step(parameters, state, batch)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert statistics.read().variance_trace > 0.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_orbax_stores_a_loader_beside_the_parameters(tmp_path):
    whole = Run(over_arrays, 1)
    expected = whole.train(20)
    first, rest = Run(over_arrays, 1), Run(over_arrays, 1)
    seen = first.train(8)
    state = first.state()
    with ocp.CheckpointManager(tmp_path) as manager:
        parts = {
            "params": ocp.args.StandardSave(state["params"]),
            "loader": ocp.args.JsonSave(state["loader"]),
        }
        manager.save(8, args=ocp.args.Composite(**parts))
        manager.wait_until_finished()
        parts = {
            "params": ocp.args.StandardRestore(rest.params),
            "loader": ocp.args.JsonRestore(),
        }
        restored = manager.restore(8, args=ocp.args.Composite(**parts))
    rest.restore({"params": restored.params, "loader": restored.loader})
    assert seen + rest.train(12) == expected
    same(rest.params, whole.params)


# What optax has unless it is given another.
USUAL = {"b2": 0.999, "eps": 1e-8}
ADAMS = {
    "adam": (optax.adam(0.1, b2=0.9, eps=1e-3), {"b2": 0.9, "eps": 1e-3}, optax.scale_by_adam),
    "adamw": (optax.adamw(0.1, eps_root=1e-6), {"eps_root": 1e-6}, optax.scale_by_adam),
    "nadam": (optax.nadam(0.1), {}, optax.scale_by_adam),
    "amsgrad": (optax.amsgrad(0.1), {}, optax.scale_by_amsgrad),
}


@pytest.mark.parametrize("name", ADAMS)
def test_p_is_what_the_step_of_optax_multiplies_with(name):
    optimizer, options, bare = ADAMS[name]
    found = {"w": jnp.array([1.0, -2.0, 0.5])}
    state = optimizer.init(found)
    for step in range(4):
        gradients = {"w": jnp.array([0.3, -0.2, 4.0]) / (step + 1)}
        weights = cabs_jax.adam_metric(state, **{**USUAL, **options})(gradients)
        is_moments = lambda node: hasattr(node, "nu")  # noqa: E731
        (moments,) = filter(is_moments, jax.tree.leaves(state, is_leaf=is_moments))
        # Without momentum, the step is P times the gradient.
        stepped, _ = bare(b1=0.0, **options).update(gradients, moments)
        np.testing.assert_allclose(stepped["w"], weights["w"] * gradients["w"], rtol=1e-4)
        updates, state = optimizer.update(gradients, state, found)
        found = optax.apply_updates(found, updates)
