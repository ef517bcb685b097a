"""Sums over labelled axes: where the examples lie, and each example's gradients, against a loop."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs.gradients.arrays import NumpyArrays
from cabs.gradients.contraction import Contraction
from cabs.gradients.layout import Layout, MixedError


def gradients(equation, index, shared, other, cotangent, axes, examples):
    """Return each example's gradient of sum(cotangent * einsum), element by element.

    ``axes`` says which axis of the other operand and of the output holds the examples, whose parts
    lie there one after another.
    """
    found = np.zeros((examples, *shared.shape))
    for place in itertools.product(*map(range, shared.shape)):
        one = np.zeros_like(shared)
        one[place] = 1.0
        operands = (one, other) if index == 0 else (other, one)
        products = np.einsum(equation, *operands) * cotangent
        parts = np.split(products, examples, axis=axes[1])
        found[(slice(None), *place)] = [part.sum() for part in parts]
    return found


def parts_of(tensor, axis, examples):
    return np.stack(np.split(tensor, examples, axis=axis))


@st.composite
def contractions(draw):
    """Two operands and their output, with axes in any order: (equation, index, sizes)."""
    kinds = {"b": (1, 1, 1), "c": (1, 1, 0), "m": (1, 0, 1), "t": (0, 1, 1), "a": (0, 1, 0)}
    labels = [(kind, kind) for kind in kinds if draw(st.booleans())]
    labels += [(kind.upper(), kind) for kind in kinds if draw(st.booleans()) and kind != "a"]
    sizes = {label: draw(st.integers(1, 3)) for label, _ in labels}
    sizes["x"] = draw(st.integers(1, 2)) * draw(st.shared(st.integers(2, 3), key="examples"))
    lines = []
    for side in range(3):
        mine = [label for label, kind in labels if kinds[kind][side]] + ["x"] * (side > 0)
        lines.append("".join(draw(st.permutations(mine))))
    index = draw(st.integers(0, 1))
    operands = lines[:2] if index == 0 else lines[1::-1]
    return f"{','.join(operands)}->{lines[2]}", index, sizes


@given(contractions(), st.shared(st.integers(2, 3), key="examples"), st.integers(0, 2**31))
def test_gradients_of_a_shared_operand_are_those_of_a_loop(drawn, examples, seed):
    equation, index, sizes = drawn
    before, output = equation.split("->")
    terms = before.split(",")
    random = np.random.default_rng(seed)
    shapes = [tuple(sizes[label] for label in term) for term in (*terms, output)]
    shared, other = (random.normal(size=shapes[at]) for at in (index, 1 - index))
    cotangent = random.normal(size=shapes[2])
    axis = output.index("x")
    layout = Layout(shapes[2], int(np.prod(shapes[2][:axis])), examples)
    contraction = Contraction.of_einsum(equation, shapes[:2])
    place = contraction.carried(layout, 1 - index, shapes[1 - index])
    assert contraction.carried(layout, index, shapes[index]) is None
    assert place == Layout(
        shapes[1 - index],
        int(np.prod(shapes[1 - index][: terms[1 - index].index("x")])),
        examples,
    )
    sides = contraction.sides(index, shapes[index])
    there = terms[1 - index].index("x")
    taken = parts_of(other, there, examples).sum(axis=tuple(1 + at for at in sides.summed))
    term = sides.product(NumpyArrays(), taken, parts_of(cotangent, axis, examples))
    expected = gradients(equation, index, shared, other, cotangent, (there, axis), examples)
    found = term.gradient(NumpyArrays(), *term.operands)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(
    st.lists(st.integers(1, 3), max_size=2),
    *(st.tuples(*[st.integers(1, 3)] * 3), st.tuples(st.booleans(), st.booleans())),
    st.integers(0, 3),
)
def test_a_product_of_matrices_is_the_einsum_of_its_labels(ahead, sizes, is_turned, ones):
    rows, summed, columns = sizes
    # An axis ahead may be one in either operand, and be missing in the second.
    first = [1 if ones & 1 and at == 0 else size for at, size in enumerate(ahead)]
    second = [1 if ones & 2 and at == len(ahead) - 1 else size for at, size in enumerate(ahead)]
    second = second[1:] if ones == 3 else second
    shapes = [(*first, rows, summed), (*second, summed, columns)]
    shapes = [
        (*shape[:-2], *shape[:-3:-1]) if turned else shape
        for shape, turned in zip(shapes, is_turned, strict=True)
    ]
    found = Contraction.of_matrices(shapes, is_turned)
    known = {*sum(found.operands, ()), *found.output}
    names = {label: chr(97 + at) for at, label in enumerate(known)}
    operands = [np.random.default_rng(0).normal(size=shape) for shape in shapes]
    lines = ["".join(names[label] for label in one) for one in found.operands]
    output = "".join(names[label] for label in found.output)
    expected = np.matmul(
        *(one.swapaxes(-1, -2) if t else one for one, t in zip(operands, is_turned, strict=True))
    )
    result = np.einsum(f"{','.join(lines)}->{output}", *operands)
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("equation", "shapes", "problem"),
    [
        ("ii,ij->j", [(2, 2), (2, 3)], "takes a diagonal"),
        ("ij,jk->ik", [(2, 1), (3, 4)], "broadcasts an axis of length one"),
    ],
)
def test_what_labels_cannot_say_is_refused(equation, shapes, problem):
    with pytest.raises(MixedError, match=problem):
        Contraction.of_einsum(equation, shapes)


def test_gradients_of_what_is_summed_alone_or_with_several_are_refused():
    with pytest.raises(MixedError, match="sums over an axis of the parameter alone"):
        Contraction.of_einsum("ak,xk->x", [(2, 3), (4, 3)]).sides(0, (2, 3))
    with pytest.raises(MixedError, match="a number of operands"):
        Contraction.of_einsum("x,x,x->x", [(2,)] * 3).sides(0, (2,))


def test_axes_that_an_ellipsis_stands_for_are_aligned_from_behind():
    found = Contraction.of_einsum("...ij,jk->...ik", [(5, 2, 3, 4), (4, 6)])
    assert found == Contraction(((0, 1, "i", "j"), ("j", "k")), (0, 1, "i", "k"))
