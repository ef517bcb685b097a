"""Norms in the metric of an optimizer's step, against loops over the examples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cabs_jax
from cabs import Controller, Progress
from tests.programs import largest


def parameters(seed=0):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(0.3 * random.standard_normal(shape))

    return {
        "table": normal(7, 4),
        "first": normal(4, 5),
        "bias": normal(5),
        "scale": normal(5),
        "tied": normal(5, 5),
        "kernel": normal(3, 5, 6),
        "rows": normal(2, 6),
        "last": normal(6, 3),
    }


def loss_fn(found, example):
    """Return a loss with products, lookups, a kernel, a loop, and a penalty."""
    hidden = jnp.tanh(found["table"][example["ids"]] @ found["first"] + found["bias"])
    hidden = jnp.tanh(hidden * found["scale"] @ found["tied"]) @ found["tied"].T
    hidden, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ found["tied"]), None), hidden, length=2)
    convolved = jax.lax.conv_general_dilated(
        hidden[None], found["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]
    top = jnp.mean(jnp.tanh(convolved), axis=0)
    top = top + found["rows"][example["kind"]]
    scores = top @ found["last"]
    penalty = 0.05 * jnp.sum(found["last"] ** 2)
    return -jax.nn.log_softmax(scores)[example["label"]] + penalty


def batch(examples, seed=1):
    random = np.random.default_rng(seed)
    return {
        "ids": jnp.asarray(random.integers(0, 7, (examples, 8))),
        "kind": jnp.asarray(random.integers(0, 2, examples)),
        "label": jnp.asarray(random.integers(0, 3, examples)),
    }


def expected(found, data, metric, rows):
    """Return the sum of squares and the squared norm, of per-example gradients that are formed."""
    each = jax.vmap(jax.grad(loss_fn), (None, 0))(found, data)
    each = jax.tree.map(lambda one: one[rows], each)
    mean = jax.tree.map(lambda one: one.mean(axis=0), each)
    weights = metric(mean)
    norms = jax.tree.map(lambda p, one: (p * one**2).sum(), weights, each)
    means = jax.tree.map(lambda p, g: (p * g**2).sum(), weights, mean)
    return sum(jax.tree.leaves(norms)), sum(jax.tree.leaves(means))


@pytest.fixture(autouse=True)
def in_double_precision():
    with jax.enable_x64(True):
        yield


class Moments(NamedTuple):
    """What an optimizer of Adam's kind keeps."""

    count: int
    nu: Any


def test_p_has_the_current_gradient_in_the_second_moment():
    state = ("rest", {"moments": Moments(jnp.asarray(4), jnp.array([0.0, 3.0]))})
    gradient = np.array([0.5, -2.0])
    found = cabs_jax.adam_metric(state, b2=0.9, eps=0.1, eps_root=0.2)(jnp.asarray(gradient))
    second = 0.9 * np.array([0.0, 3.0]) + 0.1 * gradient**2
    np.testing.assert_allclose(found, 1.0 / (np.sqrt(second / (1.0 - 0.9**5) + 0.2) + 0.1))


def of_roots(gradients):
    return jax.tree.map(lambda g: 1.0 / (jnp.abs(g) + 0.1), gradients)


def test_norms_are_those_of_a_loop_with_a_mask_too():
    mask = np.array([True, False, True, True, False, True])

    @jax.jit
    def both(found, data):
        measured = cabs_jax.value_and_grad(loss_fn, metric=of_roots)
        (_, whole), _ = measured(found, data)
        (_, masked), _ = measured(found, data, mask=mask)
        rows = (np.arange(6), np.nonzero(mask)[0])
        return (whole, masked), [expected(found, data, of_roots, some) for some in rows]

    statistics, wanted = both(parameters(), batch(6))
    for one, (squares, square) in zip(statistics, wanted, strict=True):
        assert float(one.group_square_sum) == pytest.approx(float(squares), rel=1e-10)
        assert float(one.gradient_norm_squared) == pytest.approx(float(square), rel=1e-10)


def test_a_large_penalty_and_a_sample_count_in_the_metric():
    weight, data = jnp.full((600, 30), 0.01), jnp.asarray(np.random.default_rng(0).random((4, 600)))

    def loss(weight, example):
        return jnp.tanh(example @ weight).sum() + 0.5 * jnp.sum(weight**2)

    @jax.jit
    def both(weight, data):
        each = jax.vmap(jax.grad(loss), (None, 0))(weight, data)
        weights = of_roots(each.mean(axis=0))
        (_, whole), _ = cabs_jax.value_and_grad(loss, metric=of_roots)(weight, data)
        (_, some), _ = cabs_jax.value_and_grad(loss, metric=of_roots, sample=2)(weight, data)
        # What is sampled is what differs from example to example: the penalty is known.
        own, rest = each[:2] - weight, (each - weight).mean(axis=0)
        sampled = 2.0 * (weights * own**2).sum()
        sampled = sampled + 4.0 * (weights * (2 * rest + weight) * weight).sum()
        return (whole, some), ((weights * each**2).sum(), sampled)

    statistics, wanted = both(weight, data)
    for one, squares in zip(statistics, wanted, strict=True):
        assert float(one.group_square_sum) == pytest.approx(float(squares), rel=1e-9)


def test_a_metric_of_one_is_no_metric_and_takes_several_arguments():
    def loss(first, second, example):
        return jnp.tanh(example @ first) @ second

    args = jnp.ones((3, 2)), jnp.ones(2), jnp.asarray(np.random.default_rng(0).random((5, 3)))
    plain = cabs_jax.value_and_grad(loss, (0, 1))
    weighed = cabs_jax.value_and_grad(loss, (0, 1), metric=lambda g: jax.tree.map(jnp.ones_like, g))
    for one, other in zip(*(jax.tree.leaves(f(*args)) for f in (plain, weighed)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_one_product_an_example_is_not_materialized():
    examples, inputs, outputs = 16, 40, 30
    weight, data = jnp.full((inputs, outputs), 0.01), jnp.ones((examples, inputs))
    loss = lambda weight, example: jnp.sum(jnp.tanh(example @ weight))  # noqa: E731

    def elements(step):
        return largest(jax.jit(step).lower(weight, data).compile().as_text())

    assert elements(cabs_jax.value_and_grad(loss, metric=of_roots)) == inputs * outputs
    # Those of all examples are seen where they are formed.
    each = jax.vmap(jax.grad(loss), (None, 0))
    assert elements(lambda weight, data: each(weight, data) + 1.0) == examples * inputs * outputs


def test_half_precision_is_squared_in_single():
    weight = jnp.full((64, 8), 0.01, jnp.bfloat16)
    data = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 64)), jnp.bfloat16)
    loss = lambda weight, example: jnp.sum(jnp.tanh(example @ weight).astype(jnp.float32))  # noqa: E731
    measured = cabs_jax.value_and_grad(loss, metric=lambda g: jnp.full(g.shape, 0.5))
    (_, statistics), _ = measured(weight, data)
    (_, plain), _ = cabs_jax.value_and_grad(loss)(weight, data)
    assert statistics.group_square_sum.dtype == plain.group_square_sum.dtype
    ratio = float(statistics.group_square_sum / plain.group_square_sum)
    assert ratio == pytest.approx(0.5, rel=1e-2)


def test_what_does_not_fit_is_said():
    found, data = {"w": jnp.ones(3)}, jnp.ones((2, 3))
    loss = lambda found, example: found["w"] @ example  # noqa: E731
    with pytest.raises(ValueError, match="metric must return real numbers in the shapes"):
        cabs_jax.value_and_grad(loss, metric=lambda g: jax.tree.map(lambda _: jnp.ones(()), g))(
            found, data
        )
    with pytest.raises(TypeError, match="a pytree like the gradients"):
        cabs_jax.value_and_grad(loss, metric=lambda _: 1.0)(found, data)
    with pytest.raises(ValueError, match="state must hold one state of scale_by_adam"):
        cabs_jax.adam_metric({"count": 1}, b2=0.999, eps=1e-8)


def test_the_rule_for_adam_takes_what_is_measured():
    controller = Controller(16, rule=Progress(overhead=128, adaptive=True))
    weight, data = jnp.ones(3), jnp.asarray(np.random.default_rng(0).random((16, 3)))
    loss = lambda weight, example: jnp.sum((weight @ example - 1.0) ** 2)  # noqa: E731
    metric = cabs_jax.adam_metric(Moments(jnp.asarray(0), jnp.zeros(3)), b2=0.999, eps=1e-8)
    (_, statistics), _ = cabs_jax.value_and_grad(loss, metric=metric)(weight, data)
    decision = controller.update(statistics, learning_rate=0.01)
    assert not decision.held
    (_, plain), _ = jax.jit(cabs_jax.value_and_grad(loss))(weight, data)
    with pytest.raises(ValueError, match="statistics are not in the metric"):
        controller.update(plain, learning_rate=0.01)
