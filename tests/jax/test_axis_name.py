"""With ``axis_name``, ``shard_map`` gives what all examples give, against NumPy in float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cabs_jax
from tests.jax.collectives import reduced_in
from tests.jax.test_devices_properties import loss_fn
from tests.jax.test_shard_map import cast
from tests.one_process import CLASSES, FEATURES, gradients

EXAMPLES = 16
_RNG = np.random.default_rng(0)
PARAMETERS = [_RNG.normal(size=shape) for shape in ((FEATURES, 5), (5,), (5, CLASSES))]
INPUTS, LABELS = _RNG.normal(size=(EXAMPLES, 2, FEATURES)), _RNG.integers(CLASSES, size=EXAMPLES)
BATCH = {"x": INPUTS, "y": np.eye(CLASSES)[LABELS]}
LOSSES, _ROWS = gradients(PARAMETERS, INPUTS, LABELS)
ROWS = np.concatenate([one.reshape(EXAMPLES, -1) for one in _ROWS], axis=1)
ALL = np.ones(EXAMPLES, bool)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def sharded(step, is_checked=True, axes=("data",)):
    """Return a step on parameters, batch, and mask, in which four devices have their shares."""
    sizes = (2, 2) if len(axes) > 1 else (4,)
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
    specs = {"in_specs": (P(), P(axes), P(axes)), "out_specs": P()}
    return jax.shard_map(step, mesh=mesh, check_vma=is_checked, **specs)


def measured(parameters, batch, mask, prepare=lambda parameters: parameters, **options):
    options = {"axis_name": "data", **options}
    found = cabs_jax.value_and_grad(loss_fn, **options)(prepare(parameters), batch, mask=mask)
    (loss, statistics), gradient = found
    return loss, statistics, gradient


def assert_of(found, chosen=ALL, rtol=1e-10):
    """Assert that loss, statistics and gradient are those of a loop over the chosen examples."""
    loss, statistics, gradient = found
    read, rows = statistics.read(), ROWS[chosen]
    mean = rows.mean(axis=0)
    assert read.loss == float(loss) == pytest.approx(LOSSES[chosen].mean(), rel=rtol)
    assert (read.examples, read.groups) == (len(rows), len(rows))
    assert read.group_square_sum == pytest.approx((rows**2).sum(), rel=rtol)
    assert read.gradient_norm_squared == pytest.approx((mean**2).sum(), rel=rtol)
    flat = np.concatenate([np.ravel(one) for one in gradient])
    np.testing.assert_allclose(flat, mean, rtol=rtol, atol=rtol)


@cache
def masked(is_checked):
    return jax.jit(sharded(measured, is_checked))


@pytest.mark.parametrize("is_checked", [False, True])
@given(mask=st.lists(st.booleans(), min_size=EXAMPLES, max_size=EXAMPLES).filter(any))
@settings(max_examples=25)
def test_devices_may_have_any_number_of_examples_that_count(is_checked, mask):
    chosen = np.array(mask)
    hidden = {
        name: np.where(chosen.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, np.nan)
        for name, leaf in BATCH.items()
    }
    assert_of(masked(is_checked)(PARAMETERS, hidden, chosen), chosen)


@pytest.mark.parametrize(
    ("is_checked", "prepare", "is_jitted"),
    [(False, list, True), (True, list, True), (True, cast, True), (False, list, False)],
)
def test_nothing_depends_on_what_shard_map_checks_or_knows_of_parameters(
    is_checked, prepare, is_jitted
):
    step = sharded(lambda p, batch, _: measured(p, batch, None, prepare), is_checked)
    assert_of((jax.jit(step) if is_jitted else step)(PARAMETERS, BATCH, ALL))


@pytest.mark.parametrize("is_checked", [False, True])
def test_shares_along_several_axes_are_one_batch(is_checked):
    axes = ("rows", "data")
    step = jax.jit(sharded(partial(measured, axis_name=axes), is_checked, axes))
    chosen = np.arange(EXAMPLES) % 5 != 1
    assert_of(step(PARAMETERS, BATCH, chosen), chosen)


@pytest.mark.parametrize("is_checked", [False, True])
def test_parameters_may_be_sharded_along_an_axis_that_is_left_to_jit(is_checked):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P(), "check_vma": is_checked}
    step = jax.jit(jax.shard_map(measured, mesh=mesh, axis_names={"data"}, **specs))
    cut = NamedSharding(mesh, P(None, "model"))
    parameters = [*PARAMETERS[:2], jax.device_put(PARAMETERS[2], cut)]
    chosen = np.arange(EXAMPLES) % 5 != 1
    assert_of(step(parameters, BATCH, chosen), chosen)


@pytest.mark.parametrize("is_checked", [False, True])
def test_a_device_on_which_nothing_counts_adds_nothing_that_is_undefined(is_checked):
    def logarithm(weight, example):
        return weight * jnp.log(example)

    def step(weight, batch, mask):
        found = cabs_jax.value_and_grad(logarithm, axis_name="data")(weight, batch, mask=mask)
        (loss, statistics), gradient = found
        return loss, statistics.group_square_sum, gradient

    numbers = np.linspace(1.0, 2.0, EXAMPLES)
    step = jax.jit(sharded(step, is_checked))
    found = step(3.0, numbers, np.arange(EXAMPLES) < 6)
    logs = np.log(numbers[:6])
    np.testing.assert_allclose(found, [3 * logs.mean(), (logs**2).sum(), logs.mean()])
    np.testing.assert_array_equal(step(3.0, numbers, ~ALL), 0.0)


def test_parts_of_microbatches_are_those_of_all_devices():
    def step(parameters, batch, mask):
        halves = [
            measured(parameters, jax.tree.map(lambda one, at=at: one[at::2], batch), mask[at::2])
            for at in range(2)
        ]
        counts = [statistics.examples.astype(float) for _, statistics, _ in halves]
        shares = [count / sum(counts) for count in counts]
        loss = sum(share * one for share, (one, *_) in zip(shares, halves, strict=True))
        total = [
            sum(s * g for s, g in zip(shares, both, strict=True))
            for both in zip(*(gradient for *_, gradient in halves), strict=True)
        ]
        part = halves[0][1].partial + halves[1][1].partial
        return loss, part.complete(total, loss=loss), total

    chosen = np.arange(EXAMPLES) % 3 > 0
    assert_of(jax.jit(sharded(step))(PARAMETERS, BATCH, chosen), chosen)


@pytest.mark.parametrize("is_checked", [False, True])
def test_a_metric_is_given_the_mean_gradient_of_all_examples(is_checked):
    def metric(found):
        return jax.tree.map(lambda one: 1.0 / (jnp.abs(one) + 0.1), found)

    chosen = np.arange(EXAMPLES) % 5 != 1
    step = jax.jit(sharded(partial(measured, metric=metric), is_checked))
    read = step(PARAMETERS, BATCH, chosen)[1].read()
    rows, mean = ROWS[chosen], ROWS[chosen].mean(axis=0)
    weight = 1.0 / (abs(mean) + 0.1)
    assert read.group_square_sum == pytest.approx((weight * rows**2).sum(), rel=1e-10)
    assert read.gradient_norm_squared == pytest.approx((weight * mean**2).sum(), rel=1e-10)
    assert read.in_metric


def test_a_sample_of_each_device_is_measured_for_its_own_examples():
    chosen = np.arange(EXAMPLES) != 5
    step = jax.jit(sharded(partial(measured, sample=2)))
    read = step(PARAMETERS, BATCH, chosen)[1].read()
    squares = (ROWS**2).sum(axis=1).reshape(4, 4)
    # Of the first two of the second device one counts, of three.
    taken = 2 * squares[[0, 2, 3], :2].sum() + 3 * squares[1, 0]
    assert (read.examples, read.estimated) == (15, 8)
    assert read.group_square_sum == pytest.approx(taken, rel=1e-10)


def test_gradients_in_half_precision_are_weighed_without_overflow():
    def loss(weight, example):
        return jnp.sum(weight * example)

    def step(weight, batch, mask):
        return cabs_jax.value_and_grad(loss, axis_name="data")(weight, batch, mask=mask)[1]

    mask = np.concatenate([np.arange(300) < count for count in (257, 300, 300, 0)])
    batch = np.repeat([30000.0, 0.0, 0.0, 0.0], 300).astype(np.float16)
    found = jax.jit(sharded(step))(np.ones((), np.float16), batch, mask)
    assert found.dtype == np.float16
    assert float(found) == pytest.approx(30000.0 * 257 / 857, rel=2**-8)


def test_axes_that_are_none_of_examples_are_errors():
    value_and_grad = partial(cabs_jax.value_and_grad, loss_fn)
    with pytest.raises(ValueError, match="spreads the batch over a mesh, name none"):
        value_and_grad(axis_name="data")(PARAMETERS, BATCH)
    with pytest.raises(ValueError, match="got 'model'"):
        sharded(partial(measured, axis_name="model"))(PARAMETERS, BATCH, ALL)

    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    on_both = partial(jax.shard_map, mesh=mesh, out_specs=P())
    step = on_both(
        lambda p, batch: value_and_grad(axis_name=("data", "model"))(p, batch)[1],
        in_specs=(P(), P("data")),
    )
    with pytest.raises(ValueError, match="all devices along 'model' have the same"):
        step(PARAMETERS, BATCH)
    step = on_both(
        lambda p, batch: value_and_grad(axis_name="data")(p, batch)[1],
        in_specs=(P(), P(("data", "model"))),
    )
    with pytest.raises(ValueError, match="examples differ along 'model', too"):
        step(PARAMETERS, BATCH)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("is_checked", [False, True])
def test_no_collective_is_added_to_those_of_a_plain_step(is_checked, is_masked):
    def plain(parameters, batch, _):
        def mean(parameters):
            return jnp.mean(jax.vmap(loss_fn, (None, 0))(parameters, batch))

        own = cast(parameters) if is_checked else parameters
        return jax.lax.pmean(jax.value_and_grad(mean)(own), "data")

    def step(parameters, batch, mask):
        return measured(parameters, batch, mask if is_masked else None)

    with jax.enable_x64(False):
        (before,) = reduced_in(sharded(plain, is_checked), PARAMETERS, BATCH, ALL)["all-reduce"]
        after = reduced_in(sharded(step, is_checked), PARAMETERS, BATCH, ALL)
    # How many examples count, of how many norms are estimated, and the squares.
    assert after == {"all-reduce": [before + 3]}
