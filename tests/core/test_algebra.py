"""The arithmetic of per-example gradients, against loops over the examples."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs.gradients import convolution, lookups, outer_products, shared_weights
from cabs.gradients.arrays import NumpyArrays
from cabs.gradients.convolution import Geometry
from cabs.gradients.terms import Lookup, Materialized, Product
from cabs.gradients.uses import Pulled, as_one, coordinate_squares, total_squares

SIZE = st.integers(1, 5)
SEED = st.integers(0, 2**31)
CHUNK = st.sampled_from([1, 50, 2**18])


def table(chunk=2**18, pair_cost=1.0, symmetric=8):
    arrays = NumpyArrays()
    arrays.chunk, arrays.pair_cost, arrays.symmetric = chunk, pair_cost, symmetric
    return arrays


def product_loop(left, right):
    """Return gradients, shape (n, E, k, h), position by position."""
    n, blocks, length, width = left.shape
    found = np.zeros((n, blocks, width, right.shape[3]))
    for i in range(n):
        for e in range(blocks):
            for t in range(length):
                found[i, e] += np.outer(left[i, e, t], right[i, e, t])
    return found


def lookup_loop(ids, rows, length):
    found = np.zeros((len(ids), length, rows.shape[2]))
    for i, taken in enumerate(ids):
        for t, number in enumerate(taken):
            found[i, number] += rows[i, t]
    return found


def norms_squared(gradients):
    return (gradients.reshape(len(gradients), -1) ** 2).sum(axis=1)


@given(
    *(SEED, SIZE, SIZE, st.integers(1, 12), SIZE, SIZE),
    *(CHUNK, st.sampled_from([0.0, 1.0, 1e9]), st.sampled_from([None, 2, 8])),
)
def test_a_matrix_met_at_several_positions(seed, n, e, t, k, h, chunk, pair_cost, symmetric):
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(n, e, t, k)), random.normal(size=(n, e, t, h))
    arrays, expected = table(chunk, pair_cost, symmetric), product_loop(left, right)
    np.testing.assert_allclose(outer_products.gradient(arrays, left, right), expected, atol=1e-12)
    found = outer_products.squares(arrays, left, right)
    np.testing.assert_allclose(found, norms_squared(expected), rtol=1e-9)


@given(SEED, SIZE, st.integers(1, 6), SIZE, SIZE, CHUNK, st.booleans())
def test_gradients_that_are_squared_and_summed_at_once(seed, n, t, k, h, chunk, is_transposed):
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(n, 1, t, k)), random.normal(size=(n, 1, t, h))
    term, expected = Product.of_matrix(left, right, (k, h)), product_loop(left, right)[:, 0]
    if is_transposed:
        term, expected = term.placed((h, k), (1, 0)), expected.swapaxes(1, 2)
    for one in (term, Materialized(expected, expected.shape[1:])):
        arrays = table(chunk)
        squares, total = one.formed(arrays).squares_and_sum(arrays)
        np.testing.assert_allclose(squares, norms_squared(expected), rtol=1e-9)
        np.testing.assert_allclose(total[0], expected.sum(axis=0), atol=1e-12)
        squares, total = one.formed(arrays).coordinate_squares_and_sum(arrays)
        np.testing.assert_allclose(squares[0], (expected**2).sum(axis=0), rtol=1e-9)
        np.testing.assert_allclose(total[0], expected.sum(axis=0), atol=1e-12)


@given(
    *(SEED, SIZE, SIZE, st.integers(1, 4), SIZE, SIZE),
    *(st.sampled_from([1, 3, 200]), CHUNK, st.permutations(range(3))),
)
def test_elementwise_squares_summed_over_the_examples(seed, n, e, t, k, h, length, chunk, order):
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(n, e, t, k)), random.normal(size=(n, e, t, h))
    ids, rows = random.integers(0, length, (n, t)), random.normal(size=(n, t, h))
    formed, looked_up = product_loop(left, right), lookup_loop(ids, rows, length)
    inverse = np.argsort(order)
    shape = tuple(np.array((e, k, h))[inverse])
    placed = Product.of_matrix(left, right, (e, k, h)).placed(shape, order)
    cases = [
        (Materialized(formed, (e, k, h)), formed),
        (Product.of_matrix(left, right, (e, k, h)), formed),
        (placed, formed.transpose(0, *(1 + inverse))),
        (Lookup(ids, rows, (length, h)), looked_up),
    ]
    for term, gradients in cases:
        found = term.coordinate_squares(table(chunk))
        expected = (gradients**2).sum(axis=0, keepdims=True)
        assert found.shape == (1, *term.shape)
        # Uses that are taken together are added before.
        twice = as_one(table(chunk), [term, term])
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        if isinstance(term, Materialized):
            assert twice is None
        else:
            found = twice.coordinate_squares(table(chunk))
            np.testing.assert_allclose(found, 4.0 * expected, rtol=1e-9, atol=1e-12)
    table_use = Product.of_matrix(rows[:, None], rows[:, None], (h, h))
    assert as_one(table(), [table_use, Lookup(ids, rows, (h, h))]) is None


def test_what_is_spared_is_the_cheaper_way_less_what_reading_costs():
    arrays = table(pair_cost=1.0)
    added = outer_products.ADDED
    assert outer_products.spared(arrays, 1, 100, 100) == 0
    # Long sequences are materialized anyway, and their products are spared.
    assert outer_products.spared(arrays, 500, 100, 100) == (500 - added) * 100 * 100
    # Of shorter ones the pairs are, unless they are fewer than what is then read.
    assert outer_products.spared(arrays, 40, 100, 100) == 40**2 * 200 - added * 100 * 100
    assert outer_products.spared(arrays, 4, 100, 100) == 0


@pytest.mark.parametrize("symmetric", [None, 2])
def test_terms_that_cancel_are_materialized(symmetric):
    random = np.random.default_rng(0)
    left, right = random.normal(size=(3, 1, 6, 20)), random.normal(size=(3, 1, 6, 30))
    left[:, :, 3:], right[:, :, 3:] = left[:, :, :3], -right[:, :, :3] * (1 + 1e-9)
    expected = norms_squared(product_loop(left, right))
    found = outer_products.squares(table(symmetric=symmetric), left, right)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(SEED, SIZE, st.integers(1, 9), st.sampled_from([1, 3, 200]), SIZE, CHUNK)
def test_rows_of_a_table_that_are_taken_more_than_once(seed, n, t, length, h, chunk):
    random = np.random.default_rng(seed)
    ids, rows = random.integers(0, length, (n, t)), random.normal(size=(n, t, h))
    arrays, expected = table(chunk), lookup_loop(ids, rows, length)
    np.testing.assert_allclose(lookups.gradient(arrays, ids, rows, length), expected)
    found = lookups.squares(arrays, ids, rows, length)
    np.testing.assert_allclose(found, norms_squared(expected), rtol=1e-9)


@given(
    *(SEED, SIZE, st.integers(0, 3), st.integers(0, 3)),
    *(st.integers(1, 4), st.sampled_from([2, 5, 60]), SIZE, CHUNK),
)
def test_uses_of_a_parameter_are_added_before_they_are_squared(
    seed, n, products, taken, t, length, h, chunk
):
    random = np.random.default_rng(seed)
    lengths = [int(random.integers(1, t + 1)) for _ in range(products + taken)]
    pairs = [
        (random.normal(size=(n, 1, one, length)), random.normal(size=(n, 1, one, h)))
        for one in lengths[:products]
    ]
    rows = [
        (random.integers(0, length, (n, one)), random.normal(size=(n, one, h)))
        for one in lengths[products:]
    ]
    if not pairs and not rows:
        return
    expected = sum(product_loop(*one)[:, 0] for one in pairs)
    expected = expected + sum(lookup_loop(*one, length) for one in rows)
    found = shared_weights.squares(table(chunk), pairs, rows, length)
    np.testing.assert_allclose(found, norms_squared(expected), rtol=1e-8, atol=1e-12)


def test_uses_that_cancel_are_materialized():
    random = np.random.default_rng(0)
    ids, rows = np.array([[3], [40]]), random.normal(size=(2, 1, 4))
    left = np.zeros((2, 1, 1, 100))
    left[[0, 1], 0, 0, ids[:, 0]] = 1.0
    pair = (left, -rows[:, None] * (1 + 1e-9))
    expected = norms_squared(product_loop(*pair)[:, 0] + lookup_loop(ids, rows, 100))
    found = shared_weights.squares(table(), [pair], [(ids, rows)], 100)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@st.composite
def used(draw):
    """Return uses of a parameter, each with its gradients, and what lies between."""
    random = np.random.default_rng(draw(SEED))
    n, k, h, parts = draw(SIZE), draw(SIZE), draw(SIZE), draw(st.integers(1, 3))
    shape = (parts * k, h)

    def part_of(number):
        def pull(gradients):
            whole = np.zeros((len(gradients), *shape))
            whole[:, number * k : (number + 1) * k] = gradients
            return whole

        return pull

    found = []
    for _ in range(draw(st.integers(1, 4))):
        kind, number = draw(st.sampled_from(KINDS)), draw(st.integers(0, parts - 1))
        rows = k if "part" in kind else parts * k
        t = draw(st.integers(1, 3))
        left, right = random.normal(size=(n, 1, t, rows)), random.normal(size=(n, 1, t, h))
        ids, taken = random.integers(0, rows, (n, t)), random.normal(size=(n, t, h))
        if "lookup" in kind:
            term, expected = Lookup(ids, taken, (rows, h)), lookup_loop(ids, taken, rows)
        else:
            expected = product_loop(left, right)[:, 0]
            term = Product.of_matrix(left, right, (rows, h))
        if "part" in kind:
            pull, key = part_of(number), ("cut", number)
            # One that does not say which part it is overlaps with others, as far as is known.
            key = key if draw(st.booleans()) else None
            term, expected = Pulled(term, pull, shape, True, key, key), pull(expected)
        elif kind == "transposed":
            back = Product(left, right, (h, rows), (), (1,), (0,))
            term = Pulled(back, turned, shape, True, "turned")
        elif kind == "scaled":
            factors = random.normal(size=shape)
            term, expected = Pulled(term, factors.__mul__, shape), factors * expected
        found.append((term, expected))
    return found


KINDS = ("matrix", "lookup", "part", "lookup of a part", "transposed", "scaled")


def turned(gradients):
    return gradients.swapaxes(1, 2)


@given(used(), CHUNK)
def test_whatever_lies_between_a_parameter_and_its_uses(uses, chunk):
    terms, expected = [term for term, _ in uses], sum(one for _, one in uses)
    found = total_squares(table(chunk), terms)
    np.testing.assert_allclose(found, norms_squared(expected), rtol=1e-8, atol=1e-12)
    found = coordinate_squares(table(chunk), terms)[0]
    np.testing.assert_allclose(found, (expected**2).sum(axis=0), rtol=1e-8, atol=1e-12)


def test_parts_that_do_not_overlap_are_squared_by_themselves():
    random = np.random.default_rng(0)

    class Small(NumpyArrays):
        def squares(self, array):
            assert array.shape[1:] == (2, 3)
            return super().squares(array)

    def of_part(number):
        term = Materialized(random.normal(size=(4, 2, 3)), (2, 3))
        return Pulled(term, pytest.fail, (6, 3), True, number, ("split", number))

    terms = [of_part(0), of_part(2)]
    expected = sum(norms_squared(one.term.gradients) for one in terms)
    np.testing.assert_allclose(total_squares(Small(), terms), expected)


def convolution_loop(inputs, cotangents, geometry):
    """Return gradients of a kernel, shape (n, groups, *kernel, in / groups, out / groups)."""
    n, frames, *_, inward = inputs.shape
    *positions, outward = cotangents.shape[2:]
    kernel, groups = geometry.kernel, geometry.groups
    padded = NumpyArrays().pad(inputs, 2, geometry.padding)
    found = np.zeros((n, groups, *kernel, inward // groups, outward // groups))
    for i, frame, group in itertools.product(range(n), range(frames), range(groups)):
        ins = slice(group * (inward // groups), (group + 1) * (inward // groups))
        outs = slice(group * (outward // groups), (group + 1) * (outward // groups))
        for place in np.ndindex(*positions):
            for element in np.ndindex(*kernel):
                moved = zip(place, element, geometry.stride, geometry.dilation, strict=True)
                at = tuple(p * s + e * d for p, e, s, d in moved)
                seen, met = padded[(i, frame, *at)][ins], cotangents[(i, frame, *place)][outs]
                found[(i, group, *element)] += np.outer(seen, met)
    return found


@given(st.data(), SEED, st.integers(1, 2), st.sampled_from([1, 32, 512]))
def test_the_kernel_of_a_convolution(data, seed, rank, patch_width):
    def each(least, most):
        return data.draw(st.lists(st.integers(least, most), min_size=rank, max_size=rank))

    kernel, stride, dilation, positions = each(1, 3), each(1, 2), each(1, 2), each(1, 3)
    sides = [*zip(each(0, 1), each(0, 1), each(0, 1), strict=True)]
    groups, inward, outward, n, frames, chunk = data.draw(
        st.tuples(*(st.integers(1, 2) for _ in range(5)), CHUNK)
    )
    geometry = Geometry(kernel, stride, dilation, sides, groups)
    padded = [
        (p - 1) * s + (k - 1) * d + 1
        for p, s, k, d in zip(positions, stride, kernel, dilation, strict=True)
    ]
    # As many elements as those positions need at least.
    spatial = [
        max(1, -(-(size - low - high - 1) // (between + 1)) + 1)
        for size, (low, high, between) in zip(padded, sides, strict=True)
    ]
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(n, frames, *spatial, groups * inward))
    cotangents = random.normal(size=(n, frames, *positions, groups * outward))
    arrays = table(chunk)
    arrays.patch_width = patch_width
    expected = convolution_loop(inputs, cotangents, geometry)
    found = convolution.squares(arrays, inputs, cotangents, geometry)
    np.testing.assert_allclose(found, norms_squared(expected), rtol=1e-9)
    if frames == 1:
        found = convolution.squares(arrays, inputs[:, 0], cotangents[:, 0], geometry)
        np.testing.assert_allclose(found, norms_squared(expected), rtol=1e-9)
    parts = convolution.parts(arrays, inputs, cotangents, geometry)
    made = np.stack([np.swapaxes(part, 2, 3) for part in parts], axis=1)
    at_once = geometry.laid_out(arrays, groups * inward)
    split = rank - at_once
    made = made.reshape(n, *kernel[:split], groups, *kernel[split:], inward, outward)
    np.testing.assert_allclose(np.moveaxis(made, 1 + split, 1), expected, atol=1e-12)
