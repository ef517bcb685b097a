"""Splitting batches: nothing lost, pieces alike, and smaller ones when memory runs out."""

import gc
import math
import types
import warnings
import weakref
from collections import OrderedDict, UserDict, defaultdict
from itertools import chain, pairwise
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import BatchSizes, MemoryCap, split
from cabs.gradients import PartialStatistics


class Pair(NamedTuple):
    x: object
    y: object


seeds = st.integers(0, 2**32 - 1)


@st.composite
def requests(draw):
    """Draw a number of examples and how to split it, so that it can be done."""
    unit, replicas = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    units = replicas * draw(st.integers(1, 40))
    at_once = draw(st.integers(1, 50))
    if at_once > 1:
        # With pieces of one unit the replicas' shares must be equal.
        units += draw(st.integers(0, replicas - 1))
    most = draw(st.none() | st.just(at_once * unit + draw(st.integers(0, unit - 1))))
    options = {"max_microbatch": most, "replicas": replicas, "multiple_of": unit}
    return units * unit, options


def flat(shares):
    return list(chain.from_iterable(shares))


@given(requests())
def test_sizes_add_up_and_differ_by_one_unit_at_most(request):
    examples, options = request
    shares = split(examples, **options)
    assert len(shares) == options["replicas"]
    sizes, unit = flat(shares), options["multiple_of"]
    assert sum(sizes) == examples
    assert min(sizes) >= unit
    assert all(size % unit == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= unit
    totals = [sum(share) for share in shares]
    assert max(totals) - min(totals) <= unit


@given(requests())
def test_replicas_have_equally_many_microbatches_as_few_as_fit(request):
    examples, options = request
    shares, most = split(examples, **options), options["max_microbatch"]
    (each,) = {len(share) for share in shares}
    if most is None:
        assert each == 1
        return
    assert max(flat(shares)) <= most
    # With one less for each, some piece would have to be larger.
    unit, pieces = options["multiple_of"], (each - 1) * options["replicas"]
    assert pieces == 0 or math.ceil(examples // unit / pieces) * unit > most


@given(st.integers(1, 400), st.none() | st.integers(1, 50))
def test_without_replicas_the_pieces_are_those_of_the_only_one(examples, most):
    (only,) = split(examples, max_microbatch=most, replicas=1)
    assert split(examples, max_microbatch=most) == only


@given(requests(), seeds)
def test_no_example_is_lost_or_repeated_or_moved(request, seed):
    examples, options = request
    rows = np.random.default_rng(seed).normal(size=(examples, 2))
    batch = {"x": rows, "rest": [np.arange(examples), (None, rows[:, 0])]}
    pieces = flat(split(batch, **options))
    assert [len(piece["x"]) for piece in pieces] == flat(split(examples, **options))
    for take, whole in [
        (lambda one: one["x"], rows),
        (lambda one: one["rest"][0], np.arange(examples)),
        (lambda one: one["rest"][1][1], rows[:, 0]),
    ]:
        np.testing.assert_array_equal(np.concatenate([take(piece) for piece in pieces]), whole)
    assert all(piece["rest"][1][0] is None for piece in pieces)
    assert all(np.shares_memory(piece["x"], rows) for piece in pieces)


@given(seeds, st.integers(2, 60), st.integers(1, 20))
def test_gradients_and_statistics_of_pieces_are_those_of_the_batch(seed, examples, most):
    rows = np.random.default_rng(seed).normal(1.0, 2.0, (examples, 4))
    parts, total = PartialStatistics(), np.zeros(4)
    for piece in split(rows, max_microbatch=most):
        square_sum = float(np.sum(piece**2))
        parts += PartialStatistics(len(piece), len(piece), square_sum)
        total += len(piece) / examples * piece.mean(axis=0)
    np.testing.assert_allclose(total, rows.mean(axis=0), rtol=1e-12, atol=1e-14)
    statistics = parts.complete(gradient_norm_squared=float(total @ total))
    trace = rows.var(axis=0, ddof=1).sum()
    assert statistics.variance_trace == pytest.approx(trace, rel=1e-9)
    assert (statistics.examples, statistics.groups) == (examples, examples)


def test_containers_keep_their_kinds():
    class Tokens(UserDict):
        pass

    x = np.arange(5)
    ordered = OrderedDict(x=x)
    batch = (ordered, Pair(x, None), [x], defaultdict(list, x=x), Tokens(x=x), {"x": {}})
    first, second = split(batch, max_microbatch=3)
    for piece in (first, second):
        assert [type(one) for one in piece] == [type(one) for one in batch]
    assert first[1].x.tolist() == [0, 1]
    assert second[4]["x"].tolist() == [2, 3, 4]
    assert ordered["x"] is x
    frozen = types.MappingProxyType({"x": x})
    assert type(split(frozen)[0]) is types.MappingProxyType


def test_a_batch_that_fits_is_not_even_sliced():
    x = np.arange(5)
    (piece,) = split([x], max_microbatch=5)
    assert piece[0] is x


def test_an_object_that_is_both_array_and_mapping_is_sliced_as_it_wants():
    class Table(dict):
        shape = (4,)

        def __getitem__(self, key):
            return key

    assert split(Table(), max_microbatch=2) == [slice(0, 2), slice(2, 4)]


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (0, {}, "batch must be at least 1, got batch = 0"),
        (10, {"multiple_of": 4}, r"10 examples is no multiple of multiple_of = 4; draw sizes from"),
        (8, {"multiple_of": 4, "replicas": 3}, "each of 3 replicas; give it at least 12 examples"),
        (2, {"replicas": 3}, "less than one unit, 1 examples, for each of 3 replicas"),
        (8, {"multiple_of": 4, "max_microbatch": 3}, "max_microbatch = 3, multiple_of = 4; lower"),
        (8, {"max_microbatch": 0}, "max_microbatch must be at least 1"),
        (8, {"replicas": 0}, "replicas must be at least 1"),
        (8, {"multiple_of": 0}, "multiple_of must be at least 1"),
        (5, {"replicas": 2, "max_microbatch": 1}, "a multiple of 2, or raise .* = 1 to 2$"),
        (
            20,
            {"replicas": 2, "max_microbatch": 5, "multiple_of": 4},
            "microbatches of 4 examples each in a batch of 20; make .* of 8, or raise .* = 5 to 8$",
        ),
        (np.float64(3.0), {}, r"batch must have the examples along a first axis .* got shape \(\)"),
        (np.array(3), {}, r"batch must have the examples along a first axis .* got shape \(\)"),
        (
            {"x": np.zeros((4, 2)), "y": [np.zeros(3), np.zeros(4)]},
            {},
            r"got 4 in batch\['x'\], 3 in batch\['y'\]\[0\]; leave out",
        ),
        (
            {"x": np.zeros(3), "scale": np.zeros(())},
            {},
            r"batch\['scale'\] must have .* shape \(\)",
        ),
        ({"x": None}, {}, "at least one array, got {'x': None}"),
        ([], {}, r"at least one array, got \[\]"),
        (np.zeros((0, 3)), {}, "a batch of 0 examples has less than one unit"),
    ],
)
def test_what_cannot_be_split_is_refused_with_a_way_out(batch, options, message):
    with pytest.raises(ValueError, match=message):
        split(batch, **options)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (True, {}, "batch must be an integer, got batch = True"),
        (2.5, {}, "batch must be an array, or a nest of .* got float"),
        ("text", {}, "got str; make an array of it"),
        ({"x": np.zeros(2), "t": ["a", "b"]}, {}, r"batch\['t'\]\[0\] must be an array.* got str"),
        ({"x": np.zeros(2), "n": 2}, {}, r"batch\['n'\] must be an array.* got int"),
        ({1, 2}, {}, "got set"),
        (4, {"max_microbatch": 2.0}, "max_microbatch must be an integer"),
        (4, {"replicas": True}, "replicas must be an integer"),
        (4, {"multiple_of": "2"}, "multiple_of must be an integer"),
    ],
)
def test_what_is_of_the_wrong_kind_is_refused(batch, options, message):
    with pytest.raises(TypeError, match=message):
        split(batch, **options)


@given(st.integers(1, 60), st.integers(2, 7), st.integers(2, 40))
def test_sizes_that_are_multiples_always_split(low, replicas, most):
    for examples in BatchSizes.range(low, low + 2 * replicas, multiple_of=replicas):
        assert len(split(examples, replicas=replicas, max_microbatch=most)) == replicas
        assert len(split(examples, replicas=replicas, max_microbatch=1)) == replicas


class FullError(Exception):
    """Stands for memory that ran out."""


def step_for(limit, tried=None):
    """Return a step that holds so many examples at once, and notes the sizes it was given."""

    def step(pieces):
        sizes = [piece if isinstance(piece, int) else len(piece) for piece in pieces]
        if tried is not None:
            tried.append(sizes)
        if max(sizes) > limit:
            raise FullError(f"{max(sizes)} examples")
        return sizes

    return step


@given(
    st.integers(1, 300), st.integers(1, 400), st.integers(1, 300), st.integers(1, 5), st.booleans()
)
def test_pieces_shrink_until_they_fit_and_by_half_at_least(units, start, limit, unit, is_count):
    cap, tried, examples = MemoryCap(start + unit), [], units * unit
    batch = examples if is_count else np.arange(examples)
    limit = max(limit, unit)
    # Garbage is collected after each failure, which takes longer than all the rest.
    with warnings.catch_warnings(record=True) as said, patch("gc.collect"):
        warnings.simplefilter("always")
        sizes = cap.run(step_for(limit, tried), batch, out_of_memory=FullError, multiple_of=unit)
    assert sum(sizes) == examples
    assert max(sizes) <= limit
    assert len(said) == len(tried) - 1
    for before, after in pairwise(tried):
        assert max(after) <= max(before) / 2
        assert max(after) <= max(max(before) // unit // 2, 1) * unit
    assert cap.examples == (max(max(tried[-2]) // unit // 2, 1) * unit if said else start + unit)
    # The cap stays, so that the next batch does not fail again.
    assert cap.run(step_for(limit), batch, out_of_memory=FullError, multiple_of=unit) == sizes


def test_the_warning_says_from_what_to_what_and_points_at_the_caller():
    cap = MemoryCap(64)
    message = "a microbatch of 20 examples; the cap is lowered from 64 to 10 examples"
    with pytest.warns(RuntimeWarning, match=message) as said:
        assert cap.run(step_for(10), 20, out_of_memory=FullError) == [10, 10]
    assert said[0].filename == __file__
    assert repr(cap) == "MemoryCap(10)"


@pytest.mark.parametrize(
    "out_of_memory",
    [FullError, (MemoryError, FullError), Exception, lambda error: "examples" in str(error)],
)
def test_running_out_of_memory_is_a_type_or_several_or_a_predicate(out_of_memory):
    with pytest.warns(RuntimeWarning):
        assert MemoryCap(4).run(step_for(2), 4, out_of_memory=out_of_memory) == [2, 2]


def never(_):
    return False


@pytest.mark.parametrize("out_of_memory", [MemoryError, (), never, "text", int, None])
def test_what_is_not_meant_passes_through_and_leaves_the_cap(out_of_memory):
    cap, tried = MemoryCap(4), []
    is_valid = out_of_memory in (MemoryError, never)
    with pytest.raises(FullError if is_valid else TypeError) as caught:
        cap.run(step_for(2, tried), 4, out_of_memory=out_of_memory)
    assert cap.examples == 4
    assert tried == ([[4]] if is_valid else [])
    if is_valid:
        assert not hasattr(caught.value, "__notes__")
    else:
        assert "must be a type of exceptions, a tuple of them, or a function" in str(caught.value)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_is_no_lack_of_memory(interruption):
    def step(_):
        raise interruption

    cap = MemoryCap(4)
    with pytest.raises(interruption):
        cap.run(step, 4, out_of_memory=lambda _: True)
    assert cap.examples == 4


@pytest.mark.parametrize("unit", [1, 3])
def test_with_one_unit_left_the_error_is_raised_on(unit):
    cap, tried = MemoryCap(12), []
    with pytest.warns(RuntimeWarning), pytest.raises(FullError) as caught:
        cap.run(step_for(0, tried), 12, out_of_memory=FullError, multiple_of=unit)
    assert tried[-1] == [unit] * (12 // unit)
    assert caught.value.__notes__ == [
        f"cabs.MemoryCap: microbatches of {unit} examples are not made smaller"
    ]
    assert cap.examples == 12


class Tensor:
    """Stands for something large."""


@pytest.mark.parametrize("is_in_a_cycle", [False, True])
def test_what_a_failed_step_holds_is_freed_before_memory_is_released(is_in_a_cycle):
    held, freed, calls = [], [], []

    def forward(pieces):
        activations = Tensor()
        held.append(weakref.ref(activations))
        if is_in_a_cycle:
            activations.itself = activations
        if len(pieces) == 1:
            raise FullError
        return len(pieces)

    def step(pieces):
        calls.append("step")
        assert all(one() is None for one in held)
        try:
            return forward(pieces)
        except FullError as error:
            raise FullError("again") from error

    def release():
        calls.append("release")
        freed.append(held[-1]() is None)

    # Nothing but the loop itself frees it.
    gc.disable()
    try:
        with pytest.warns(RuntimeWarning):
            assert MemoryCap(4).run(step, 4, out_of_memory=FullError, release=release) == 2
    finally:
        gc.enable()
    assert freed == [True]
    assert calls == ["step", "release", "step"]


def test_pieces_of_a_failed_step_are_freed_too():
    class Copied:
        shape = (4,)

        def __init__(self):
            self.made = []

        def __getitem__(self, part):
            assert part.stop - part.start < 4
            copied = np.zeros(part.stop - part.start)
            self.made.append(weakref.ref(copied))
            return copied

    batch = Copied()

    def release():
        assert len(batch.made) == 2
        assert all(one() is None for one in batch.made)

    with pytest.warns(RuntimeWarning):
        sizes = MemoryCap(2).run(step_for(1), batch, out_of_memory=FullError, release=release)
    assert sizes == [1, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:out of memory:RuntimeWarning")
def test_with_a_minimum_of_three_no_microbatch_has_a_single_example():
    tried = []

    def step(pieces):
        tried.append(pieces)
        raise MemoryError

    for examples in range(3, 16):
        tried.clear()
        cap = MemoryCap(40, minimum=3)
        with pytest.raises(MemoryError):
            cap.run(step, examples, out_of_memory=MemoryError)
        assert min(map(min, tried)) >= 2
        assert cap.examples >= 3
        assert max(tried[-1]) <= 3


def test_a_warning_that_is_an_error_leaves_the_cap_lowered():
    cap = MemoryCap(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            cap.run(step_for(4), 8, out_of_memory=FullError)
    assert cap.examples == 4


@pytest.mark.parametrize(("examples", "error"), [(0, ValueError), (2.0, TypeError)])
def test_a_cap_is_a_positive_integer(examples, error):
    with pytest.raises(error, match="examples must be"):
        MemoryCap(examples)


def test_a_batch_that_cannot_be_split_reaches_no_step():
    tried = []
    for batch, options in [(10, {"multiple_of": 4}), (8, {"multiple_of": 8}), ("x", {})]:
        with pytest.raises((TypeError, ValueError)):
            MemoryCap(4).run(step_for(9, tried), batch, out_of_memory=FullError, **options)
    assert tried == []
