"""Operations where parameters meet the example, in all generality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import cabs_jax
from tests.jax.reference import assert_exact, draw

sizes = st.integers(1, 4)


@given(
    batch=st.lists(sizes, max_size=2),
    contracted=st.lists(sizes, max_size=2),
    mine=st.lists(sizes, max_size=2),
    others=st.lists(sizes, max_size=2),
    order=st.randoms(use_true_random=False),
    is_left=st.booleans(),
)
@settings(max_examples=6)
def test_products_with_any_axes_batched_contracted_or_free_are_exact(
    batch, contracted, mine, others, order, is_left
):
    def placed(free):
        axes = [("b", i, n) for i, n in enumerate(batch)]
        axes += [("c", i, n) for i, n in enumerate(contracted)] + [("f", i, n) for i, n in free]
        order.shuffle(axes)
        places = {(kind, i): at for at, (kind, i, _) in enumerate(axes)}
        return tuple(n for _, _, n in axes), places

    shape, places = placed(list(enumerate(mine)))
    other_shape, other_places = placed(list(enumerate(others)))
    pairs = [
        tuple(tuple(found[kind, i] for i in range(count)) for found in (places, other_places))
        for kind, count in (("c", len(contracted)), ("b", len(batch)))
    ]
    numbers = pairs if is_left else [pair[::-1] for pair in pairs]

    def loss_fn(weight, example):
        operands = (weight, example) if is_left else (example, weight)
        return jnp.sum(jnp.sin(lax.dot_general(*operands, tuple(numbers)) + 0.3))

    with jax.enable_x64(True):
        assert_exact(loss_fn, draw(0, *shape), draw(1, 3, *other_shape))


@st.composite
def convolutions(data):
    rank = data(st.integers(1, 3))
    groups, inward, outward, frames = (data(st.integers(1, 2)) for _ in range(4))

    def each(numbers):
        return tuple(data(numbers) for _ in range(rank))

    size, kernel = each(st.integers(3, 5)), each(st.integers(1, 3))
    return {
        "input": (frames, groups * inward, *size),
        "kernel": (groups * outward, inward, *kernel),
        "window_strides": each(st.integers(1, 2)),
        "padding": tuple(zip(each(st.integers(-1, 2)), each(st.integers(0, 2)), strict=True)),
        "lhs_dilation": each(st.integers(1, 2)),
        "rhs_dilation": each(st.integers(1, 2)),
        "feature_group_count": groups,
        "is_last": data(st.booleans()),
    }


def moved(shape, is_last, *ends):
    """Return a shape whose two first axes come last, and the letters of such a layout."""
    letters = "HWD"[: len(shape) - 2]
    if is_last == "kernel":
        return (*shape[2:], shape[1], shape[0]), letters + ends[1] + ends[0]
    if is_last:
        return (shape[0], *shape[2:], shape[1]), ends[0] + letters + ends[1]
    return shape, ends[0] + ends[1] + letters


@given(st.data())
@settings(max_examples=6)
def test_convolutions_of_any_layout_stride_dilation_padding_and_groups_are_exact(data):
    case = data.draw(convolutions())
    is_last = case.pop("is_last")
    shape, lhs = moved(case.pop("input"), is_last, "N", "C")
    kernel, rhs = moved(case.pop("kernel"), "kernel" if is_last else False, "O", "I")

    def loss_fn(weight, example):
        layout = (lhs, rhs, lhs)
        found = lax.conv_general_dilated(example, weight, dimension_numbers=layout, **case)
        return jnp.sum(jnp.sin(found + 0.3))

    with jax.enable_x64(True):
        weight, batch = draw(0, *kernel), draw(1, 3, *shape)
        assert_exact(loss_fn, weight, batch)


@pytest.mark.parametrize("channels", [4, 200])
def test_wide_kernels_are_taken_a_row_at_a_time_and_are_exact(channels):
    def loss_fn(weight, example):
        found = lax.conv(example[None], weight, (1, 1), "SAME")
        return jnp.sum(jnp.sin(found))

    assert_exact(loss_fn, draw(0, 3, channels, 3, 3), draw(1, 5, channels, 6, 7))


@given(
    shape=st.lists(sizes, min_size=1, max_size=3),
    ids=st.lists(st.integers(-6, 6), min_size=1, max_size=6),
    mode=st.sampled_from(["fill", "clip", "wrap", "promise_in_bounds"]),
    data=st.data(),
)
@settings(max_examples=12)
def test_lookups_along_any_axis_are_exact_also_of_numbers_out_of_range(shape, ids, mode, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    ids = np.asarray(ids)
    if mode == "promise_in_bounds":
        ids = abs(ids) % shape[axis]

    def loss_fn(table, example):
        if mode == "promise_in_bounds":
            rows = table.at[(slice(None),) * axis + (example["ids"],)].get(mode=mode)
        else:
            rows = jnp.take(table, example["ids"], axis=axis, mode=mode, fill_value=0)
        return jnp.sum(jnp.sin(rows * example["scale"]))

    with jax.enable_x64(True):
        batch = {"ids": jnp.stack([ids, ids[::-1], np.roll(ids, 1)]), "scale": draw(1, 3)}
        assert_exact(loss_fn, draw(0, *shape), batch)


@pytest.mark.parametrize("rows", [3, 50])
def test_rows_looked_up_several_times_are_added_before_they_are_squared(rows):
    def loss_fn(table, example):
        return jnp.sum(jnp.sin(table[example]))

    ids = jnp.asarray(np.random.default_rng(0).integers(0, min(rows, 4), (5, 7)))
    assert_exact(loss_fn, draw(0, rows, 3), ids)


def test_products_that_cancel_over_the_positions_are_formed():
    # The cotangents of a softmax over positions sum to zero, and the rows are nearly the same.
    def loss_fn(weight, example):
        return jax.nn.softmax(jnp.sum(example @ weight, axis=1))[0]

    rows = 100.0 + 0.01 * draw(0, 4, 16, 64)
    weight = draw(1, 64, 64) * 1e-4
    found = jax.jit(cabs_jax.value_and_grad(loss_fn))(weight, rows)[0][1]
    double = jax.tree.map(np.asarray, (weight, rows))
    with jax.enable_x64(True):
        weight, rows = (jnp.asarray(array, jnp.float64) for array in double)
        exact = cabs_jax.value_and_grad(loss_fn)(weight, rows)[0][1]
        np.testing.assert_allclose(
            float(found.group_square_sum), float(exact.group_square_sum), rtol=1e-3
        )


def test_selections_by_a_number_of_the_example_are_exact():
    def loss_fn(experts, example):
        expert = lax.dynamic_index_in_dim(experts, example["id"], keepdims=False)
        return jnp.sum(jnp.sin(example["x"] @ expert))

    batch = {"id": jnp.array([0, 2, 2, 1]), "x": draw(1, 4, 3)}
    assert_exact(loss_fn, draw(0, 3, 3, 2), batch)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_other_types_are_exact_up_to_their_rounding(dtype):
    def loss_fn(parameters, example):
        hidden = jnp.tanh(example @ parameters["w"]) * parameters["s"]
        return jnp.sum(jnp.abs(hidden)).astype(jnp.float32)

    parameters = {"w": draw(0, 5, 6).astype(dtype), "s": draw(1, 6).astype(dtype)}
    rtol = 1e-5 if dtype is jnp.complex64 else 3e-2
    assert_exact(loss_fn, parameters, draw(2, 4, 5).astype(dtype), rtol=rtol)
