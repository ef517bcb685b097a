"""Options of the call, and what is said when it cannot be done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cabs
import cabs_jax
from cabs.gradients import outer_products
from tests.jax.reference import assert_same, draw, gradients_one_by_one, mean_loss

PARAMETERS = {"m": draw(0, 4, 3), "v": draw(1, 3)}
BATCH = draw(2, 8, 5, 4)


def loss_fn(parameters, rows):
    return jnp.sum(jnp.tanh(rows @ parameters["m"] + parameters["v"]))


def plain(parameters, batch):
    return jax.value_and_grad(mean_loss(loss_fn))(parameters, batch)


@pytest.mark.parametrize("sample", [None, 4])
def test_a_padded_batch_has_the_statistics_of_the_smaller_one(sample):
    batch = np.asarray(BATCH)[:6]
    padded, mask = cabs_jax.pad(batch, 8)
    (loss, statistics), gradients = jax.jit(cabs_jax.value_and_grad(loss_fn, sample=sample))(
        PARAMETERS, padded, mask=mask
    )
    (expected, whole), expected_gradients = cabs_jax.value_and_grad(loss_fn, sample=sample)(
        PARAMETERS, batch
    )
    assert int(statistics.examples) == int(statistics.groups) == 6
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        gradients,
        expected_gradients,
    )
    for name in (
        "group_square_sum",
        "gradient_norm_squared",
        "variance_trace",
        "gradient_norm_squared",
    ):
        np.testing.assert_allclose(getattr(statistics, name), getattr(whole, name), rtol=1e-5)


def test_a_sample_of_a_padded_batch_counts_the_examples_that_are_in_it():
    rows = gradients_one_by_one(loss_fn, PARAMETERS, BATCH[:3])
    padded, mask = cabs_jax.pad(np.asarray(BATCH)[:3], 8)
    measured = cabs_jax.value_and_grad(loss_fn, sample=5)
    (_, statistics), _ = measured(PARAMETERS, padded, mask=mask)
    assert float(statistics.group_square_sum) == pytest.approx((rows**2).sum(), rel=1e-5)


def test_what_the_loss_also_gives_is_stacked():
    def with_aux(parameters, rows):
        return loss_fn(parameters, rows), {"sum": rows.sum(), "shape": rows}

    (loss, statistics, aux), _ = cabs_jax.value_and_grad(with_aux, has_aux=True)(PARAMETERS, BATCH)
    assert_same(aux, {"sum": BATCH.sum(axis=(1, 2)), "shape": BATCH}, ulps=8)
    assert float(loss) == pytest.approx(float(plain(PARAMETERS, BATCH)[0]))
    assert isinstance(statistics.read(), cabs.GradientStatistics)


def test_several_arguments_are_differentiated_and_others_shared():
    def split(scale, matrix, rows, vector, shift):
        return scale * loss_fn({"m": matrix, "v": vector}, rows.T) + shift

    measured = cabs_jax.value_and_grad(split, argnums=(1, -2), in_axes=(None, None, 2, None, None))
    moved = jnp.moveaxis(BATCH, 0, 2).swapaxes(0, 1)
    found = measured(2.0, PARAMETERS["m"], moved, PARAMETERS["v"], None or jnp.zeros(()))
    (loss, statistics), (matrix, vector) = found
    expected, gradients = plain(PARAMETERS, BATCH)
    np.testing.assert_allclose(loss, 2.0 * expected, rtol=1e-6)
    np.testing.assert_allclose(matrix, 2.0 * gradients["m"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vector, 2.0 * gradients["v"], rtol=1e-5, atol=1e-6)
    rows = 2.0 * gradients_one_by_one(loss_fn, PARAMETERS, BATCH)
    assert float(statistics.group_square_sum) == pytest.approx((rows**2).sum(), rel=1e-5)


def test_pytrees_with_nothing_in_places_are_read():
    parameters = {**PARAMETERS, "none": None}
    (_, statistics), gradients = cabs_jax.value_and_grad(loss_fn)(parameters, BATCH)
    assert gradients["none"] is None
    assert float(statistics.variance_trace) > 0.0


@pytest.mark.parametrize("size", [10, 5000])
def test_penalties_on_the_parameters_are_exact(size):
    def penalized(parameters, x):
        weight, matrix = parameters["w"], parameters["m"]
        loss = jnp.tanh(x @ weight) + 0.01 * jnp.sum(weight**2)
        return loss - 0.1 * jnp.sum(jnp.abs(weight)) + jnp.sum(matrix)

    parameters = {"w": draw(0, size) * 0.1, "m": draw(1, 2, 2)}
    batch = draw(2, 8, size)
    rows = gradients_one_by_one(penalized, parameters, batch)
    (_, statistics), _ = jax.jit(cabs_jax.value_and_grad(penalized))(parameters, batch)
    assert float(statistics.group_square_sum) == pytest.approx((rows**2).sum(), rel=1e-4)
    trace = rows.var(axis=0, ddof=1).sum()
    assert float(statistics.variance_trace) == pytest.approx(trace, rel=1e-2)


def test_a_penalty_that_cancels_the_gradients_gives_no_number():
    def loss(weight, x):
        return 0.5 * jnp.sum(weight**2) - weight @ x

    batch = 1000.0 + 0.01 * draw(0, 4, 5000)
    (_, statistics), _ = cabs_jax.value_and_grad(loss)(jnp.full(5000, 1000.0), batch)
    assert np.isnan(statistics.variance_trace)


def test_verify_shows_what_was_compared():
    found = cabs_jax.verify(loss_fn, PARAMETERS, BATCH)
    assert found.error < 1e-5
    assert [(row.name, row.rule) for row in found.rows] == [
        ("argument 0['m']", "matrix"),
        ("argument 0['v']", "formed at add"),
    ]
    assert "argument 0['m']" in str(found)


def test_verify_finds_a_wrong_rule(monkeypatch):
    squares = outer_products.squares
    monkeypatch.setattr(outer_products, "squares", lambda *given: 2.0 * squares(*given))
    assert cabs_jax.verify(loss_fn, PARAMETERS, BATCH).error == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _call(batch=BATCH[:0]), "at least one example"),
        (lambda: _call(batch={"a": BATCH, "b": BATCH[:3]}), r"8 in .*\['a'\], 3 in .*\['b'\]"),
        (lambda: _call(batch=jnp.zeros(())), "hold the examples along axis 0, got shape"),
        (lambda: _call(batch=jax.random.key(0)), r"jax.random.split\(key, m\)"),
        (
            lambda: _call(parameters={"m": "text"}),
            r"argument 0\['m'\] must be an array, got 'text'",
        ),
        (lambda: _call(parameters={"m": jnp.arange(3)}), r"argument 0\['m'\].*int32"),
        (lambda: _call(parameters={}), "must select arguments that hold arrays"),
        (lambda: _call(loss=lambda _, x: x), r"shape \(\), got"),
        (lambda: _call(loss=lambda _, x: jnp.sum(x), has_aux=True), r"a pair \(loss, aux\)"),
        (lambda: _call(in_axes=(0, 0)), "must be None for argument 0"),
        (lambda: _call(in_axes=(None,)), "an entry for each argument"),
        (lambda: _call(mask=jnp.ones(8)), r"booleans of shape \(8,\), got float32"),
        (lambda: cabs_jax.pad(np.zeros((9, 2)), cabs.BatchSizes.range(4, 8)), "9 examples cannot"),
        (lambda: cabs_jax.pad({"a": np.zeros(3), "b": np.zeros(4)}, 8), "as many examples"),
        (lambda: cabs_jax.PartialStatistics.of_group(2, {}), "must hold arrays"),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def _call(parameters=PARAMETERS, batch=BATCH, loss=loss_fn, mask=None, **options):
    return cabs_jax.value_and_grad(loss, **options)(parameters, batch, mask=mask)


def test_normalization_over_the_batch_is_an_error_that_points_to_groups():
    def normalized(parameters, rows):
        hidden = rows @ parameters["m"]
        return jnp.sum(hidden - jax.lax.pmean(hidden, "batch"))

    with pytest.raises(ValueError, match=r"batch normalization does.*PartialStatistics"):
        cabs_jax.value_and_grad(normalized)(PARAMETERS, BATCH)
