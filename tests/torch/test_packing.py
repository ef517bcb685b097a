"""Examples on their way from a worker: what arrives is what was sent."""

import pickle

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from cabs_torch.data.transport import pack, unpack
from cabs_torch.data.workers import Chunk

leaves = st.one_of(
    st.integers(), st.text(max_size=3), st.none(), st.floats(allow_nan=False),
    st.integers(0, 3).map(lambda n: torch.arange(float(n))),
    st.integers(0, 3).map(lambda n: np.arange(n)),
    st.integers(0, 3).map(lambda n: np.arange(n, dtype=">i4")),
    st.integers(0, 3).map(lambda n: np.array(["ab"] * n)),
    st.just(torch.tensor(True)), st.just(torch.randn(2, 3).bfloat16()),
    st.just(torch.ones(2, 2).to_sparse()), st.just(np.float32(1.5)), st.just(np.array(2.5)),
)  # fmt: skip
nests = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Chunk, inner, inner),
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(), inner),
    ),
    max_leaves=6,
)


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one.to_dense(), other.to_dense())
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, strict=True)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for part, its in zip(one, other, strict=True):
            same(part, its)
    else:
        assert one == other


@given(st.lists(nests, max_size=5), st.integers(1, 3))
def test_what_is_unpacked_is_what_was_packed(examples, times):
    examples = examples * times
    same(unpack(pack(examples)), examples)


@given(nests, st.integers(1, 5))
def test_examples_of_one_kind_travel_in_few_pieces(example, times):
    packed = pack([example] * times)
    assert packed.nest is not False
    same(unpack(packed), [example] * times)


def test_what_travels_through_a_pipe_fits_into_it():
    # A message that is sent in parts leaves its reader waiting if the worker is killed meanwhile.
    examples = [{"text": "x" * 10_000, "image": torch.zeros(100, 100)} for _ in range(64)]
    for batch in (examples, [*examples, "another kind"]):
        assert len(pickle.dumps(pack(batch)._replace(memory=None))) < 4096
