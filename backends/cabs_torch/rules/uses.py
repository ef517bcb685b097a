"""The uses of one parameter, whose gradients are added before they are squared.

Guarantees: cross terms between uses are included, whatever lies between the parameter and a use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from cabs.gradients.layout import Shape
from cabs.gradients.terms import ElementwiseTerm, Lookup, Product, as_one, together
from cabs_torch.graph.autograd_nodes import Edge, name_of, shape_of
from cabs_torch.norms import reductions
from cabs_torch.norms.arrays import TorchArrays
from cabs_torch.rules.batch_axis import KEEPING, PERMUTING, permutation
from cabs_torch.rules.parameter_paths import MULTIPLE, back, settings


@dataclass(frozen=True)
class Use:
    """A term, and the operations between it and the parameter, which rearrange that."""

    term: ElementwiseTerm
    path: tuple[Edge, ...]

    @property
    def shape(self) -> Shape:
        """The parameter's shape."""
        return shape_of(self.path[-1][0].next_functions[0]) if self.path else self.term.shape

    def gradient(self, arrays: TorchArrays, part: slice) -> Tensor:
        """Return some examples' gradients of the parameter, shape (examples, *shape)."""
        operands = (one[part] for one in self.term.operands)
        return back(self.term.gradient(arrays, *operands), self.path)

    def straight(self) -> Use:
        """Return the same use without casts and transpositions, where the term can do without."""
        term, path = self.term, self.path
        while path and isinstance(term, (Product, Lookup)):
            node, rank = path[0][0], len(term.shape)
            name, shape = name_of(node), shape_of(node.next_functions[0])
            if name in PERMUTING and isinstance(term, Product):
                term = term.placed(shape, permutation(node, rank))
            elif shape != term.shape or name not in KEEPING:
                break
            path = path[1:]
        return Use(term, path)

    def signature(self) -> tuple[object, ...]:
        """Return what says that two uses rearrange a parameter in the same way."""
        return tuple(settings(edge) for edge in self.path)

    def cut(self) -> Edge | None:
        """Return the operation that cut the parameter into parts, and which part this is."""
        if self.path and name_of(self.path[-1][0]) in MULTIPLE:
            return self.path[-1]
        return None


def total_squares(uses: Sequence[Use], arrays: TorchArrays) -> Tensor:
    """Return the sum over examples of the squared norm of a parameter's gradient.

    Where there are several uses, the gradients of all are added before they are squared: from their
    factors where all are uses as a matrix or a table; else they are materialized.
    """
    uses = [use.straight() for use in uses]
    if len(uses) == 1:
        alone: Tensor = uses[0].term.squares(arrays)
        return alone
    parts = _by_part(uses)
    if parts is not None:
        return torch.stack([total_squares(some, arrays) for some in parts]).sum()
    if len({use.signature() for use in uses}) == 1:
        found: Tensor | None = together(arrays, [use.term for use in uses])
        if found is not None:
            return found
    sums = [reductions.square(gradients(uses, arrays, part)) for part in _chunks(uses, arrays)]
    return torch.stack(sums).sum()


def coordinate_squares(uses: Sequence[Use], arrays: TorchArrays) -> Tensor:
    """Return the sum over examples of the elementwise squares of a parameter's gradient.

    In its shape. The gradients of several uses are added before, as in :func:`total_squares`.
    """
    uses = [use.straight() for use in uses]
    if len({use.signature() for use in uses}) == 1:
        term = uses[0].term if len(uses) == 1 else as_one(arrays, [use.term for use in uses])
        if term is not None:
            return back(term.coordinate_squares(arrays), uses[0].path)[0]
    parts = _by_part(uses)
    if parts is not None:
        return reduce(torch.add, [coordinate_squares(some, arrays) for some in parts])
    total: Tensor | None = None
    for part in _chunks(uses, arrays):
        total = reductions.with_squares(total, gradients(uses, arrays, part))
    assert total is not None
    return total[0]


def _by_part(uses: Sequence[Use]) -> list[list[Use]] | None:
    """Return the uses by which part of a parameter they are of, if it was cut in one go.

    The parts do not overlap. None if there is one, or it was cut in several ways.
    """
    cuts = {use.cut() for use in uses}
    if None in cuts or len(cuts) == 1 or len({cut[0] for cut in cuts if cut}) > 1:
        return None
    return [[use for use in uses if use.cut() == cut] for cut in cuts]


def _chunks(uses: Sequence[Use], arrays: TorchArrays) -> Iterator[slice]:
    """Yield slices of examples, of which the gradients of uses are at hand together."""
    return arrays.parts(len(uses[0].term.operands[0]), 2 * math.prod(uses[0].shape))


def gradients(uses: Sequence[Use], arrays: TorchArrays, part: slice) -> Tensor:
    """Return some examples' gradients of a parameter, the sum over its uses."""
    found = [use.gradient(arrays, part) for use in uses]
    return reduce(torch.add, found)
