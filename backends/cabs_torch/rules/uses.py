"""The uses of one parameter, whose gradients are added before they are squared.

Guarantees: cross terms between uses are included, whatever lies between the parameter and a use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabs.gradients.layout import Shape
from cabs_torch.graph.autograd_nodes import Edge, name_of, shape_of
from cabs_torch.norms import ghost_norms
from cabs_torch.norms.per_example import Lookup, Product, Term, together
from cabs_torch.rules.batch_axis import KEEPING, PERMUTING, permutation
from cabs_torch.rules.parameter_paths import MULTIPLE, back, settings


@dataclass(frozen=True)
class Use:
    """A term, and the operations between it and the parameter, which rearrange that."""

    term: Term
    path: tuple[Edge, ...]

    @property
    def shape(self) -> Shape:
        """The parameter's shape."""
        return shape_of(self.path[-1][0].next_functions[0]) if self.path else self.term.shape

    def form(self, part: slice) -> Tensor:
        """Return gradients of the parameter, shape (examples, *shape)."""
        return back(self.term.form(part), self.path)

    def straight(self) -> Use:
        """Return the same use without casts and transpositions, where the term can do without."""
        term, path = self.term, self.path
        while path and isinstance(term, (Product, Lookup)):
            node, rank = path[0][0], len(term.shape)
            name = name_of(node)
            if name in PERMUTING and isinstance(term, Product):
                if permutation(node, rank) != [*range(rank - 2), rank - 1, rank - 2]:
                    break
                term = term.transposed()
            elif shape_of(node.next_functions[0]) != term.shape or name not in KEEPING:
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


def total_square_sum(uses: Sequence[Use], chunk: int | None) -> Tensor:
    """Return the sum over examples of the squared norm of a parameter's gradient.

    Where there are several uses, the gradients of all are added before they are squared: uses as a
    matrix or a table put one after the other along T are one such use, others are formed.
    """
    uses = [use.straight() for use in uses]
    if len(uses) == 1:
        return uses[0].term.square_sum(chunk)
    cuts = {use.cut() for use in uses}
    if None not in cuts and len(cuts) > 1 and len({cut[0] for cut in cuts if cut}) == 1:
        # What is cut out of a parameter in one go does not overlap.
        by_part = ([use for use in uses if use.cut() == cut] for cut in cuts)
        return torch.stack([total_square_sum(some, chunk) for some in by_part]).sum()
    if len({use.signature() for use in uses}) == 1:
        products = [use.term for use in uses if isinstance(use.term, Product)]
        lookups = [use.term for use in uses if isinstance(use.term, Lookup)]
        if len(products) + len(lookups) == len(uses):
            found = together(products, lookups, chunk)
            if found is not None:
                return found
    examples, shape = uses[0].term.examples, uses[0].shape
    chunks = ghost_norms.parts(examples, 2 * math.prod(shape), chunk)
    return torch.stack([ghost_norms.square(form(uses, part)) for part in chunks]).sum()


def form(uses: Sequence[Use], part: slice) -> Tensor:
    """Return some examples' gradients of a parameter, the sum over its uses."""
    formed = [use.form(part) for use in uses]
    return formed[0] if len(formed) == 1 else torch.stack(formed).sum(dim=0)
